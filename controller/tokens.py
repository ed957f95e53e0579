"""Join tokens: kept hashed below DATA/tokens, with uses left and an expiry. Never sees who calls, nor a certificate."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import msgspec

from outrider.errors import HostError, RefusedError
from outrider.ids import NodeId
from outrider.model.job import Value

_FIRST_USES = 1000
_FIRST_VALID_S = 24 * 3600.0


class Token(Value, frozen=True, kw_only=True):
    """`nodes`: the names that it may join as; () is any name that is new to the fleet."""

    sha256: str
    uses_left: int
    expires_at_s: float
    nodes: tuple[NodeId, ...] = ()


class Tokens:
    """The fleet's join tokens. A token is 256 random bits: a plain hash of it cannot be guessed back."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokens.json"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.exists() else b"[]"
            self._tokens = list(msgspec.json.decode(content, type=tuple[Token, ...]))
        except (OSError, msgspec.MsgspecError) as error:
            hint = "remove the file; a new token is made at the next start"
            raise HostError(str(self._path), step=f"read the join tokens: {error}", hint=hint) from error

    def create(self, *, uses: int, valid_s: float, now_s: float, nodes: tuple[NodeId, ...] = ()) -> str:
        """A new token in plain text: it is told once. `now_s` is the wall clock's."""
        plain = secrets.token_urlsafe(32)
        token = Token(sha256=_hash(plain), uses_left=uses, expires_at_s=now_s + valid_s, nodes=nodes)
        self._save([*self._valid(now_s), token])
        return plain

    def ensure_first(self, now_s: float) -> Path:
        """DATA/tokens/join holds a token that works: `outrider dev` reads it. Another is made where it has run out."""
        path = self._path.with_name("join")
        known = {token.sha256 for token in self._valid(now_s)}
        if not path.exists() or _hash(path.read_text().strip()) not in known:
            _write(path, self.create(uses=_FIRST_USES, valid_s=_FIRST_VALID_S, now_s=now_s).encode())
        return path

    def allowed(self, plain: str, node: NodeId, now_s: float) -> Token:
        """The token, where it lets `node` join. Else RefusedError("bad-token"), which never says what was wrong."""
        wanted = _hash(plain)
        found = None
        for token in self._valid(now_s):  # all of them, whichever matches: no hint by time
            if hmac.compare_digest(token.sha256, wanted):
                found = token
        if found is None or (found.nodes and node not in found.nodes):
            raise RefusedError("bad-token", "the token is unknown, used up, expired or for another node")
        return found

    def use(self, token: Token, now_s: float) -> None:
        """One use less, on disk before this returns."""
        fewer = msgspec.structs.replace(token, uses_left=token.uses_left - 1)
        self._save([fewer if kept.sha256 == token.sha256 else kept for kept in self._valid(now_s)])

    def _valid(self, now_s: float) -> list[Token]:
        return [token for token in self._tokens if token.uses_left > 0 and token.expires_at_s > now_s]

    def _save(self, tokens: list[Token]) -> None:
        _write(self._path, msgspec.json.encode(tokens))
        self._tokens = tokens


def _hash(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
