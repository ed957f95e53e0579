"""Reads what a sandbox wrote: the last lines, or all from there on, across the turns of its log.

Owns no file: `rotation` turns them, conmon writes them, as lines of "TIME STREAM TAG TEXT" with the tag P for a piece
of a line and F for its end (the format of Kubernetes' CRI). A reader holds one block in memory, however long the log.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from agent.sandbox.conmon import Directory, inode
from outrider.model.job import Value

_BLOCK_BYTES = 65_536
_POLL_S = 0.05
_TAIL_BYTES_MAX = 16_384


class LogPiece(Value, frozen=True, kw_only=True):
    """A line, or a piece of a long one."""

    at: str  # RFC 3339, the node's clock
    stream: str  # "stdout" or "stderr"
    data: bytes  # with its newline where the line ends here


def parse(line: bytes) -> LogPiece | None:
    """One line of the file, without its newline; None for one that was cut when the log was."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[2] not in (b"F", b"P") or parts[1] not in (b"stdout", b"stderr"):
        return None
    at, stream, tag, text = parts
    data = text + b"\n" if tag == b"F" else text
    return LogPiece(at=at.decode(errors="replace"), stream=stream.decode(), data=data)


async def read(
    directory: str,
    *,
    lines: int | None = None,
    stream: str | None = None,
    mark: bytes = b"",
    following: Callable[[], bool] | None = None,
) -> AsyncIterator[LogPiece]:
    """The last `lines` lines (None: all there is), then what follows for as long as `following()` is true.

    `stream` keeps one of the two, `mark` the lines in which it is. A reader slower than two turns of the log misses
    what was turned away meanwhile.
    """
    where = Directory(directory)
    pieces = _Files(where)
    try:
        if lines is not None:
            pieces.skip_to(_start_of_last(where, lines, stream, mark))
        while True:
            # Asked before reading: what was written until then is then read before the end.
            more = following is not None and following()
            for piece in pieces.available():
                if (stream is None or piece.stream == stream) and mark in piece.data:
                    yield piece
            if pieces.turned():
                continue
            if not more:
                return
            await asyncio.sleep(_POLL_S)
    finally:
        pieces.close()


def last_lines(directory: str, count: int) -> str:
    """The last `count` lines of both streams as text, for a person who asks why it failed; cut to 16 KiB."""
    where = Directory(directory)
    pieces = _Files(where)
    try:
        pieces.skip_to(_start_of_last(where, count, None, b""))
        tail = b""
        for piece in pieces.all():
            tail = (tail + piece.data)[-_TAIL_BYTES_MAX:]
    finally:
        pieces.close()
    return tail.decode(errors="replace")


class _Files:
    """The log's files as one sequence of pieces."""

    def __init__(self, where: Directory) -> None:
        self._where = where
        self._descriptor: int | None = None
        self._rest = b""
        self._last = False  # whether the file at hand was seen to be turned: once more to its end, then the next

    def skip_to(self, position: tuple[int, int] | None) -> None:
        """To (inode, offset), as `_start_of_last` has it: the file may have been turned since."""
        if position is None:
            return
        for path in _in_order(self._where):
            self._open(path)
            if self._descriptor is not None and os.fstat(self._descriptor).st_ino == position[0]:
                os.lseek(self._descriptor, position[1], os.SEEK_SET)
                return
        self.close()

    def available(self) -> Iterator[LogPiece]:
        """What the file at hand has beyond what was read."""
        if self._descriptor is None:
            for path in _in_order(self._where)[:1]:
                self._open(path)
        if self._descriptor is None:
            return
        while block := os.read(self._descriptor, _BLOCK_BYTES):
            *whole, self._rest = (self._rest + block).split(b"\n")
            yield from (piece for line in whole if (piece := parse(line)) is not None)

    def all(self) -> Iterator[LogPiece]:
        while True:
            yield from self.available()
            if not self.turned():
                return

    def turned(self) -> bool:
        """Whether there is more at once: conmon has gone on to another file."""
        if self._descriptor is None:
            return False
        own = os.fstat(self._descriptor).st_ino
        if inode(self._where.log) in (own, None):
            return False
        if not self._last:
            self._last = True  # it may have been written to between our last read and its turn
            return True
        files = _in_order(self._where)
        inodes = [inode(path) for path in files]
        # Turned away altogether while we read it: go on with the oldest there is.
        following = inodes.index(own) + 1 if own in inodes else 0
        self._open(files[following])
        return True

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, path: Path) -> None:
        self.close()
        self._rest, self._last = b"", False
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._descriptor = None


def _in_order(where: Directory) -> list[Path]:
    """The log's files that there are, the oldest first, each once."""
    paths = {inode(path): path for path in (where.log_older, where.log_held, where.log)}
    return [path for number, path in paths.items() if number is not None]


def _start_of_last(where: Directory, count: int, stream: str | None, mark: bytes) -> tuple[int, int] | None:
    """Where the last `count` lines begin: (inode, offset). None: at the very beginning."""
    starts: deque[tuple[int, int]] = deque(maxlen=count)
    wanted = (stream or "").encode()
    seen = 0
    end: tuple[int, int] | None = None
    complete = True
    for path in _in_order(where):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            offset, number = 0, os.fstat(file.fileno()).st_ino
            for line in file:
                fields = line.split(b" ", 3)  # as `parse` has it, at a third of the cost: this reads all there is
                if len(fields) == 4 and wanted in (b"", fields[1]) and mark in line:
                    if complete:
                        starts.append((number, offset))
                        seen += 1
                    complete = fields[2] == b"F"
                offset += len(line)
            end = (number, offset)
    if count == 0:
        return end
    return starts[0] if seen > count else None
