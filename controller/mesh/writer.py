"""Writes the catalog: what it has becomes what it should have (anti-entropy). Only while this controller leads.

Owns what is wanted, what is known, and the order of transactions; `Mesh` runs it and owns the tasks. Level-triggered:
setting the wanted state is cheap and final, however often Consul fails meanwhile.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from controller.core.mesh_intent import NodeRegistration, OwnedIntention
from controller.entries import TRAFFIC_KINDS, Entry
from controller.mesh.concurrency import each
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.fence import Fence
from controller.mesh.intentions import plan_owned
from controller.mesh.known import Known, registers
from controller.mesh.leader import Lock
from controller.mesh.owned_entries import plan_entries
from controller.mesh.registrations import (
    CLUSTER_META,
    NodeRecord,
    batches,
    consul_node,
    found_record,
    operations,
    wanted_record,
)
from controller.mesh.shapes import CatalogNodeServices, ConsulCheck, ConsulService, HealthRow, Registration, Txn
from outrider.errors import PeerError, RefusedError
from outrider.ids import NodeId, ServiceName
from outrider.log import Log

SWEEP_S = 30.0  # how often everything is compared, beside what the watches show
_RETRY_S = 5.0  # after Consul refused one node's registration
_DOUBT_S = 5.0  # after a watch showed something unexpected of a node that was just being written
_REQUESTS_AT_ONCE = 8
_RECORDS_AT_ONCE = 100  # compared in one go; then others have their turn


class Writer:
    """`changed` is called when what the catalog is known to have has changed."""

    def __init__(self, consul: ConsulAdapter, cluster: str, lock: Lock, log: Log) -> None:
        self._consul, self._cluster, self._log = consul, cluster, log
        self.leadership = lock
        self.fence = Fence(consul, lock)
        self.wake = asyncio.Event()
        self.changed: Callable[[], None] = lambda: None
        self._registrations: dict[str, NodeRegistration] = {}  # by Consul's node name
        self._addresses: Mapping[ServiceName, str] = {}
        self._owned: tuple[OwnedIntention, ...] | None = None  # None: nobody has said yet
        self._owned_dirty = False
        self._entries: tuple[Entry, ...] | None = None  # as `_owned`
        self._entries_dirty = False
        self._known = Known(cluster)
        self._dirty: set[str] = set()
        self._suspect: set[str] = set()  # to be read again before they are compared
        self._writing: dict[str, NodeRecord | None] = {}
        self._retry_at_s: dict[str, float] = {}
        self._doubt_at_s: dict[str, float] = {}
        self._sweep_at_s = 0.0

    def set_node(self, registration: NodeRegistration) -> None:
        name = consul_node(self._cluster, registration.node)
        if self._registrations.get(name) != registration:
            self._registrations[name] = registration
            self._touch(name)

    def remove_node(self, node: NodeId) -> None:
        name = consul_node(self._cluster, node)
        if self._registrations.pop(name, None) is not None:
            self._touch(name)

    def set_addresses(self, addresses: Mapping[ServiceName, str]) -> None:
        """Where upstreams are found inside: the catalog shows it."""
        if addresses != self._addresses:
            self._addresses = addresses
            self._dirty.update(self._registrations)
            self.wake.set()

    def set_intentions(self, owned: tuple[OwnedIntention, ...]) -> None:
        if owned != self._owned:
            self._owned = owned
            self.check_intentions()

    def check_intentions(self) -> None:
        """Somebody changed an intention: perhaps one that a job owns."""
        self._owned_dirty = True
        self.wake.set()

    def set_entries(self, entries: tuple[Entry, ...]) -> None:
        if entries != self._entries:
            self._entries = entries
            self.check_entries()

    def check_entries(self) -> None:
        self._entries_dirty = True
        self.wake.set()

    def saw(self, service: ServiceName, rows: Iterable[HealthRow]) -> None:
        """A watch shows this: nodes that look otherwise than they were written are read again."""
        if not self.leadership.held:
            return
        drifted = self._known.drifted(service, rows)
        # What is being written shows before it is known to be written: most likely it is that. Look again later.
        ours = drifted & (self._dirty | self._writing.keys())
        for name in ours - self._doubt_at_s.keys():
            self._doubt_at_s[name] = time.monotonic() + _DOUBT_S
        if drifted - ours:
            self._suspect |= drifted - ours
            self.wake.set()

    def having(self, allocs: frozenset[str]) -> frozenset[str]:
        """The nodes, by Consul's names, where `allocs` are or are about to be registered."""
        writing = {name for name, record in self._writing.items() if registers(record, allocs)}
        return self._known.having(allocs) | writing

    def registered(self, names: Iterable[str], allocs: frozenset[str]) -> bool:
        """Whether one of `allocs` is still registered on one of the nodes `names`."""
        return any(
            registers(self._known.get(name), allocs) or registers(self._writing.get(name), allocs) for name in names
        )

    def begin(self) -> None:
        """This controller has just come to lead: nothing is known."""
        self._known.clear()
        self._suspect.clear()
        self._retry_at_s.clear()
        self._doubt_at_s.clear()
        self._dirty.update(self._registrations)
        self._sweep_at_s = 0.0
        self._owned_dirty = self._entries_dirty = True

    async def wait(self) -> None:
        """Until there is something to write, or the time for a sweep has come."""
        until_s = min((self._sweep_at_s, *self._retry_at_s.values(), *self._doubt_at_s.values()))
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await self.wake.wait()
        except TimeoutError:
            return

    async def write(self) -> None:
        """Once all that is due. Raises PeerError where Consul is away or the lock is lost: nothing is forgotten."""
        self.wake.clear()
        now_s = time.monotonic()
        if self._sweep_at_s <= now_s:
            await self._read_all()
            self._sweep_at_s = now_s + SWEEP_S
            self._owned_dirty = self._entries_dirty = True
        for due_at_s in (self._retry_at_s, self._doubt_at_s):
            for name in [name for name, at_s in due_at_s.items() if at_s <= now_s]:
                del due_at_s[name]
                self._suspect.add(name)
        if self._suspect:
            await self._read(self._suspect)
        await self._write_nodes(sorted(self._dirty - self._retry_at_s.keys()))
        if self._owned_dirty and self._owned is not None:
            self._owned_dirty = False
            await self._write_intentions(self._owned)
        if self._entries_dirty and self._entries is not None:
            self._entries_dirty = False
            await self._write_entries(self._entries)

    def _touch(self, name: str) -> None:
        self._dirty.add(name)
        self._retry_at_s.pop(name, None)  # it says something new: worth another try at once
        self.wake.set()

    def _wanted(self, name: str) -> NodeRecord | None:
        registration = self._registrations.get(name)
        return wanted_record(registration, self._cluster, self._addresses) if registration is not None else None

    async def _read_all(self) -> None:
        """Of this cluster: what Consul has, what is wanted, and what was there. What nobody wants is a ghost.

        Service by service, where that is fewer requests than node by node: a node's two are two thousandths of a second
        of the embedded catalog, in the process that hears the agents.
        """
        meta = CLUSTER_META, self._cluster
        nodes = {node.node: node for node in await self._consul.nodes(meta)}
        services = await self._consul.service_names(meta)
        others = (self._registrations.keys() | self._known.names()) - nodes.keys()
        if len(services) > len(nodes):
            await self._read(nodes.keys() | others)
            return
        checks: dict[str, list[ConsulCheck]] = {}
        for check in await self._consul.checks(meta):
            checks.setdefault(check.node, []).append(check)
        rows: dict[str, dict[str, ConsulService]] = {}

        async def read(service: str) -> None:
            for row in await self._consul.instances(service, meta):
                rows.setdefault(row.node.node, {})[row.service.id] = row.service

        await each(services, read, at_once=_REQUESTS_AT_ONCE, name="mesh-sweep")
        for count, (name, node) in enumerate(nodes.items()):
            found = CatalogNodeServices(node=node, services=rows.get(name))
            self._saw_record(name, found_record(found, checks.get(name, ())))
            if count % _RECORDS_AT_ONCE == 0:
                await asyncio.sleep(0)
        await self._read(others)

    async def _read(self, names: Iterable[str]) -> None:
        async def read(name: str) -> None:
            services, checks = await self._consul.node(name)
            self._saw_record(name, found_record(services, checks) if services is not None else None)

        await each(sorted(names), read, at_once=_REQUESTS_AT_ONCE, name="mesh-read")
        self.changed()

    def _saw_record(self, name: str, record: NodeRecord | None) -> None:
        self._known.put(name, record)
        if operations(record, self._wanted(name)):
            self._log.info("catalog differs", node=name)
            self._dirty.add(name)
        self._suspect.discard(name)

    async def _write_nodes(self, names: list[str]) -> None:
        """All in as few transactions as Consul allows; where one is refused, its nodes one by one."""
        wanted = {name: self._wanted(name) for name in names}
        steps = {name: operations(self._known.get(name), wanted[name]) for name in names}
        self._dirty.difference_update(names)
        self._writing = wanted
        try:
            refused = await self._transact([(name, txn) for name in names for txn in steps[name].first])
            proxies = [one for name in names if name not in refused for one in steps[name].proxies]
            refused |= await self._register(proxies)
            last = [(name, txn) for name in names if name not in refused for txn in steps[name].last]
            refused |= await self._transact(last)
        except PeerError:
            # Which of them were written, nobody knows.
            self._dirty.update(names)
            self._suspect.update(names)
            raise
        finally:
            self._writing = {}
        for name in names:
            if name not in refused:
                self._known.put(name, wanted[name])
        self.changed()
        await self._settle(refused, alone=len(names) == 1)

    async def _settle(self, refused: set[str], *, alone: bool) -> None:
        if not refused:
            return
        await self._read(refused)
        self._dirty |= refused
        if alone:
            # It is this node that Consul does not like: the others must not wait for it.
            self._retry_at_s.update(dict.fromkeys(refused, time.monotonic() + _RETRY_S))
            return
        for name in sorted(refused):
            await self._write_nodes([name])

    async def _transact(self, steps: list[tuple[str, Txn]]) -> set[str]:
        """The nodes that Consul refused. Raises PeerError where the lock is lost."""
        refused: set[str] = set()
        position = 0
        for batch in batches(txn for _, txn in steps):
            involved = {name for name, _ in steps[position : position + len(batch)]}
            position += len(batch)
            if involved & refused:
                refused |= involved
                continue
            answer = await self._consul.transact([self.leadership.guard(), *batch])
            errors = answer.errors or ()
            if any(error.op_index == 0 for error in errors):
                self.fence.lost()
            if errors:
                self._refused(involved, "; ".join(error.what for error in errors))
                refused |= involved
        return refused

    async def _register(self, proxies: list[Registration]) -> set[str]:
        """The nodes that Consul refused."""
        if not proxies:
            return set()
        refused: set[str] = set()

        async def register(one: Registration) -> None:
            await self.fence.check()
            if why := await self._consul.register(one):
                self._refused({one.node}, why)
                refused.add(one.node)

        await each(proxies, register, at_once=_REQUESTS_AT_ONCE, name="mesh-register")
        await self.fence.ask()
        return refused

    def _refused(self, nodes: set[str], why: str) -> None:
        self._log.warning("catalog refused", nodes=sorted(nodes), why=why)

    async def _write_intentions(self, owned: tuple[OwnedIntention, ...]) -> None:
        try:
            _, found = await self._consul.watch_intentions(0)
            plan = plan_owned(owned, found, self._cluster)
            steps = (
                *((self._consul.delete_intention, one) for one in plan.delete),
                *((self._consul.update_intention, one) for one in plan.update),
                *((self._consul.create_intention, one) for one in plan.create),
            )
            for write, one in steps:
                await self.fence.check()
                await write(one)
            if steps:
                await self.fence.ask()
        except BaseException:
            self._owned_dirty = True
            raise

    async def _write_entries(self, entries: tuple[Entry, ...]) -> None:
        """One that Consul refuses is told of, and tried again with the next sweep: the others do not wait for it."""
        try:
            found = [pair for kind in TRAFFIC_KINDS for pair in await self._consul.entries(kind)]
            indexes = {(one.kind, one.name): index for one, index in found}
            plan = plan_entries(entries, [one for one, _ in found], self._cluster)
            for kind, name in plan.delete:
                await self.fence.check()
                await self._attempt(self._consul.delete_entry(kind, name), kind, name)
            for one in plan.put:
                await self.fence.check()
                as_read = indexes.get((one.kind, one.name), 0)
                await self._attempt(self._consul.put_entry(one, as_read), one.kind, one.name)
            if plan.put or plan.delete:
                await self.fence.ask()
        except PeerError:
            self._entries_dirty = True
            raise

    async def _attempt(self, write: Awaitable[None], kind: str, name: str) -> None:
        try:
            await write
        except RefusedError as error:
            self._log.warning("config entry refused", kind=kind, name=name, why=str(error))
