"""Speaks with an emulator through its control socket, one connection for each conversation. Owns nothing beyond it.

The socket lies in a directory that the emulator may write: a path there is looked at before it is used, as an
emulator that a guest has taken over could have put a link to another socket of the host in its place.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qemu.qmp import QMPClient, QMPError, Runstate

from outrider.errors import HostError

_DEADLINE_S = 5.0
_STATE_S = 120.0  # to write or read a guest's memory
_START_S = 20.0  # a host under load
POLL_S = 0.005
# What a conversation may end with, whatever the other side says. The library asserts that the connection still stands
# where it has just found that it does not, and leaves what json raises of numbers and depths without limit as it is.
BROKEN = (OSError, EOFError, QMPError, AssertionError, ValueError, RecursionError)
# All of it is raised; the library also logs it, with the words of a guest, as often as that likes.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
NO_LIMIT = 1 << 40  # bytes a second: what is written is a file, or paced by who reads


async def power_down(path: Path) -> None:
    """Press the guest's power button: it may take its time, or take no notice. Raises HostError."""
    async with conversation(path) as client:
        await client.execute("system_powerdown")


async def status(path: Path) -> str:
    """ "running", "paused", "shutdown" ...: QEMU's RunState. Raises HostError."""
    async with conversation(path) as client:
        return await run_state(client)


async def version(path: Path) -> str:
    """Of the emulator that runs: "7.2.22". Raises HostError."""
    async with conversation(path) as client:
        return await emulator_version(client)


async def save(path: Path, memory: int) -> None:
    """Pauses the guest and writes its memory and devices to the descriptor `memory`; its disk is settled by then.

    It stays paused until `resume`, also where this fails. Raises HostError.
    """
    async with conversation(path, _STATE_S) as client:
        await client.execute("stop")
        await client.execute("migrate-set-parameters", {"max-bandwidth": NO_LIMIT})
        await give(client, "state", memory)
        await client.execute("migrate", {"uri": "fd:state"})
        while (answer := await migration(client))["status"] != "completed":
            if answer["status"] in ("failed", "cancelled"):
                raise HostError(f"emulator at {path}", step=f"save: {answer.get('error-desc', answer['status'])}")
            await asyncio.sleep(POLL_S)


async def load(path: Path, memory: int) -> None:
    """What `save` wrote, into an emulator that was started to wait for it; the guest then runs. Raises HostError."""
    await listening(path)
    async with conversation(path, _STATE_S) as client:
        await give(client, "state", memory)
        await client.execute("migrate-incoming", {"uri": "fd:state"})
        while await run_state(client) == "inmigrate":  # noqa: ASYNC110 - an emulator's, whose state is asked for
            await asyncio.sleep(POLL_S)
        await client.execute("cont")


async def listening(path: Path) -> None:
    """An emulator that was just started opens its socket. Raises HostError where it does not."""
    try:
        async with asyncio.timeout(_START_S):
            while True:
                with suppress(OSError):
                    connect(path).close()
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise HostError(f"emulator at {path}", step=f"not listening within {_START_S:g} s") from error


async def resume(path: Path) -> None:
    """Let a paused guest run, and give up what it was paused for. Raises HostError."""
    async with conversation(path) as client:
        if await run_state(client) != "running":
            await client.execute("migrate_cancel")
            await client.execute("cont")


async def emulator_version(client: QMPClient) -> str:
    answer = await client.execute("query-version")
    numbers = answer.get("qemu") if isinstance(answer, dict) else None
    parts = ("major", "minor", "micro")
    return ".".join(str(numbers.get(part, "")) for part in parts) if isinstance(numbers, dict) else ""


async def run_state(client: QMPClient) -> str:
    answer = await client.execute("query-status")
    return str(answer.get("status", "")) if isinstance(answer, dict) else ""


async def migration(client: QMPClient) -> dict[str, object]:
    answer = await client.execute("query-migrate")
    return {"status": "none", **answer} if isinstance(answer, dict) else {"status": "none"}


async def give(client: QMPClient, name: str, descriptor: int) -> None:
    client.send_fd_scm(descriptor)
    await client.execute("getfd", {"fdname": name})


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


async def hang_up(client: QMPClient) -> None:
    """Also where the connection broke while it was made: the library may have left that open."""
    if client.runstate is not Runstate.IDLE:
        await client.disconnect()


@asynccontextmanager
async def conversation(path: Path, deadline_s: float = _DEADLINE_S) -> AsyncIterator[QMPClient]:
    """The one that speaks with the emulator: it listens to nobody else meanwhile. Raises HostError."""
    client = QMPClient()
    try:
        async with asyncio.timeout(deadline_s):
            try:
                await client.connect(connect(path))
                yield client
            finally:
                await hang_up(client)
    except BROKEN as error:  # TimeoutError is an OSError
        reason = str(error) or f"no answer within {deadline_s:g} s"
        raise HostError(f"emulator at {path}", step=reason) from error
