"""Runs each allocation's Envoy as a sandbox beside its workload. What Envoy is told is the sidecar library's matter.

Owns no task: each coroutine here is run, and cancelled, by the executor. A sidecar's `run` lasts as long as its Envoy.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from agent.core.events import AllocEvent, SidecarExited, SidecarReady, StepFailed
from agent.held import SIDECAR, Held, sandbox_directory
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, Exit, HostRoot, Limits, Mount, SandboxSpec, StartError
from outrider.clock import monotonic_s
from outrider.errors import HostError, PeerError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model import job
from outrider.model.allocation import Assignment

_READY_S = 30.0
_ADMIN_S = 2.0
_DRAIN_S = 1.0  # for requests under way; a workload has its own kill timeout after it
_DRAIN_POLL_S = 0.05
_ENDED_S = 3.0

Tell = Callable[[AllocEvent], Awaitable[None]]


class Files(Protocol):
    """As sidecar.sidecars.SidecarFiles has it."""

    @property
    def directory(self) -> Path: ...
    @property
    def directory_inside(self) -> Path: ...
    @property
    def binary(self) -> Path: ...
    @property
    def binary_inside(self) -> Path: ...
    @property
    def argv(self) -> tuple[str, ...]: ...


class Library(Protocol):
    """What `agent.app` makes of the sidecar library."""

    async def add(self, assignment: Assignment, *, uid: int, local_address: str) -> Files: ...
    async def ready(self, alloc: AllocId, deadline_s: float) -> None: ...
    async def drain(self, alloc: AllocId) -> None: ...
    async def inbound_active(self, alloc: AllocId) -> int: ...
    async def remove(self, alloc: AllocId) -> None: ...


class Envoys:
    def __init__(self, *, runtime: SandboxRuntime, library: Library, tell: Tell, log: Log) -> None:
        self._runtime = runtime
        self._library = library
        self._tell = tell
        self._log = log
        self._files: dict[AllocId, Files] = {}

    async def run(self, held: Held, allocation: Path) -> None:
        """A new Envoy: ready, and then until it ends. Each is told of."""
        alloc = held.assignment.alloc
        try:
            await self._add(held)
            await self._runtime.start(self._spec(held, allocation))
        except (HostError, StartError) as error:
            await self._tell(StepFailed(alloc=alloc, message=f"the sidecar did not start: {error}"))
            return
        await self._watch(alloc, ready_s=_READY_S)

    async def adopt(self, held: Held) -> None:
        """One that runs: it reconnects by itself, and with the controller away it simply goes on."""
        alloc = held.assignment.alloc
        try:
            await self._add(held)
        except HostError as error:
            self._log.warning("sidecar not adopted", alloc=alloc, reason=str(error))
        await self._watch(alloc, ready_s=None)

    async def drain(self, alloc: AllocId) -> None:
        """Returns when the requests under way are done, or after _DRAIN_S."""
        deadline_s = monotonic_s() + _DRAIN_S
        try:
            async with asyncio.timeout(_ADMIN_S):
                await self._library.drain(alloc)
                while monotonic_s() < deadline_s and await self._library.inbound_active(alloc):  # noqa: ASYNC110
                    await asyncio.sleep(_DRAIN_POLL_S)  # Envoy tells nobody when the last request is done
        except (PeerError, TimeoutError) as error:
            self._log.info("not drained", alloc=alloc, reason=str(error))

    async def stop(self, alloc: AllocId) -> None:
        """Its own end if it comes soon, else by force. Raises HostError."""
        sandbox = _sandbox(alloc)
        if any(status.id == sandbox and status.running for status in await self._runtime.list()):
            await self._runtime.signal(sandbox, signal.SIGTERM)
            try:
                async with asyncio.timeout(_ENDED_S):
                    await self._runtime.wait(sandbox)
            except TimeoutError:
                self._log.info("sidecar lingers", alloc=alloc)
        await self._runtime.delete(sandbox)

    async def forget(self, alloc: AllocId) -> None:
        """Its sandbox is gone."""
        if self._files.pop(alloc, None) is not None:
            await self._library.remove(alloc)

    async def _add(self, held: Held) -> None:
        alloc = held.assignment.alloc
        if alloc not in self._files:
            uid = held.uids.sidecar + INNER_USER
            self._files[alloc] = await self._library.add(held.assignment, uid=uid, local_address=held.local_address)

    async def _watch(self, alloc: AllocId, *, ready_s: float | None) -> None:
        """`ready_s` None: without a deadline."""
        sandbox = _sandbox(alloc)
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(self._ended(sandbox), name=f"{sandbox}-wait")
            ready = group.create_task(self._ready(alloc, ready_s), name=f"{sandbox}-ready")
            await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ready.cancel()
            elif problem := ready.result():
                await self._runtime.signal(sandbox, signal.SIGKILL)
                await ended
                await self._tell(StepFailed(alloc=alloc, message=problem))
                return
            else:
                await self._tell(SidecarReady(alloc=alloc))
            exit_ = await ended
        self._log.warning("sidecar ended", alloc=alloc, code=exit_.code if exit_ else None)
        how = "out of memory" if exit_ and exit_.oom_killed else f"code {exit_.code}" if exit_ else "unseen"
        await self._tell(
            SidecarExited(alloc=alloc, message=f"its sidecar ended by itself ({how}) and is started again")
        )

    async def _ended(self, sandbox: str) -> Exit | None:
        try:
            return await self._runtime.wait(sandbox)
        except HostError:
            return None

    async def _ready(self, alloc: AllocId, ready_s: float | None) -> str:
        """ "", or why it is not."""
        try:
            await self._library.ready(alloc, ready_s if ready_s is not None else float("inf"))
        except PeerError as error:
            return str(error)
        return ""

    def _spec(self, held: Held, allocation: Path) -> SandboxSpec:
        alloc = held.assignment.alloc
        files = self._files[alloc]
        return SandboxSpec(
            id=_sandbox(alloc),
            argv=files.argv,
            root=HostRoot(),
            network_namespace=held.namespace,
            uid_first=held.uids.sidecar,
            limits=Limits(
                cpu_millis=job.SIDECAR.cpu_millis,
                memory_bytes=job.SIDECAR.memory_bytes,
                pids_max=job.SIDECAR.pids_max,
            ),
            directory=str(sandbox_directory(allocation, SIDECAR)),
            mounts=(
                Mount(source=str(files.directory), target=str(files.directory_inside), read_only=False),
                Mount(source=str(files.binary), target=str(files.binary_inside)),
            ),
            hostname="sidecar",
        )


def _sandbox(alloc: AllocId) -> str:
    return f"{alloc}.{SIDECAR}"
