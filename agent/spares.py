"""The spare sidecar: one Envoy of this node that has started and serves nobody, for the next allocation to take.

To start an Envoy takes more time than all else that a meshed workload waits for. A node that has sidecars keeps one
more; with the last of them it goes. Owns its sandbox, namespace, uids and files until `take` gives them away, by their
renaming; what a killed agent left of it, `sweep` removes. Task: `run`.
"""

import asyncio
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from agent.held import SIDECAR
from agent.network.namespaces import AllocationNetworks
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, HostRoot, Limits, Mount, SandboxSpec, StartError
from agent.uids import Uids
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.job import SIDECAR as SIDECAR_RESOURCES
from outrider.model.job import Value

_QUIET_S = 0.3  # without another sidecar getting ready: workloads that start now have the processors first
_KEPT_S = 10.0  # at least, for a node without any sidecar now
_PREFIX = "spare"
ENVOY_ENDS_S = 3.0  # after SIGTERM
_LIMITS = Limits(
    cpu_millis=SIDECAR_RESOURCES.cpu_millis,
    memory_bytes=SIDECAR_RESOURCES.memory_bytes,
    pids_max=SIDECAR_RESOURCES.pids_max,
)


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
    async def add_spare(self, name: AllocId, *, uid: int) -> Files: ...
    def give(self, name: AllocId, to: AllocId) -> None: ...
    async def ready(self, alloc: AllocId, deadline_s: float) -> None: ...
    async def drain(self, alloc: AllocId) -> None: ...
    async def inbound_active(self, alloc: AllocId) -> int: ...
    async def inbound_busy(self, alloc: AllocId) -> int: ...
    def await_shares(self, allocs: Iterable[AllocId]) -> None: ...
    def shared_ended(self) -> None: ...
    def log_mark(self, alloc: AllocId) -> bytes: ...
    async def remove(self, alloc: AllocId) -> None: ...


class Spare(Value, frozen=True, kw_only=True):
    """What a taken one brings: its namespace is reserved under `name`, its uids begin at `uid_first`."""

    name: AllocId
    uid_first: int


class Spares:
    """`directory`: for spares' own directories, beside the allocations'. `in_use`: whether the node has any sidecar."""

    def __init__(
        self,
        *,
        directory: Path,
        runtime: SandboxRuntime,
        networks: AllocationNetworks,
        uids: Uids,
        library: Library,
        in_use: Callable[[], bool],
        log: Log,
    ) -> None:
        self._directory = directory
        self._runtime = runtime
        self._networks = networks
        self._uids = uids
        self._library = library
        self._in_use = in_use
        self._log = log
        self._spare: Spare | None = None
        self._given: Spare | None = None  # the last one that was taken
        self._wanted = asyncio.Event()
        self._gone = asyncio.Event()  # from here: taken, or not to be had

    async def sweep(self) -> None:
        """At an agent's start: what an earlier one kept spare. Links are of those that were taken."""
        for path in self._directory.glob(f"{_PREFIX}-*"):
            name = AllocId(path.name)
            await self._runtime.delete(_sandbox(name))
            await self._library.remove(name)
            await self._networks.delete(name)
            if not path.is_symlink():
                shutil.rmtree(path)
            elif not path.exists():
                path.unlink()

    def want(self) -> None:
        """A sidecar serves: the next one may soon be asked for."""
        self._wanted.set()

    def take(self, alloc: AllocId, directory: Path) -> Spare | None:
        """The spare, if there is one, as the sidecar of `alloc`; `directory` becomes its sandbox's."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        self._gone.set()
        try:
            directory.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            # Files first: an Envoy whose files are another's would wait for ever after a kill of this agent.
            self._library.give(spare.name, alloc)
            self._runtime.rename(_sandbox(spare.name), f"{alloc}.{SIDECAR}", str(directory))
        except (HostError, OSError) as error:
            self._log.warning("spare sidecar not taken", alloc=alloc, reason=str(error))
            return None
        self._given = spare
        return spare

    async def run(self) -> None:
        """Until cancelled: makes one whenever it is wanted, removes it where it is not."""
        while True:
            await self._wanted.wait()
            await self._quiet()
            try:
                self._spare = spare = await self._make()
            except (HostError, StartError, OSError) as error:
                self._log.warning("no spare sidecar", reason=str(error))
                continue
            try:
                await self._kept(spare)
            finally:
                self._spare = None
                if self._given is not spare:
                    await self._remove(spare)

    async def _quiet(self) -> None:
        with suppress(TimeoutError):
            while True:
                self._wanted.clear()
                async with asyncio.timeout(_QUIET_S):
                    await self._wanted.wait()

    async def _kept(self, spare: Spare) -> None:
        """Returns once it is taken, or ended, or of no use."""
        self._gone.clear()
        ended = asyncio.create_task(self._runtime.wait(_sandbox(spare.name)), name=f"{spare.name}-ended")
        gone = asyncio.create_task(self._gone.wait(), name=f"{spare.name}-gone")
        done: set[asyncio.Task[object]] = set()
        try:
            while not done:
                done, _ = await asyncio.wait({ended, gone}, timeout=_KEPT_S, return_when=asyncio.FIRST_COMPLETED)
                if not self._in_use():
                    return
        finally:
            ended.cancel()
            gone.cancel()
            await asyncio.wait({ended, gone})

    async def _make(self) -> Spare:
        name = AllocId(f"{_PREFIX}-{secrets.token_hex(3)}")  # a link's name has 15 characters
        spare = Spare(name=name, uid_first=self._uids.reserve())
        directory = self._directory / name
        try:
            directory.mkdir(mode=0o711, parents=True)
            namespace = await self._networks.reserve(name)
            files = await self._library.add_spare(name, uid=spare.uid_first + INNER_USER)
            spec = sidecar_sandbox(_sandbox(name), files, namespace, spare.uid_first, directory)
            await self._runtime.start(spec)
        except BaseException:
            await self._remove(spare)
            raise
        return spare

    async def _remove(self, spare: Spare) -> None:
        try:
            await self._runtime.delete(_sandbox(spare.name))
            await self._library.remove(spare.name)
            await self._networks.delete(spare.name)
            shutil.rmtree(self._directory / spare.name, ignore_errors=True)
        except (HostError, OSError) as error:
            self._log.warning("spare sidecar not removed", reason=str(error))
        self._uids.free(spare.uid_first)


def sidecar_sandbox(
    id_: str, files: Files, network_namespace: str, uid_first: int, directory: Path, *, limits: Limits = _LIMITS
) -> SandboxSpec:
    """The sandbox of any Envoy of this node."""
    return SandboxSpec(
        id=id_,
        argv=files.argv,
        root=HostRoot(),
        network_namespace=network_namespace,
        uid_first=uid_first,
        limits=limits,
        directory=str(directory),
        mounts=(
            Mount(source=str(files.directory), target=str(files.directory_inside), read_only=False),
            Mount(source=str(files.binary), target=str(files.binary_inside)),
        ),
        hostname="sidecar",
    )


def _sandbox(name: AllocId) -> str:
    return f"node.{name}"
