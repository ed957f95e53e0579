"""Somebody at the serial console of a guest: one at a time, as there is one line.

Owns its connection until `wait` or `close`. Nothing is buffered here: who reads slowly slows the guest's console. What
it shows goes to the logs as well, whether or not somebody sits there.
"""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from agent import qmp
from outrider.errors import HostError, RefusedError

_READ_BYTES = 4096


class Console:
    """As a program that runs beside a workload: what the guest writes is its stdout, its code is 0."""

    def __init__(self, connection: socket.socket, path: Path, taken: set[Path]) -> None:
        self._connection = connection
        self._path = path
        self._taken = taken
        taken.add(path)

    async def read(self) -> tuple[str, bytes] | None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._connection, _READ_BYTES)
        except ConnectionError:
            return None
        return ("stdout", data) if data else None

    async def write(self, data: bytes) -> None:
        """Dropped where the guest has ended: `read` tells."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._connection, data)
        except ConnectionError:
            return

    def close_stdin(self) -> None:
        """Whoever sat there has left: `read` tells of the end."""
        with suppress(OSError):  # the guest has ended meanwhile
            self._connection.shutdown(socket.SHUT_RDWR)

    def resize(self, rows: int, columns: int) -> None:
        """A serial line has no size."""

    def kill(self) -> None:
        self._connection.close()

    async def wait(self) -> int:
        return 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._connection.close()
        self._taken.discard(self._path)


def open_console(path: Path, taken: set[Path]) -> Console:
    """`path`: the emulator's socket. Raises RefusedError where it is `taken`, HostError where nobody answers."""
    if path in taken:
        raise RefusedError("busy", "somebody sits at this console already")
    try:
        return Console(qmp.connect(path), path, taken)
    except OSError as error:
        raise HostError(str(path), step="open the console", hint=str(error)) from error
