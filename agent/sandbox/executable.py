"""Whether a command can be found inside a sandbox that was created and not yet started.

Looks through the eyes of its first process, links resolved within its root: an image cannot point out of itself.
"""

import ctypes
import os
import stat
from pathlib import PurePosixPath

_OPENAT2 = 437  # on every architecture that has it
_RESOLVE_IN_ROOT = 0x10
_PATH_DEFAULT = "/usr/local/bin:/usr/bin:/bin"

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


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
    how = _OpenHow(flags=os.O_PATH | os.O_CLOEXEC, mode=0, resolve=_RESOLVE_IN_ROOT)
    descriptor = _libc.syscall(_OPENAT2, root, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    if descriptor < 0:
        return False
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    return stat.S_ISREG(mode) and bool(mode & 0o111)
