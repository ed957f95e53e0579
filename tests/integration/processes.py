"""Processes, ports and conditions for tests: real programs on loopback, ended by their own handle."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

DEADLINE_S = 20.0


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Wait for `condition`; `what` is named where it does not come."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)


def comm(pid: int) -> str:
    """The name of a process; "" for one that has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def listening(port: int) -> None:
    async def answers() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    await until(answers, f"127.0.0.1:{port} listens")


@contextlib.asynccontextmanager
async def program(*command: str | Path, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `command` with its output in `log`; killed at the end where it still runs."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            await process.wait()
