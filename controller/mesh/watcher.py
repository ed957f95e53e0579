"""Watches the catalog: endpoints of the services that somebody calls, intentions, trust roots.

Tasks: `mesh-intentions`, `mesh-roots`, `mesh-KIND` for each kind of config entry, one `mesh-watch-SERVICE` for each of
the first 150 services (Consul refuses more than 200 blocking queries from one address), and `mesh-poll` for the rest,
each asked every two seconds. No queue.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from controller.entries import TRAFFIC_KINDS, Entry
from controller.mesh.backoff import Backoff
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.shapes import ConsulIntention, ConsulRoots, HealthRow
from outrider.errors import PeerError, RefusedError
from outrider.ids import ServiceName
from outrider.log import Log

WATCHES_MAX = 150
POLL_S = 2.0


class Watcher:
    """Tells its listener what it sees. `set_services` says whose endpoints matter."""

    def __init__(
        self,
        consul: ConsulAdapter,
        log: Log,
        *,
        saw_service: Callable[[ServiceName, list[HealthRow]], None],
        forgot_service: Callable[[ServiceName], None],
        saw_intentions: Callable[[list[ConsulIntention]], None],
        saw_roots: Callable[[ConsulRoots], None],
        saw_entries: Callable[[str, list[Entry]], None],
        answered: Callable[[bool], None],
    ) -> None:
        self._consul, self._log = consul, log
        self._saw_service, self._saw_intentions, self._saw_roots = saw_service, saw_intentions, saw_roots
        self._saw_entries = saw_entries
        self._forgot_service, self._answered = forgot_service, answered
        self.wanted: frozenset[ServiceName] = frozenset()
        self._taken_up: frozenset[ServiceName] = frozenset()  # of what was wanted
        self._changed = asyncio.Event()
        self._watches: dict[ServiceName, asyncio.Task[None]] = {}

    def set_services(self, services: Iterable[ServiceName]) -> None:
        wanted = frozenset(services)
        if wanted != self.wanted:
            self.wanted = wanted
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled. Survives Consul being away."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(self._intentions), name="mesh-intentions")
            group.create_task(self._watch(self._roots), name="mesh-roots")
            for kind in TRAFFIC_KINDS:
                group.create_task(self._watch(self._entries(kind)), name=f"mesh-{kind}")
            group.create_task(self._poll(), name="mesh-poll")
            while True:
                self._adjust(group)
                await self._changed.wait()
                self._changed.clear()

    def _adjust(self, group: asyncio.TaskGroup) -> None:
        for service in self._watches.keys() - self.wanted:
            self._watches.pop(service).cancel()
        for service in self._taken_up - self.wanted:
            self._forgot_service(service)
        self._taken_up = self.wanted
        free = WATCHES_MAX - len(self._watches)
        for service in sorted(self.wanted - self._watches.keys())[:free]:
            watch = self._watch(self._service(service))
            self._watches[service] = group.create_task(watch, name=f"mesh-watch-{service}")

    def _service(self, service: ServiceName) -> Callable[[int], Awaitable[int]]:
        async def watch(index: int) -> int:
            index, rows = await self._consul.watch_connect(service, index)
            self._saw_service(service, rows)
            return index

        return watch

    def _entries(self, kind: str) -> Callable[[int], Awaitable[int]]:
        async def watch(index: int) -> int:
            index, found = await self._consul.watch_entries(kind, index)
            self._saw_entries(kind, found)
            return index

        return watch

    async def _intentions(self, index: int) -> int:
        index, found = await self._consul.watch_intentions(index)
        self._saw_intentions(found)
        return index

    async def _roots(self, index: int) -> int:
        if not self._consul.datacenter:
            await self._consul.probe()  # what the roots are for is named after it
        index, found = await self._consul.watch_roots(index)
        self._saw_roots(found)
        return index

    async def _watch(self, step: Callable[[int], Awaitable[int]]) -> None:
        """`step` after `step`, each with the index of the one before."""
        index, backoff = 0, Backoff()
        while True:
            try:
                index = await step(index)
            except (PeerError, RefusedError) as error:
                index = 0  # Consul may come back with another history
                self._answered(False)
                self._log.debug("watch failed", error=error)
                await backoff.pause()
            else:
                self._answered(True)
                backoff.reset()

    async def _poll(self) -> None:
        """The services beyond the bound, one after the other: later news, never none."""
        while True:
            rest = sorted(self.wanted - self._watches.keys())
            for service in rest:
                try:
                    _, rows = await self._consul.watch_connect(service, 0)
                except (PeerError, RefusedError) as error:
                    self._log.debug("poll failed", service=service, error=error)
                else:
                    if service in self.wanted:
                        self._saw_service(service, rows)
            await asyncio.sleep(POLL_S)
