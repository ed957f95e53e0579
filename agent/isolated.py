"""What is done from outside to a process with a kernel of its own while it runs: signals, and files that changed.

Each is a program that the guest's agent runs; the guest's init brought it. Owns nothing, starts no task.
"""

from collections.abc import Callable
from pathlib import Path

from qemu.qmp import ExecuteError

from agent.drivers.microvm import RENEW, to_workload
from agent.drivers.vm import AGENT
from agent.held import sandbox_directory
from agent.qmp.guest_agent import GuestAgents
from agent.vms import guest_directory
from outrider.errors import HostError, RefusedError
from outrider.ids import AllocId, TaskName


class IsolatedProcesses:
    """`allocation`: where this node keeps one's files. Everything raises HostError where it could not be done."""

    def __init__(self, *, agents: GuestAgents, allocation: Callable[[AllocId], Path]) -> None:
        self._agents = agents
        self._allocation = allocation

    async def signal(self, alloc: AllocId, task: TaskName, number: int) -> None:
        await self._run(alloc, task, ("/bin/sh", "-c", to_workload(number)))

    async def replace(self, alloc: AllocId, task: TaskName, path: str, content: bytes) -> None:
        """`path`: "secrets/NAME" or "templates/NAME"."""
        await self._run(alloc, task, (RENEW, path), given=content)

    async def _run(self, alloc: AllocId, task: TaskName, argv: tuple[str, ...], *, given: bytes = b"") -> None:
        line = guest_directory(sandbox_directory(self._allocation(alloc), task)) / AGENT
        try:
            code = await (await self._agents.start(line, argv, given=given)).wait()
        except (RefusedError, ExecuteError) as error:
            raise HostError(f"guest of {alloc}", step=f"{argv[0]}: {error}") from error
        if code != 0:
            raise HostError(f"guest of {alloc}", step=f"{argv[0]} ended with {code}")
