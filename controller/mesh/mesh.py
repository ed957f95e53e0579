"""The mesh's control plane (DESIGN, decision 2): desired state in, deltas for agents out; Consul is the record.

Tasks: `mesh-writer` (leads, writes), `mesh-session` (keeps the lock), and the watcher's. No queue: all state is
level-triggered, and `deliver` must not wait. Survives Consul being away: sidecars keep what they were told last.
Never decides where anything runs, nor who may have a leaf: its callers do.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from controller import entries
from controller.core.mesh_intent import Interests, NodeRegistration, OwnedIntention, OwnedTraffic
from controller.entries import http_rule
from controller.mesh.backoff import Backoff
from controller.mesh.consul_adapter import ConsulAdapter, Dialect
from controller.mesh.endpoints import endpoints
from controller.mesh.intentions import DEFAULT_DENY, WILDCARD, decide, intention, plan_owned
from controller.mesh.issuer import Issuer
from controller.mesh.leader import RENEW_S, Leadership, Lock
from controller.mesh.owned_entries import owned_entries, plan_entries
from controller.mesh.shapes import ConsulIntention, ConsulPermission, ConsulRoots, HealthRow
from controller.mesh.views import Updates, Views
from controller.mesh.watcher import Watcher
from controller.mesh.writer import Writer
from outrider.errors import InputError, PeerError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName, is_name
from outrider.log import Log
from outrider.model.job import Protocol, Value
from outrider.model.mesh import Action, Intention, Leaf, MeshService, MeshUpdate, TrustRoots, virtual_address
from outrider.model.traffic import Permission, Verdict

# Names that no service has: how Consul answers for them is how it answers where no intention says anything.
_NOBODY = ("outrider-nobody-calls", "outrider-nobody-answers")
_LEAD_S = 5.0  # that an operator's write waits for this controller to lead


class _Withdrawal(Value, frozen=True, kw_only=True):
    allocs: frozenset[AllocId]
    services: tuple[ServiceName, ...]
    nodes: frozenset[str]  # where they were registered, by Consul's names


class Mesh:
    """Everything but `run`, `issue` and the operators' calls returns at once. For one event loop."""

    def __init__(
        self,
        *,
        consul: ConsulAdapter,
        issuer: Issuer,
        cluster: str,
        adopt_intentions: bool,
        log: Log,
        lock: Lock | None = None,
    ) -> None:
        """`adopt_intentions`: make a `* -> *` deny where Consul's default would be to allow. `lock`: where the journal
        has one already; else the mesh takes its own."""
        self.reachable = False  # Consul answered last time
        self.deliver: Callable[[NodeId, MeshUpdate], None] = lambda _node, _update: None  # set both before run()
        self.withdrawn: Callable[[tuple[AllocId, ...]], None] = lambda _allocs: None
        self._consul, self._issuer, self._cluster, self._log = consul, issuer, cluster, log
        self._adopt_intentions = adopt_intentions
        self._views = Views()
        self._withdrawals: list[_Withdrawal] = []
        self._owned: tuple[OwnedIntention, ...] = ()
        self._traffic: tuple[OwnedTraffic, ...] = ()
        self._protocols: dict[ServiceName, Protocol] = {}
        self._entries: dict[str, list[entries.Entry]] = {}  # by kind, as last seen
        self._rows: dict[ServiceName, list[HealthRow]] = {}
        self._has_led = False
        self._heard = asyncio.Event()  # an agent acknowledged something; replaced each time
        self._writer = Writer(consul, cluster, lock or Leadership(consul, cluster, log), log)
        self._writer.changed = self._settle_withdrawals
        self._watcher = Watcher(
            consul,
            log,
            saw_service=self._saw_service,
            forgot_service=self._forgot_service,
            saw_intentions=self._saw_intentions,
            saw_roots=self._saw_roots,
            saw_entries=self._saw_entries,
            answered=self._answered,
        )

    @property
    def leading(self) -> bool:
        """This controller holds the leader lock."""
        return self._writer.leadership.held

    async def run(self) -> None:
        """Until cancelled. What was set before is taken for the whole truth: a node of this cluster that the catalog
        has and `set_node` did not name is a ghost, and is removed. Raises RefusedError where Consul's default is to
        allow and `adopt_intentions` is not set."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(), name="mesh-writer")
                group.create_task(self._keep_session(), name="mesh-session")
                group.create_task(self._watcher.run(), name="mesh-watcher")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            await self._writer.leadership.release()

    def set_node(self, registration: NodeRegistration) -> None:
        self._writer.set_node(registration)

    def remove_node(self, node: NodeId) -> None:
        self._writer.remove_node(node)
        self._views.remove(node)
        self._watcher.set_services(self._views.called())
        self._settle_withdrawals()

    def set_intentions(self, intentions: tuple[OwnedIntention, ...]) -> None:
        self._owned = intentions
        self._writer.set_intentions(intentions)

    def set_traffic(self, traffic: tuple[OwnedTraffic, ...]) -> None:
        """The jobs' `traffic:`; after `set_services`, whose protocols it needs."""
        self._traffic = traffic
        self._writer.set_entries(self._wanted_entries())

    def set_services(self, services: Mapping[ServiceName, tuple[int, Protocol]]) -> None:
        """Every service name that has a virtual address: its index, and the protocol that it speaks."""
        self._protocols = {name: protocol for name, (_, protocol) in services.items()}
        self._send(self._views.set_services(services))
        self._watcher.set_services(self._views.called())
        self._writer.set_addresses({name: virtual_address(index) for name, (index, _) in services.items()})

    def set_interests(self, node: NodeId, interests: Interests) -> None:
        before = self._views.needed(self._views.interests.get(node, Interests()))
        self._send(self._views.set_interests(node, interests))
        needed = self._views.needed(interests)
        # What all nodes need is only summed up where it may have changed: a storm of nodes sets as many interests.
        if not (before <= needed <= self._watcher.wanted):
            self._watcher.set_services(self._views.called())

    def full(self, node: NodeId) -> MeshUpdate:
        """The whole view for a fresh session, or what is known so far (`Views.connect`); from here on the node is
        connected, and `deliver` gets its deltas."""
        return self._views.connect(node)

    def disconnected(self, node: NodeId) -> None:
        self._views.disconnect(node)
        self._settle_withdrawals()

    def acknowledged(self, node: NodeId, version: int) -> None:
        self._views.acknowledge(node, version)
        self._heard.set()
        self._heard = asyncio.Event()
        self._settle_withdrawals()

    def withdraw(self, allocs: tuple[AllocId, ...], services: tuple[ServiceName, ...]) -> None:
        """Calls `withdrawn(allocs)`, later, once the catalog has them no more, the watch has seen that, and every
        connected node whose sidecars call one of `services` has acknowledged it. `set_node` without them came before.
        """
        wanted = frozenset(allocs)
        nodes = self._writer.having(wanted)
        self._withdrawals.append(_Withdrawal(allocs=wanted, services=services, nodes=nodes))
        asyncio.get_running_loop().call_soon(self._settle_withdrawals)

    def service(self, name: ServiceName) -> MeshService | None:
        """As its callers' sidecars see it; None while nobody calls it, or the catalog was not asked for it."""
        return self._views.service(name)

    def reach(self, source: ServiceName) -> tuple[ServiceName, ...]:
        """Whom a transparent service may call, beside its upstreams."""
        return self._views.reach(source)

    async def until_trusted(self, root_pem: str) -> None:
        """Until every connected node's sidecars trust this root."""
        while not self._views.trusted(root_pem):
            await self._heard.wait()

    def roots(self) -> TrustRoots:
        return self._views.roots

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        """Raises InputError, PeerError, RefusedError."""
        return await self._issuer.issue(service, csr_pem)

    async def intentions(self) -> tuple[Intention, ...]:
        """All, highest precedence first. Raises PeerError, RefusedError, as all that follow."""
        found = [intention(one, self._cluster) for one in await self._list()]
        return tuple(sorted(found, key=lambda one: (-one.precedence, one.destination, one.source)))

    async def create_intention(
        self,
        source: str,
        destination: str,
        action: Action,
        description: str = "",
        permissions: tuple[Permission, ...] = (),
    ) -> Intention:
        """By hand: it takes the place of a job's for the same pair, and stays until it is deleted by hand."""
        _require_names(source, destination)
        if permissions:
            await self._require_http(destination)
        old = await self._find(source, destination)
        wanted = ConsulIntention(
            id=old.id if old else "",
            source_name=source,
            destination_name=destination,
            action="" if permissions else action.value,
            permissions=tuple(
                ConsulPermission(action=one.action.value, http=http_rule(one.match)) for one in permissions
            )
            or None,
            description=description,
        )
        await self._lead()
        if old is None:
            await self._consul.create_intention(wanted)
        else:
            await self._consul.update_intention(wanted)
        made = await self._find(source, destination)
        return intention(made or wanted, self._cluster)

    async def _require_http(self, destination: str) -> None:
        """Raises RefusedError where permissions would mean nothing, with nothing changed."""
        if not self._consul.version:
            await self._consul.probe()
        if self._consul.dialect is Dialect.BY_ID:
            text = f"Consul {self._consul.version} has no intentions by method, path or header: they came with 1.9"
            raise RefusedError("too_old", f"{text}; allow or deny the service as a whole")
        if destination == WILDCARD:
            raise RefusedError("no_http", "permissions need one destination: a wildcard may speak any protocol")
        if self._protocols.get(ServiceName(destination)) is Protocol.TCP:
            raise RefusedError("no_http", f"service {destination} speaks tcp, which has no methods or paths")

    async def delete_intention(self, source: str, destination: str) -> bool:
        """False: there was none. Raises RefusedError for one that a job owns: it would come back."""
        found = await self._find(source, destination)
        if found is None:
            return False
        if owner := intention(found, self._cluster).owner:
            hint = f"take it out of the job's `allow:`, or create a deny for {source} -> {destination}"
            raise RefusedError("owned", f"intention {source} -> {destination} belongs to job {owner}: {hint}")
        await self._lead()
        await self._consul.delete_intention(found)
        return True

    async def _lead(self) -> None:
        """Raises PeerError where this controller does not come to lead: an operator's write is to be its alone, too."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAD_S):
                while not self.leading:  # noqa: ASYNC110 - nobody tells, and it takes a moment after a start alone
                    await asyncio.sleep(0.05)
        await self._writer.fence.check()

    async def check(self, source: ServiceName, destination: ServiceName) -> tuple[bool, Intention | None]:
        """Whether `source` may call `destination`, and what decides. None: no intention does, but Consul's default."""
        decided_by = decide(await self.intentions(), source, destination)
        if decided_by is not None:
            some = any(one.action is Verdict.ALLOW for one in decided_by.permissions)
            return decided_by.action is Action.ALLOW or some, decided_by
        return await self._consul.allowed(source, destination), None

    async def _write(self) -> None:
        backoff = Backoff()
        while True:
            try:
                if not self._writer.leadership.held:
                    await self._take_charge()
                if self._writer.leadership.held:
                    await self._writer.write()
                    self._answered(True)
                    backoff.reset()
                    await self._writer.wait()
                else:
                    await backoff.pause()  # another controller leads
            except PeerError as error:
                self._answered(False)
                self._log.debug("write failed", error=error)
                await backoff.pause()
            except RefusedError as error:
                if not self._has_led:
                    raise  # a start with wrong settings: say so and end
                self._log.error("consul refuses", error=error)
                await backoff.pause()

    async def _take_charge(self) -> None:
        await self._consul.probe()
        await self._require_default_deny()
        if await self._writer.leadership.take():
            self._has_led = True
            self._log.info("mesh leads", consul=self._consul.url, version=self._consul.version)
            self._writer.begin()

    async def _require_default_deny(self) -> None:
        """Without it everybody may call everybody that no intention names (DESIGN, decision 4)."""
        if not await self._consul.allowed(*_NOBODY):
            return
        if not self._adopt_intentions:
            raise RefusedError(
                "default_allow",
                f"Consul at {self._consul.url} lets every service call every other one unless an intention says no. "
                "Run `consul intention create -deny '*' '*'` once all callers are allowed, or start the controller "
                "with --adopt-intentions, which does that",
            )
        if await self._find(WILDCARD, WILDCARD) is not None:
            text = f"Consul at {self._consul.url} has an intention * -> * that allows, made by hand: delete it first"
            raise RefusedError("default_allow", text)
        if self.leading:  # one of several controllers has its lock already; one alone takes it next
            await self._writer.fence.check()
        await self._consul.create_intention(DEFAULT_DENY)
        self._log.info("default deny made", consul=self._consul.url)

    async def _keep_session(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._writer.leadership.renew()
            except (PeerError, RefusedError) as error:
                self._log.debug("session not renewed", error=error)
                # Servers without a quorum let watches wait, and say nothing.
                failed = True
                self._answered(False)
            else:
                if failed:
                    failed = False
                    self._answered(True)
            if not self._writer.leadership.held:
                self._writer.wake.set()

    def _saw_service(self, service: ServiceName, rows: list[HealthRow]) -> None:
        self._rows[service] = rows
        self._send(self._views.set_endpoints(service, endpoints(rows, self._cluster, self._views.entries or {})))
        self._writer.saw(service, rows)
        self._settle_withdrawals()

    def _saw_intentions(self, found: list[ConsulIntention]) -> None:
        self._send(self._views.set_intentions(tuple(intention(one, self._cluster) for one in found)))
        self._watcher.set_services(self._views.called())
        plan = plan_owned(self._owned, found, self._cluster)
        if plan.create or plan.update or plan.delete:
            self._writer.check_intentions()

    def _forgot_service(self, service: ServiceName) -> None:
        self._rows.pop(service, None)
        self._views.forget_endpoints(service)

    def _saw_entries(self, kind: str, found: list[entries.Entry]) -> None:
        """Compiled once all kinds are there: half of them would route where nobody said."""
        self._entries[kind] = found
        for one in found:
            if problem := entries.problem(one):
                self._log.warning("config entry not understood", kind=kind, name=one.name, why=problem)
        if len(self._entries) < len(entries.TRAFFIC_KINDS):
            return
        known = [one for kind in entries.TRAFFIC_KINDS for one in self._entries[kind]]
        good = entries.keyed(one for one in known if not entries.problem(one))
        before, self._views.entries = self._views.entries, good
        self._send(self._views.set_entries(good))
        for service, rows in tuple(self._rows.items()):
            if (before or {}).get((entries.RESOLVER, service)) != good.get((entries.RESOLVER, service)):
                self._saw_service(service, rows)
        self._watcher.set_services(self._views.called())
        plan = plan_entries(self._wanted_entries(), known, self._cluster)
        if plan.put or plan.delete:
            self._writer.check_entries()

    def _wanted_entries(self) -> tuple[entries.Entry, ...]:
        return tuple(entry for owned in self._traffic for entry in owned_entries(owned, self._cluster, self._protocols))

    def _saw_roots(self, found: ConsulRoots) -> None:
        active_first = sorted(found.roots, key=lambda root: not root.active)
        roots = TrustRoots(
            datacenter=self._consul.datacenter,
            trust_domain=found.trust_domain,
            certificates_pem=tuple(root.root_cert for root in active_first),
        )
        self._issuer.saw_roots(found)
        self._send(self._views.set_roots(roots))

    def _answered(self, reachable: bool) -> None:
        if reachable != self.reachable:
            self.reachable = reachable
            self._log.info("consul answers" if reachable else "consul is away", consul=self._consul.url)

    def _send(self, updates: Updates) -> None:
        for node, update in updates:
            self.deliver(node, update)

    def _settle_withdrawals(self) -> None:
        waiting = []
        for one in self._withdrawals:
            if self._writer.registered(one.nodes, one.allocs) or not self._views.withdrawn(one.allocs, one.services):
                waiting.append(one)
            else:
                self.withdrawn(tuple(sorted(one.allocs)))
        self._withdrawals = waiting

    async def _list(self) -> list[ConsulIntention]:
        if not self._consul.version:
            await self._consul.probe()
        _, found = await self._consul.watch_intentions(0)
        return found

    async def _find(self, source: str, destination: str) -> ConsulIntention | None:
        pair = (source, destination)
        found = await self._list()
        return next((one for one in found if (one.source_name, one.destination_name) == pair), None)


def _require_names(*names: str) -> None:
    for name in names:
        if name != WILDCARD and not is_name(name):
            raise InputError(f"{name!r} is not the name of a service, nor *")
