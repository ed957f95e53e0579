"""A join token in a file, for a fleet whose nodes share the controller's machine: `outrider dev`, a compose file.

Made at the start, and when the fleet's CA changes, where the file has none that works. Owns that file; everything else
is the journal's.
"""

import asyncio
import hashlib
import secrets
from pathlib import Path

from controller.ca import FleetCa
from controller.core.access_records import TokenCreated
from controller.core.events import AccessChangeRequested
from controller.engine import Engine
from controller.files import write_file
from controller.people import done
from outrider.clock import wall_s
from outrider.errors import HostError
from outrider.model.access import Token, TokenKind
from outrider.tokens import join_token, parse_token

_USES = 1000
_VALID_S = 24 * 3600.0


async def keep_join_token(path: Path, engine: Engine, ca: FleetCa) -> None:
    """Raises HostError where the file cannot be written, PeerError where the journal does not answer."""
    now_s = wall_s()
    kept = await asyncio.to_thread(_read, path)
    works = engine.state.access.token_by_hash(_sha256(kept), TokenKind.JOIN, now_s) is not None
    if works and parse_token(kept).ca_sha256 == ca.sha256:
        return
    plain = join_token(ca_sha256=ca.sha256, secret=secrets.token_urlsafe(32))
    token = Token(
        id=_sha256(plain)[:12],
        kind=TokenKind.JOIN,
        uses_left=_USES,
        created_at_s=now_s,
        expires_at_s=now_s + _VALID_S,
        created_by="the controller's configuration",
    )
    change = TokenCreated(token=token, sha256=_sha256(plain))
    done(await engine.request(lambda request: AccessChangeRequested(request=request, change=change)))
    try:
        await asyncio.to_thread(write_file, path, plain.encode(), 0o600)
    except OSError as error:
        raise HostError(
            str(path), step=f"write the join token: {error.strerror}", hint="check join_token_file"
        ) from error


def _read(path: Path) -> str:
    """ "" where there is none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise HostError(
            str(path), step=f"read the join token: {error.strerror}", hint="check join_token_file"
        ) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
