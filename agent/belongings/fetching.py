"""A program of its own: fetches one artifact, checks what it holds, unpacks it. So the agent can end it at any moment.

    python -m agent.belongings.fetching SOURCE SHA256 PARTIAL TARGET file|tree MODE BYTES_MAX

SOURCE "" takes PARTIAL as it is. What was fetched stays in PARTIAL until it is whole: the next try goes on from there.
Ends with 0; with 65 and a sentence where trying again would not help, with 75 where it may.
"""

import hashlib
import http.client
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, NoReturn

from agent.belongings.unpacking import unpack
from outrider.errors import InputError

_BLOCK_BYTES = 1024 * 1024
_SILENT_S = 30.0
_TRIES = 4  # one after the other, where the connection broke off but something came
_ALL_OF_IT = 416  # nothing is left after what is here already
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Wrong(Exception):  # noqa: N818 - how the program ends
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def main() -> NoReturn:
    source, sha256, partial, target, kind, mode, bytes_max = sys.argv[1:]
    try:
        if source.startswith("file:"):
            _copy(source.removeprefix("file:"), Path(partial), int(bytes_max))
        elif source:
            _download(source, Path(partial), int(bytes_max))
        _check(Path(partial), sha256)
        _finish(Path(partial), Path(target), kind, int(mode, 8), int(bytes_max))
    except _Wrong as wrong:
        print(wrong, file=sys.stderr)
        sys.exit(wrong.code)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(os.EX_DATAERR)
    except OSError as error:
        print(f"{error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    sys.exit(0)


def _download(url: str, partial: Path, bytes_max: int) -> None:
    """Goes on where an earlier try, or program, broke off."""
    for left in reversed(range(_TRIES)):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _go_on(url, partial, before, bytes_max)
        except urllib.error.HTTPError as error:
            if error.code == _ALL_OF_IT:
                return
            code = os.EX_TEMPFAIL if error.code in _TRY_AGAIN else os.EX_DATAERR
            raise _Wrong(f"the server answers {error.code} {error.reason}", code) from error
        except (http.client.HTTPException, OSError) as error:
            moved = partial.exists() and partial.stat().st_size > before
            if not left or not moved:
                reason = getattr(error, "reason", None) or error
                raise _Wrong(f"the server does not answer as it should ({reason})", os.EX_TEMPFAIL) from error
            time.sleep(1)
        else:
            return


def _go_on(url: str, partial: Path, have: int, bytes_max: int) -> None:
    request = urllib.request.Request(url)  # noqa: S310 - the job's reader lets only http and https through
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_SILENT_S) as answer:  # noqa: S310 - as above
        resumed = have > 0 and answer.status == 206
        with partial.open("ab" if resumed else "wb") as file:
            _take(answer, file, bytes_max - (have if resumed else 0))
        wanted = answer.headers.get("Content-Length")
        got = partial.stat().st_size - (have if resumed else 0)
        if wanted is not None and got < int(wanted):
            raise http.client.IncompleteRead(b"", int(wanted) - got)


def _copy(path: str, partial: Path, bytes_max: int) -> None:
    try:
        # Whatever lies there, nothing is waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file, partial.open("wb") as copy:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _Wrong(f"{path} is no regular file on this node", os.EX_DATAERR)
            _take(file, copy, bytes_max)
    except OSError as error:
        if error.filename == path:
            raise _Wrong(f"{path}: {error.strerror} on this node", os.EX_DATAERR) from error
        raise


def _take(source: IO[bytes] | http.client.HTTPResponse, target: IO[bytes], bytes_max: int) -> None:
    left = bytes_max
    while block := source.read(_BLOCK_BYTES):
        left -= len(block)
        if left < 0:
            raise _Wrong(f"it is larger than the {bytes_max} bytes that this node allows", os.EX_DATAERR)
        target.write(block)


def _check(partial: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise _Wrong(f"its sha256 is {digest.hexdigest()}, not what the job says: do not use it", os.EX_DATAERR)


def _finish(partial: Path, target: Path, kind: str, mode: int, bytes_max: int) -> None:
    if kind == "tree":
        unpack(partial, target, bytes_max=bytes_max)
        partial.unlink()
        return
    target.mkdir(mode=0o755)
    shutil.move(partial, target / "file")
    (target / "file").chmod(mode)


if __name__ == "__main__":
    main()
