"""What an agent finds when it starts: records on disk, sandboxes and networks on the host. Changes only what is in
nobody's use: starts that were cut short, networks without any sandbox.
"""

from collections.abc import Iterable

from agent.core.events import AllocRecord, Found, FoundTask, TaskExit
from agent.held import SHARED_SIDECAR, SIDECAR, sandbox_directory, split, task_exit
from agent.network.namespaces import AllocationNetwork, AllocationNetworks
from agent.sandbox.runtime import SandboxRuntime
from agent.store import Store
from outrider.errors import HostError
from outrider.ids import AllocId, TaskName
from outrider.log import Log


class Discovery:
    """`networks`: of the allocations found, by id."""

    def __init__(self, *, store: Store, runtime: SandboxRuntime, networks: AllocationNetworks, log: Log) -> None:
        self._store = store
        self._runtime = runtime
        self._networks = networks
        self._log = log
        self.networks: dict[AllocId, AllocationNetwork] = {}

    async def find(self, records: Iterable[AllocRecord]) -> tuple[Found, ...]:
        """Every allocation there is anything left of."""
        by_alloc = {record.assignment.alloc: record for record in records}
        statuses = await self._runtime.list()
        await self._runtime.reap([status.id for status in statuses])
        sandboxes: dict[AllocId, dict[TaskName, FoundTask]] = {}
        sidecars: set[AllocId] = set()
        shared_runs = any(status.id == SHARED_SIDECAR and status.running for status in statuses)
        for status in statuses:
            named = split(status.id)
            if named is None:
                continue
            alloc, task = named
            if task == SIDECAR:
                sidecars |= {alloc} if status.running else set()
                sandboxes.setdefault(alloc, {})
                continue
            exit_ = None if status.running else await self._exit(alloc, task, status.id)
            found = FoundTask(exit=exit_, started_at_s=status.started_at_s)
            sandboxes.setdefault(alloc, {})[task] = found
        await self._find_networks(by_alloc.keys() | sandboxes.keys())
        return tuple(
            Found(
                alloc=alloc,
                record=by_alloc.get(alloc),
                local_address=self.networks[alloc].local_address if alloc in self.networks else None,
                sidecar=alloc in sidecars or (shared_runs and self._shares(alloc)),
                tasks=sandboxes.get(alloc, {}),
            )
            for alloc in sorted(by_alloc.keys() | sandboxes.keys())
        )

    def _shares(self, alloc: AllocId) -> bool:
        return alloc in self.networks and self.networks[alloc].shared

    async def _find_networks(self, known: set[AllocId]) -> None:
        for network in await self._networks.list():
            if network.alloc in known:
                self.networks[network.alloc] = network
        gone = await self._networks.reap(self.networks)
        if gone:
            self._log.info("networks removed", allocs=" ".join(gone))

    async def _exit(self, alloc: AllocId, task: TaskName, sandbox: str) -> TaskExit:
        directory = sandbox_directory(self._store.allocation_directory(alloc), task)
        try:
            return await task_exit(self._runtime, sandbox, directory)
        except HostError as error:
            self._log.warning("exit unseen", alloc=alloc, task=task, reason=str(error))
            return TaskExit()
