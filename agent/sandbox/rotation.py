"""Keeps the logs of running sandboxes within their bounds, however fast a workload writes.

A log is two files: `log`, which conmon writes, and `log.1`, the one before. `log` is turned at a sixth of the bound;
should this agent be too slow for that, or away, conmon itself starts `log` afresh once it has written a third (it does
not count what an earlier run left there). So neither passes a half. Owns an inotify descriptor: logs at rest cost
nothing. One task, `run`; no queue.
"""

import asyncio
import ctypes
import os
import struct
from contextlib import suppress

from agent.sandbox import conmon
from agent.sandbox.descriptors import readable

_IN_MODIFY = 0x2
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 65_536
_PAUSE_S = 0.01  # between two looks at logs that grow: to miss 10 MiB's share takes 350 MB/s

_libc = ctypes.CDLL(None, use_errno=True)


def conmon_bytes(log_bytes_max: int) -> int:
    """The size at which conmon itself gives up `log` and starts it afresh."""
    return log_bytes_max // 3


class Rotation:
    def __init__(self) -> None:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._descriptor >= 0, "a descriptor for inotify"
        self._watches: dict[str, int] = {}
        self._logs: dict[int, tuple[conmon.Directory, int]] = {}

    def add(self, sandbox: str, directory: conmon.Directory, log_bytes_max: int) -> None:
        watch = _libc.inotify_add_watch(self._descriptor, os.fsencode(directory.path), _IN_MODIFY)
        if watch >= 0:  # else the sandbox's directory is gone, and its log with it
            self._watches[sandbox] = watch
            self._logs[watch] = directory, log_bytes_max

    def remove(self, sandbox: str) -> None:
        watch = self._watches.pop(sandbox, None)
        if watch is not None:
            _libc.inotify_rm_watch(self._descriptor, watch)
            del self._logs[watch]

    async def run(self) -> None:
        """For ever: turn each log that has grown past its share."""
        for watch in tuple(self._logs):
            turn_if_due(*self._logs[watch])
        while True:
            await readable(self._descriptor)
            for watch in self._modified():
                turn_if_due(*self._logs[watch])
            await asyncio.sleep(_PAUSE_S)

    def _modified(self) -> set[int]:
        events = os.read(self._descriptor, _EVENTS_BYTES)
        watches: set[int] = set()
        position = 0
        while position < len(events):
            watch, mask, _, name_bytes = _EVENT.unpack_from(events, position)
            position += _EVENT.size + name_bytes
            if watch == -1:  # the kernel's queue ran over: any of them may have grown
                return set(self._logs)
            if mask & _IN_MODIFY:
                watches.add(watch)
        return watches & self._logs.keys()


def turn_if_due(directory: conmon.Directory, log_bytes_max: int) -> None:
    """Set `log` aside as `log.1` once it has its share of the bound, and have conmon go on with a new one."""
    with suppress(FileNotFoundError):  # turned a moment ago, and conmon has not opened the new one yet
        if directory.log.stat().st_size >= log_bytes_max // 6:
            # conmon writes on to the renamed file until it reopens: no line is lost in between.
            directory.log.replace(directory.log_older)
            conmon.reopen_log(directory)
