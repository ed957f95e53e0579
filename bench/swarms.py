"""A fleet of simulated agents in processes of their own: they take no turns with what measures them.

Owns the processes. Their clock is the host's monotonic one, and so everybody's.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Self

AGENTS_MAX = 2500  # of one process
_ANSWER_BYTES_MAX = 256 * 1024 * 1024
_TICKS = os.sysconf("SC_CLK_TCK")


class Swarms:
    """`async with`: all of them dial at once, and go on until the end of the block."""

    def __init__(self, ca: Path, cluster: str, target: str, size: int) -> None:
        self._words = ("-m", "bench.swarm", str(ca), cluster, target)
        self._parts = [(first, min(AGENTS_MAX, size - first)) for first in range(0, size, AGENTS_MAX)]
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        for first, count in self._parts:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._words,
                str(first),
                str(count),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_ANSWER_BYTES_MAX,
            )
            self._processes.append(process)
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            await process.wait()

    def cpu_s(self) -> float:
        """What the agents took so far."""
        return sum(cpu_s(process.pid) for process in self._processes)

    async def clear(self) -> None:
        await self._ask("clear")

    async def assigned(self) -> int:
        return sum(await self._ask("count"))

    async def told(self) -> tuple[list[float], list[float]]:
        """Of every heartbeat that was answered how long that took; of every assignment when it came."""
        answers = await self._ask("tell")
        return [one for echoes, _ in answers for one in echoes], [one for _, times in answers for one in times]

    async def _ask(self, word: str) -> list[Any]:
        return list(await asyncio.gather(*(_ask_one(process, word) for process in self._processes)))


async def _ask_one(process: asyncio.subprocess.Process, word: str) -> object:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n".encode())
    await process.stdin.drain()
    answer = await process.stdout.readline()
    if not answer:
        raise RuntimeError("a process of simulated agents ended")
    found: object = json.loads(answer)
    return found


def cpu_s(process: int) -> float:
    """Of all threads so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
