"""Shows a tree with other owners than it has: an idmapped mount (mount_setattr(2)), where nothing is copied or changed.

So one unpacked image, owned as its author wanted, serves sandboxes with disjoint uid ranges. The mapping comes from a
user namespace, which only a program of its own can make: to start one takes as long as all else here, so one is kept
ready. Owns that one; it ends with the agent.
"""

import ctypes
import os
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

from agent.sandbox import process
from outrider.errors import HostError

# <linux/mount.h>, and system calls of Linux 5.12 that are numbered alike on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE, _MOVE_MOUNT_EMPTY = -100, 0x1000, 1, 4
_ATTR_NOSUID, _ATTR_NODEV, _ATTR_IDMAP = 0x2, 0x4, 0x100000

_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("namespace", ctypes.c_uint64),
    )


def bind(source: Path, target: Path, *, uid_first: int, uids: int) -> None:
    """`source` at `target`, its owners 0 up to `uids` shown as `uid_first` and up, and its groups likewise.

    Without set-uid programs and devices. Raises HostError where the kernel or the file system cannot.
    """
    with ExitStack() as stack:
        tree = _call(
            _OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC, doing="clone", path=source
        )
        stack.callback(os.close, tree)
        namespace = _user_namespace(uid_first, uids)
        stack.callback(os.close, namespace)
        attributes = _Attributes(set=_ATTR_IDMAP | _ATTR_NOSUID | _ATTR_NODEV, namespace=namespace)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        _call(
            _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size, doing="map owners", path=source
        )
        _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_EMPTY, doing="mount", path=target)


def make_ready() -> None:
    """For the next `bind`, whenever there is time: 1 ms."""
    if not _ready:
        _ready.append(_Unmapped())


class _Unmapped:
    """A program that waits in a user namespace of its own, which nobody has in it yet."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            wait, self._release = os.pipe()
            stack.callback(os.close, wait)
            self._told, tell = os.pipe()
            stack.callback(os.close, tell)
            self._pid = process.spawn(
                ("unshare", "--user", "sh", "-c", "echo; read line"), descriptors={0: wait, 1: tell}
            )

    def mapped(self, uid_first: int, uids: int) -> int:
        """A descriptor of the namespace. It holds no process from then on, and ends with the last use of it."""
        try:
            if not os.read(self._told, 1):
                raise HostError("user namespaces", step="unshare --user failed", hint="does this kernel allow them?")
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{self._pid}/{name}").write_text(f"0 {uid_first} {uids}")
            return os.open(f"/proc/{self._pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(self._told)
            os.close(self._release)
            _ending.append(self._pid)


_ready: deque[_Unmapped] = deque()
_ending: deque[int] = deque()  # pids, until somebody has looked


def _user_namespace(uid_first: int, uids: int) -> int:
    """With that mapping. For any thread."""
    for _ in range(len(_ending)):
        with suppress(IndexError):
            pid = _ending.popleft()
            if not os.waitpid(pid, os.WNOHANG)[0]:
                _ending.append(pid)
    with suppress(IndexError, OSError):  # none is ready, or somebody has ended it
        return _ready.pop().mapped(uid_first, uids)
    return _Unmapped().mapped(uid_first, uids)


def _call(number: int, *arguments: object, doing: str, path: Path) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        hint = "images need Linux 5.19 and a file system with idmapped mounts: ext4, xfs or btrfs"
        raise HostError(str(path), step=f"{doing}: {os.strerror(ctypes.get_errno())}", hint=hint)
    return result
