"""A program behind a terminal inside a guest of ours, over a virtio-serial line of its own.

The guest's init has a telnet server for each line (RFC 854, 857, 858, 1073): it makes the terminal and gives it its
size. Owns the conversation until `wait` or `__aexit__`, at whose end the guest's terminal hangs up. Nothing is buffered
here: a reader that is slow slows the program.
"""

import asyncio
import secrets
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from agent import qmp
from agent.drivers.microvm import TERMINAL, TERMINALS
from agent.qmp.guest_agent import GuestAgents
from outrider.errors import HostError, RefusedError

_READ_BYTES = 4096
_BEGINS_S = 20.0  # a guest on a busy node
_KILLED = 128 + 9
_IAC, _SB, _SE, _NAWS = 255, 250, 240, 31
_OPTIONS = range(251, 255)  # WILL, WONT, DO, DONT: one more byte follows
_SIZE_MAX = 0xFFFE


class GuestTerminal:
    """As `agent.tunnels.Process` has it. Use `open_terminal`."""

    def __init__(self, connection: socket.socket, path: Path, taken: set[Path], word: bytes) -> None:
        self._connection = connection
        self._path = path
        self._taken = taken
        self._telnet = Telnet()
        self._ending = Ending(word)
        taken.add(path)

    async def begin(self) -> None:
        """The guest's server speaks first. Raises HostError where it does not."""
        try:
            async with asyncio.timeout(_BEGINS_S):
                first = await asyncio.get_running_loop().sock_recv(self._connection, _READ_BYTES)
        except (TimeoutError, ConnectionError) as error:
            raise HostError(f"terminal at {self._path}", step=f"the guest gives none within {_BEGINS_S:g} s") from error
        self._ending.feed(self._telnet.plain(first))

    async def read(self) -> tuple[str, bytes] | None:
        while not (data := self._ending.take()):
            if self._ending.code is not None:
                self.kill()  # its line is free, whether or not somebody stays to hear of the end
                return None
            try:
                received = await asyncio.get_running_loop().sock_recv(self._connection, _READ_BYTES)
            except ConnectionError:
                received = b""
            if received:
                self._ending.feed(self._telnet.plain(received))
            else:
                self._ending.break_off()
        return "stdout", data

    async def write(self, data: bytes) -> None:
        await self._send(escaped(data))

    def close_stdin(self) -> None:
        """A terminal has no such end: there a user types ^D."""

    def resize(self, rows: int, columns: int) -> None:
        try:
            self._connection.send(window(rows, columns))
        except OSError:
            return  # it reads nothing, or has ended

    def kill(self) -> None:
        if self._connection.fileno() != -1:  # once: by then the line may be somebody else's
            self._connection.close()
            self._taken.discard(self._path)

    async def wait(self) -> int:
        """128 + SIGKILL where the guest ended before it."""
        return _KILLED if self._ending.code is None else self._ending.code

    async def _send(self, data: bytes) -> None:
        """Dropped where the guest has ended: `read` tells."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._connection, data)
        except OSError:
            return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.kill()


class Telnet:
    """What a telnet server sends, without the protocol in it."""

    def __init__(self) -> None:
        self._rest = b""

    def plain(self, data: bytes) -> bytes:
        """What is cut off at the end of `data` is kept for the next."""
        data, self._rest, found = self._rest + data, b"", bytearray()
        while (at := data.find(_IAC)) >= 0:
            found += data[:at]
            kind = data[at + 1] if len(data) > at + 1 else None
            if kind == _IAC:
                found.append(_IAC)
            length = 3 if kind in _OPTIONS else 2
            if len(data) < at + length:
                self._rest = data[at:]
                return bytes(found)
            data = data[at + length :]
        return bytes(found + data)


class Ending:
    """Where a program's output ends: a NUL, the conversation's word, a blank, the program's code, and a NUL."""

    def __init__(self, word: bytes) -> None:
        self._mark = b"\0" + word + b" "
        self._held = b""
        self._ready = b""
        self.code: int | None = None

    def feed(self, data: bytes) -> None:
        self._held += data
        before, mark, after = self._held.partition(self._mark)
        if mark:
            code, end, _ = after.partition(b"\0")
            if end:
                self._ready += before
                self._held = b""
                self.code = int(code) if code.isdigit() else _KILLED
            return
        # Its beginning may be the end of what came so far.
        keep = next((n for n in range(len(self._mark) - 1, 0, -1) if self._held.endswith(self._mark[:n])), 0)
        at = len(self._held) - keep
        self._ready, self._held = self._ready + self._held[:at], self._held[at:]

    def break_off(self) -> None:
        """Nothing more comes."""
        self._ready, self._held = self._ready + self._held, b""
        self.code = _KILLED

    def take(self) -> bytes:
        found, self._ready = self._ready, b""
        return found


def escaped(data: bytes) -> bytes:
    """What is typed, for a telnet server."""
    return data.replace(bytes([_IAC]), bytes([_IAC, _IAC])).replace(b"\r", b"\r\0")


def window(rows: int, columns: int) -> bytes:
    """The terminal's size. The server undoes no escape in it: a byte of 255 would be taken for the protocol's."""
    size = b"".join(_size(each).to_bytes(2, "big") for each in (columns, rows))
    return bytes([_IAC, _SB, _NAWS, *size, _IAC, _SE])


def _size(count: int) -> int:
    count = min(max(count, 1), _SIZE_MAX)
    return count - 1 if count & 0xFF == _IAC else count


async def open_terminal(  # noqa: PLR0917 - of one conversation
    agents: GuestAgents, agent: Path, taken: set[Path], command: Sequence[str], rows: int, columns: int
) -> GuestTerminal:
    """`agent`: the emulator's socket to its guest's agent, beside those of its terminals; `taken`: those in use.

    Raises RefusedError where all are in use or the guest has no agent, HostError where the emulator does not answer.
    """
    name = next((name for name in TERMINALS if agent.with_name(name) not in taken), "")
    if not name:
        raise RefusedError("busy", f"{len(TERMINALS)} terminals of this guest are in use; it has no more")
    path, word = agent.with_name(name), secrets.token_hex(16)
    try:
        terminal = GuestTerminal(qmp.connect(path), path, taken, word.encode())
    except OSError as error:
        raise HostError(str(path), step="open a terminal", hint=str(error)) from error
    try:
        # First the connection, then the program: one that finds nobody on its line ends.
        await agents.start(agent, (TERMINAL, name, word, shlex.join(command)))
        await terminal.begin()
        terminal.resize(rows, columns)
    except BaseException:
        await terminal.__aexit__()
        raise
    return terminal
