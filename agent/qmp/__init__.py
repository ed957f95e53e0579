"""Speaks with an emulator through its control socket, one connection for each conversation. Owns nothing beyond it.

The socket lies in a directory that the emulator may write: a path there is looked at before it is used, as an
emulator that a guest has taken over could have put a link to another socket of the host in its place.
"""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from outrider.errors import HostError

_DEADLINE_S = 5.0


async def power_down(path: Path) -> None:
    """Press the guest's power button: it may take its time, or take no notice. Raises HostError."""
    async with _conversation(path) as client:
        await client.execute("system_powerdown")


async def status(path: Path) -> str:
    """ "running", "paused", "shutdown" ...: QEMU's RunState. Raises HostError."""
    async with _conversation(path) as client:
        answer = await client.execute("query-status")
    return str(answer["status"]) if isinstance(answer, dict) else ""


def connect(path: Path) -> socket.socket:
    """A connection to the very socket at `path`, never to what a link there leads to. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no socket")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # By its descriptor: it cannot be exchanged any more, and no path is too long for an address.
            connection.connect(f"/proc/self/fd/{descriptor}")
        except OSError:
            connection.close()
            raise
        return connection
    finally:
        os.close(descriptor)


@asynccontextmanager
async def _conversation(path: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient()
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await client.connect(connect(path))
            try:
                yield client
            finally:
                await client.disconnect()
    except (OSError, EOFError, QMPError) as error:  # TimeoutError is an OSError
        reason = str(error) or f"no answer within {_DEADLINE_S:g} s"
        raise HostError(f"emulator at {path}", step=reason) from error
