"""Keeps what a sandbox wrote within its bound, however fast it writes and whether or not this agent is there.

conmon itself begins `log` anew each time it has written a quarter of the bound (`conmon_bytes`), and so forgets the
file before. This module holds that file by a second name, `log.held`, and once there is a newer one makes it `log.1`.
Nothing is lost in between unless a workload fills two quarters before the loop comes round; all files together never
pass the bound. Owns an inotify descriptor that wakes it at a turn: logs that do not turn cost nothing. One task, `run`;
no queue.
"""

import ctypes
import os
import struct

from agent.sandbox import conmon
from agent.sandbox.descriptors import readable
from outrider.errors import HostError

_IN_MOVED_TO = 0x80  # conmon opens `log.tmp` and renames it to `log`
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 65_536

_libc = ctypes.CDLL(None, use_errno=True)


def conmon_bytes(log_bytes_max: int) -> int:
    """How much conmon writes before it begins `log` anew."""
    return log_bytes_max // 4


class Rotation:
    def __init__(self) -> None:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise HostError("inotify", step=os.strerror(ctypes.get_errno()), hint="raise fs.inotify.max_user_instances")
        self._watches: dict[str, int] = {}
        self._directories: dict[int, conmon.Directory] = {}

    def add(self, sandbox: str, directory: conmon.Directory) -> None:
        """To be called before conmon writes there, or for a sandbox that was found running."""
        watch = _libc.inotify_add_watch(self._descriptor, os.fsencode(directory.path), _IN_MOVED_TO)
        if watch < 0:
            raise HostError(
                str(directory.path),
                step=f"watch: {os.strerror(ctypes.get_errno())}",
                hint="raise fs.inotify.max_user_watches",
            )
        self._watches[sandbox] = watch
        self._directories[watch] = directory
        hold(directory)

    def remove(self, sandbox: str) -> None:
        watch = self._watches.pop(sandbox, None)
        if watch is not None:
            _libc.inotify_rm_watch(self._descriptor, watch)
            del self._directories[watch]

    async def run(self) -> None:
        """For ever: hold each new log file."""
        while True:
            await readable(self._descriptor)
            for watch in self._turned():
                hold(self._directories[watch])

    def _turned(self) -> set[int]:
        events = os.read(self._descriptor, _EVENTS_BYTES)
        watches: set[int] = set()
        position = 0
        while position < len(events):
            watch, mask, _, name_bytes = _EVENT.unpack_from(events, position)
            position += _EVENT.size + name_bytes
            if watch == -1:  # the kernel's queue ran over: any of them may have turned
                return set(self._directories)
            if mask & _IN_MOVED_TO:
                watches.add(watch)
        return watches & self._directories.keys()


def hold(directory: conmon.Directory) -> None:
    """Give the file that conmon writes a second name, and the one that had it before the name of the older log."""
    newest = conmon.inode(directory.log)
    if newest is None or newest == conmon.inode(directory.log_held):
        return
    if directory.log_held.exists():
        directory.log_held.replace(directory.log_older)
    os.link(directory.log, directory.log_held)


def set_aside(directory: conmon.Directory, log_bytes_max: int) -> None:
    """Before a start: conmon appends to what an earlier run left, and does not count it."""
    hold(directory)
    if directory.log.exists() and directory.log.stat().st_size > conmon_bytes(log_bytes_max) // 2:
        directory.log.unlink()
        directory.log_held.replace(directory.log_older)
