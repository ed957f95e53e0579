"""Runs each allocation's Envoy as a sandbox beside its workload, or has it served by the node's shared one. What Envoy
is told is the sidecar library's matter.

Where one is spare (see `spares`), it is taken instead of started. Owns no task: each coroutine here is run, and
cancelled, by the executor. A sidecar's `run` lasts as long as its Envoy.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from agent.core.events import AllocEvent, SidecarExited, SidecarReady, StepFailed
from agent.held import SIDECAR, Held, sandbox_directory
from agent.network.namespaces import AllocationNetworks
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, Exit, StartError
from agent.shared_envoy import Shared, SharedEnvoy, envoy_end
from agent.spares import ENVOY_ENDS_S, Files, Library, Spare, Spares, sidecar_sandbox
from outrider.clock import monotonic_s
from outrider.errors import HostError, PeerError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.mesh import shares_sidecar

_READY_S = 30.0
_ADMIN_S = 2.0
_DRAIN_S = 1.0  # for requests under way; a workload has its own kill timeout after it
_DRAIN_POLL_S = 0.05

Tell = Callable[[AllocEvent], Awaitable[None]]


class Envoys:
    def __init__(
        self,
        *,
        runtime: SandboxRuntime,
        networks: AllocationNetworks,
        library: Library,
        shared: Shared,
        spares: Spares,
        tell: Tell,
        tasks: asyncio.TaskGroup,
        log: Log,
    ) -> None:
        self._runtime = runtime
        self._library = library
        self._shared = SharedEnvoy(
            shared,
            runtime=runtime,
            namespace=networks.shared_namespace,
            ended=library.shared_ended,
            tasks=tasks,
        )
        self._spares = spares
        self._networks = networks
        self._tell = tell
        self._log = log
        self._files: dict[AllocId, Files] = {}
        self._taken: set[AllocId] = set()  # whose Envoy runs before it is asked for

    def take_spare(self, alloc: AllocId, allocation: Path) -> Spare | None:
        """For an allocation of which nothing is there yet, and that wants a sidecar."""
        spare = self._spares.take(alloc, sandbox_directory(allocation, SIDECAR))
        if spare is not None:
            self._taken.add(alloc)
        return spare

    async def take_over(self, shares: Collection[AllocId]) -> None:
        """At the agent's beginning: the allocations that hang on the shared Envoy. Raises HostError."""
        self._library.await_shares(shares)
        await self._shared.take_over(shares)

    def shared_log(self, alloc: AllocId) -> tuple[Path, bytes] | None:
        """Of one on the shared Envoy: its sandbox's directory, and what the lines of its log have that are its own."""
        return (self._shared.place.directory, self._library.log_mark(alloc)) if self._shared.holds(alloc) else None

    async def run(self, held: Held, allocation: Path) -> None:
        """A new Envoy, or a share of the one that there is: ready, and then until it ends. Each is told of."""
        alloc = held.assignment.alloc
        shared = None
        try:
            files = await self._add(held)
            if shares_sidecar(held.assignment.group):
                shared = await self._shared.hold(alloc, files)
            elif alloc in self._taken:
                self._taken.remove(alloc)
            else:
                directory = sandbox_directory(allocation, SIDECAR)
                spec = sidecar_sandbox(_sandbox(alloc), files, held.namespace, held.uids.sidecar, directory)
                await self._runtime.start(spec)
        except (HostError, StartError) as error:
            await self._tell(StepFailed(alloc=alloc, message=f"the sidecar did not start: {error}"))
            return
        await self._watch(alloc, shared, ready_s=_READY_S)

    async def adopt(self, held: Held) -> None:
        """One that runs: it reconnects by itself, and with the controller away it simply goes on."""
        alloc = held.assignment.alloc
        shared = None
        try:
            files = await self._add(held)
            if shares_sidecar(held.assignment.group):
                shared = await self._shared.hold(alloc, files)
        except (HostError, StartError) as error:
            self._log.warning("sidecar not adopted", alloc=alloc, reason=str(error))
        await self._watch(alloc, shared, ready_s=None)

    async def drain(self, alloc: AllocId) -> None:
        """Returns when the requests under way are done, or after _DRAIN_S."""
        deadline_s = monotonic_s() + _DRAIN_S
        shared = self._shared.holds(alloc)
        # A shared Envoy has no word for one allocation's callers: what they keep open without use is not waited for.
        active = self._library.inbound_busy if shared else self._library.inbound_active
        try:
            async with asyncio.timeout(_ADMIN_S):
                await (self._networks.close_entrances(alloc) if shared else self._library.drain(alloc))
                while monotonic_s() < deadline_s and await active(alloc):  # noqa: ASYNC110
                    await asyncio.sleep(_DRAIN_POLL_S)  # Envoy tells nobody when the last request is done
        except (PeerError, HostError, TimeoutError) as error:
            self._log.info("not drained", alloc=alloc, reason=str(error))

    async def stop(self, alloc: AllocId) -> None:
        """Its own end if it comes soon, else by force; a shared Envoy lets go of it. Raises HostError."""
        if self._shared.holds(alloc):
            await self.forget(alloc)
            return
        await self._runtime.end(_sandbox(alloc), within_s=ENVOY_ENDS_S)

    async def forget(self, alloc: AllocId) -> None:
        """Its sandbox is gone, or the allocation leaves the shared one. Raises HostError."""
        self._taken.discard(alloc)
        self._files.pop(alloc, None)
        await self._library.remove(alloc)
        await self._shared.release(alloc)

    async def _add(self, held: Held) -> Files:
        alloc = held.assignment.alloc
        files = self._files.get(alloc)
        if files is None:
            uid_first = self._shared.place.uid_first if shares_sidecar(held.assignment.group) else held.uids.sidecar
            uid = uid_first + INNER_USER
            files = await self._library.add(held.assignment, uid=uid, local_address=held.local_address)
            self._files[alloc] = files
        return files

    async def _watch(
        self, alloc: AllocId, shared: "asyncio.Task[Exit | None] | None", *, ready_s: float | None
    ) -> None:
        """`shared`: the end of the Envoy that is not its own. `ready_s` None: without a deadline."""
        sandbox = _sandbox(alloc)
        async with asyncio.TaskGroup() as group:
            ending = envoy_end(self._runtime, sandbox) if shared is None else _outcome(shared)
            ended = group.create_task(ending, name=f"{sandbox}-wait")
            ready = group.create_task(self._ready(alloc, ready_s), name=f"{sandbox}-ready")
            await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ready.cancel()
            elif problem := ready.result():
                if shared is None:
                    await self._runtime.signal(sandbox, signal.SIGKILL)
                    await ended
                ended.cancel()
                await self._tell(StepFailed(alloc=alloc, message=problem))
                return
            else:
                await self._tell(SidecarReady(alloc=alloc))
                if shared is None:
                    self._spares.want()
            exit_ = await ended
        self._log.warning("sidecar ended", alloc=alloc, code=exit_.code if exit_ else None)
        how = "out of memory" if exit_ and exit_.oom_killed else f"code {exit_.code}" if exit_ else "unseen"
        what = "its sidecar" if shared is None else "the node's shared sidecar"
        await self._tell(SidecarExited(alloc=alloc, message=f"{what} ended by itself ({how}) and is started again"))

    async def _ready(self, alloc: AllocId, ready_s: float | None) -> str:
        """ "", or why it is not."""
        try:
            await self._library.ready(alloc, ready_s if ready_s is not None else float("inf"))
        except PeerError as error:
            return str(error)
        return ""


async def _outcome(ending: "asyncio.Task[Exit | None]") -> Exit | None:
    """Whoever waits may stop to; others wait too."""
    return await asyncio.shield(ending)


def _sandbox(alloc: AllocId) -> str:
    return f"{alloc}.{SIDECAR}"
