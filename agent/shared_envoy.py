"""The node's one Envoy for all allocations with `sidecar: shared`: begun with the first of them, ended with the last.

A sandbox of the node's own, in the namespace on which their networks hang. Task: one that waits for its end.
"""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.held import SHARED_SIDECAR
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import Exit, Limits
from agent.spares import ENVOY_ENDS_S, Files, sidecar_sandbox
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.job import MIB, Value

# A bound of damage: what allocations reserve for their shares is not known when it starts.
_LIMITS = Limits(cpu_millis=500, memory_bytes=1024 * MIB, pids_max=256)


class Shared(Value, frozen=True, kw_only=True):
    """What is the node's for it: a directory of its sandbox's own, and a range of uids."""

    directory: Path
    uid_first: int


class SharedEnvoy:
    def __init__(
        self,
        place: Shared,
        *,
        runtime: SandboxRuntime,
        namespace: str,
        ended: Callable[[], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`namespace`: made with the first network that hangs on it. `ended` is called once its sandbox is gone and
        nobody has it."""
        self.place = place
        self._runtime = runtime
        self._namespace = namespace
        self._ended = ended
        self._tasks = tasks
        self._turn = asyncio.Lock()
        self._holders: set[AllocId] = set()
        self._end: asyncio.Task[Exit | None] | None = None

    def holds(self, alloc: AllocId) -> bool:
        return alloc in self._holders

    async def runs(self) -> bool:
        return any(status.id == SHARED_SIDECAR and status.running for status in await self._runtime.list())

    async def take_over(self, holders: Iterable[AllocId]) -> None:
        """At the agent's beginning: whose it was. One that nobody has any more ends. Raises HostError."""
        self._holders |= set(holders)
        async with self._turn:
            await self._end_unless_held()

    async def hold(self, alloc: AllocId, files: Files) -> "asyncio.Task[Exit | None]":
        """It runs when this returns, and what is returned is done once it has ended: nobody's to cancel.

        Raises HostError, StartError.
        """
        self._holders.add(alloc)
        async with self._turn:
            if not await self.runs():
                place = self.place
                spec = sidecar_sandbox(
                    SHARED_SIDECAR, files, self._namespace, place.uid_first, place.directory, limits=_LIMITS
                )
                await self._runtime.start(spec)
                self._end = None
            if self._end is None:
                self._end = self._tasks.create_task(
                    envoy_end(self._runtime, SHARED_SIDECAR), name=f"{SHARED_SIDECAR}-wait"
                )
            return self._end

    async def release(self, alloc: AllocId) -> None:
        """Does nothing for one that does not hold it. Raises HostError."""
        if alloc in self._holders:
            async with self._turn:
                self._holders.discard(alloc)
                await self._end_unless_held()

    async def _end_unless_held(self) -> None:
        if self._holders:
            return
        await self._runtime.end(SHARED_SIDECAR, within_s=ENVOY_ENDS_S)
        self._ended()


async def envoy_end(runtime: SandboxRuntime, sandbox: str) -> Exit | None:
    """Once it has come; None where the sandbox was deleted."""
    try:
        return await runtime.wait(sandbox)
    except HostError:
        return None
