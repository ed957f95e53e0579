"""Whether a command can be found inside a sandbox that was created and not yet started.

Looks through the eyes of its first process, links resolved within its root: an image cannot point out of itself.
"""

import os
import stat
from pathlib import PurePosixPath

from agent.sandbox.beneath import open_beneath

_PATH_DEFAULT = "/usr/local/bin:/usr/bin:/bin"


def find(pid: int, command: str, path: str, cwd: str) -> str | None:
    """The path inside at which process `pid`'s sandbox has `command` as an executable file; None where it has not."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY)
    try:
        for candidate in candidates(command, path, cwd):
            if _is_executable(root, candidate):
                return candidate
    finally:
        os.close(root)
    return None


def candidates(command: str, path: str, cwd: str) -> tuple[str, ...]:
    """Where `command` may be, as execvp looks for it."""
    if "/" in command:
        return (str(PurePosixPath(cwd) / command),)
    return tuple(str(PurePosixPath(cwd) / part / command) for part in (path or _PATH_DEFAULT).split(":"))


def _is_executable(root: int, path: str) -> bool:
    try:
        descriptor = open_beneath(root, path, os.O_PATH)
    except OSError:
        return False
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    return stat.S_ISREG(mode) and bool(mode & 0o111)
