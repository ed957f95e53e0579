"""The mesh's control plane (DESIGN, decision 2): desired state in, deltas for agents out; Consul is the record.

Tasks: `mesh-writer` (leads, writes), `mesh-session` (keeps the lock), and the watcher's. No queue: all state is
level-triggered, and `deliver` must not wait. Survives Consul being away: sidecars keep what they were told last.
Never decides where anything runs, nor who may have a leaf: its callers do.
"""

import asyncio
from collections.abc import Callable, Mapping

from controller.core.mesh_intent import NodeRegistration, OwnedIntention
from controller.mesh.backoff import Backoff
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.endpoints import endpoints
from controller.mesh.intentions import DEFAULT_DENY, WILDCARD, decide, intention, plan_owned
from controller.mesh.issuer import Issuer
from controller.mesh.leader import RENEW_S, Leadership, Lock
from controller.mesh.shapes import ConsulIntention, ConsulRoots, HealthRow
from controller.mesh.views import Interests, Updates, Views
from controller.mesh.watcher import Watcher
from controller.mesh.writer import Writer
from outrider.errors import InputError, PeerError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName, is_name
from outrider.log import Log
from outrider.model.job import Protocol, Value
from outrider.model.mesh import Action, Intention, Leaf, MeshUpdate, TrustRoots, virtual_address

# Names that no service has: how Consul answers for them is how it answers where no intention says anything.
_NOBODY = ("outrider-nobody-calls", "outrider-nobody-answers")


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
        self._has_led = False
        self._writer = Writer(consul, cluster, lock or Leadership(consul, cluster, log), log)
        self._writer.changed = self._settle_withdrawals
        self._watcher = Watcher(
            consul,
            log,
            saw_service=self._saw_service,
            forgot_service=self._views.forget_endpoints,
            saw_intentions=self._saw_intentions,
            saw_roots=self._saw_roots,
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

    def set_services(self, services: Mapping[ServiceName, tuple[int, Protocol]]) -> None:
        """Every service name that has a virtual address: its index, and the protocol that it speaks."""
        self._send(self._views.set_services(services))
        self._writer.set_addresses({name: virtual_address(index) for name, (index, _) in services.items()})

    def set_interests(self, node: NodeId, called: frozenset[ServiceName], placed: frozenset[ServiceName]) -> None:
        self._send(self._views.set_interests(node, Interests(called=called, placed=placed)))
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
        self._settle_withdrawals()

    def withdraw(self, allocs: tuple[AllocId, ...], services: tuple[ServiceName, ...]) -> None:
        """Calls `withdrawn(allocs)`, later, once the catalog has them no more, the watch has seen that, and every
        connected node whose sidecars call one of `services` has acknowledged it. `set_node` without them came before.
        """
        wanted = frozenset(allocs)
        nodes = self._writer.having(wanted)
        self._withdrawals.append(_Withdrawal(allocs=wanted, services=services, nodes=nodes))
        asyncio.get_running_loop().call_soon(self._settle_withdrawals)

    def roots(self) -> TrustRoots:
        return self._views.roots

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        """Raises InputError, PeerError, RefusedError."""
        return await self._issuer.issue(service, csr_pem)

    async def intentions(self) -> tuple[Intention, ...]:
        """All, highest precedence first. Raises PeerError, RefusedError, as all that follow."""
        found = [intention(one, self._cluster) for one in await self._list()]
        return tuple(sorted(found, key=lambda one: (-one.precedence, one.destination, one.source)))

    async def create_intention(self, source: str, destination: str, action: Action, description: str = "") -> Intention:
        """By hand: it takes the place of a job's for the same pair, and stays until it is deleted by hand."""
        _require_names(source, destination)
        old = await self._find(source, destination)
        wanted = ConsulIntention(
            id=old.id if old else "",
            source_name=source,
            destination_name=destination,
            action=action.value,
            description=description,
        )
        if old is None:
            await self._consul.create_intention(wanted)
        else:
            await self._consul.update_intention(wanted)
        made = await self._find(source, destination)
        return intention(made or wanted, self._cluster)

    async def delete_intention(self, source: str, destination: str) -> bool:
        """False: there was none. Raises RefusedError for one that a job owns: it would come back."""
        found = await self._find(source, destination)
        if found is None:
            return False
        if owner := intention(found, self._cluster).owner:
            hint = f"take it out of the job's `allow:`, or create a deny for {source} -> {destination}"
            raise RefusedError("owned", f"intention {source} -> {destination} belongs to job {owner}: {hint}")
        await self._consul.delete_intention(found)
        return True

    async def check(self, source: ServiceName, destination: ServiceName) -> tuple[bool, Intention | None]:
        """Whether `source` may call `destination`, and what decides. None: no intention does, but Consul's default."""
        decided_by = decide(await self.intentions(), source, destination)
        if decided_by is not None:
            return decided_by.action is Action.ALLOW, decided_by
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
        await self._consul.create_intention(DEFAULT_DENY)
        self._log.info("default deny made", consul=self._consul.url)

    async def _keep_session(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._writer.leadership.renew()
            except (PeerError, RefusedError) as error:
                self._log.debug("session not renewed", error=error)
            if not self._writer.leadership.held:
                self._writer.wake.set()

    def _saw_service(self, service: ServiceName, rows: list[HealthRow]) -> None:
        self._send(self._views.set_endpoints(service, endpoints(rows, self._cluster)))
        self._writer.saw(service, rows)
        self._settle_withdrawals()

    def _saw_intentions(self, found: list[ConsulIntention]) -> None:
        self._send(self._views.set_intentions(tuple(intention(one, self._cluster) for one in found)))
        plan = plan_owned(self._owned, found, self._cluster)
        if plan.create or plan.update or plan.delete:
            self._writer.check_intentions()

    def _saw_roots(self, found: ConsulRoots) -> None:
        active_first = sorted(found.roots, key=lambda root: not root.active)
        roots = TrustRoots(
            datacenter=self._consul.datacenter,
            trust_domain=found.trust_domain,
            certificates_pem=tuple(root.root_cert for root in active_first),
        )
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
