"""What each node's sidecars know of the mesh, and what they must be told next. Pure: state in place, updates out.

Level-triggered: an update is the difference between what a node was sent and what it should have. What the catalog
has not been asked yet is left out: a controller that has just started must not tell agents that nothing is there.
"""

from collections.abc import Iterable, Mapping

from controller import entries as config
from controller.core.mesh_intent import Interests
from controller.mesh.intentions import bearing_on, decide
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import (
    Action,
    Endpoint,
    Intention,
    MeshService,
    MeshUpdate,
    ServiceIntentions,
    TrustRoots,
    virtual_address,
)
from outrider.model.traffic import ServiceTraffic, Verdict

Updates = list[tuple[NodeId, MeshUpdate]]


class _Session:
    """One connected node: what it was sent, under which versions, and what it acknowledged."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.rooted = 0  # the version that last told of the roots
        self.complete = False  # it was sent an update that replaced everything it had before
        self.services: dict[ServiceName, MeshService] = {}
        self.changed: dict[ServiceName, int] = {}  # the version that last told of the service's endpoints
        self.intentions: dict[ServiceName, ServiceIntentions] = {}
        self.roots = TrustRoots()


class Views:
    """Every `set_*` gives the updates to send now."""

    def __init__(self) -> None:
        self.services: Mapping[ServiceName, tuple[int, Protocol]] = {}
        self.endpoints: dict[ServiceName, tuple[Endpoint, ...]] = {}
        self.intentions: tuple[Intention, ...] | None = None  # None, as empty roots: not asked yet
        self.roots = TrustRoots()
        self.entries: config.Entries | None = None  # None: not asked yet
        self._traffic: dict[ServiceName, ServiceTraffic] = {}  # compiled since they changed
        self._reach: dict[ServiceName, tuple[ServiceName, ...]] = {}  # since intentions or services changed
        self.interests: dict[NodeId, Interests] = {}
        self._sessions: dict[NodeId, _Session] = {}
        self._version = 0

    def called(self) -> frozenset[ServiceName]:
        """The services whose endpoints somebody needs."""
        named: set[ServiceName] = set().union(*(self._wanted(interests) for interests in self.interests.values()))
        return frozenset(self._reached(named))

    def needed(self, interests: Interests) -> frozenset[ServiceName]:
        """The services whose endpoints such a node needs."""
        return frozenset(self._reached(self._wanted(interests)))

    def set_services(self, services: Mapping[ServiceName, tuple[int, Protocol]]) -> Updates:
        changed = {name for name in {*services, *self.services} if services.get(name) != self.services.get(name)}
        self.services = dict(services)
        self._reach.clear()
        return self._differences(changed)

    def set_endpoints(self, service: ServiceName, endpoints: tuple[Endpoint, ...]) -> Updates:
        self.endpoints[service] = endpoints
        return self._differences({service})

    def forget_endpoints(self, service: ServiceName) -> None:
        """Nobody calls it any more."""
        self.endpoints.pop(service, None)

    def set_intentions(self, intentions: tuple[Intention, ...]) -> Updates:
        before = self._opened()
        self.intentions = intentions
        self._reach.clear()
        return self._differences(before ^ self._opened())

    def set_entries(self, entries: config.Entries) -> Updates:
        """Consul's config entries, all of them."""
        self.entries = entries
        self._traffic.clear()
        return self._differences(self.services)

    def set_roots(self, roots: TrustRoots) -> Updates:
        self.roots = roots
        return self._differences(())

    def set_interests(self, node: NodeId, interests: Interests) -> Updates:
        self.interests[node] = interests
        update = self._difference(node, self._sessions.get(node), None)
        return [(node, update)] if update is not None else []

    def remove(self, node: NodeId) -> None:
        self.interests.pop(node, None)
        self._sessions.pop(node, None)

    def connect(self, node: NodeId) -> MeshUpdate:
        """The whole view, for a fresh session; deltas follow it. Where the catalog was not asked for all of it yet,
        what is known so far, and the update that replaces everything follows when it has."""
        session = self._sessions[node] = _Session()
        return self._difference(node, session, None) or MeshUpdate(version=self._next_version())

    def disconnect(self, node: NodeId) -> None:
        self._sessions.pop(node, None)

    def acknowledge(self, node: NodeId, version: int) -> None:
        if (session := self._sessions.get(node)) is not None:
            session.acknowledged = max(session.acknowledged, version)

    def trusted(self, root_pem: str) -> bool:
        """Whether every connected node's sidecars trust this root."""
        return root_pem in self.roots.certificates_pem and all(
            session.roots == self.roots and session.acknowledged >= session.rooted
            for session in self._sessions.values()
        )

    def withdrawn(self, allocs: frozenset[AllocId], services: Iterable[ServiceName]) -> bool:
        """Whether the watch has seen that `allocs` serve none of `services`, and every connected caller knows."""
        for service in services:
            if any(endpoint.alloc in allocs for endpoint in self.endpoints.get(service, ())):
                return False
            for session in self._sessions.values():
                if session.acknowledged < session.changed.get(service, 0):
                    return False
        return True

    def reach(self, source: ServiceName) -> tuple[ServiceName, ...]:
        """The services that let `source` call them, if only a part of its requests."""
        if source not in self._reach:
            intentions = self.intentions or ()
            self._reach[source] = tuple(
                name for name in sorted(self.services) if name != source and _lets(decide(intentions, source, name))
            )
        return self._reach[source]

    def _wanted(self, interests: Interests) -> frozenset[ServiceName]:
        return interests.called.union(*(self.reach(source) for source in interests.transparent))

    def _opened(self) -> set[ServiceName]:
        """What is in reach of any transparent service."""
        transparent = {source for interests in self.interests.values() for source in interests.transparent}
        return {name for source in transparent for name in self.reach(source)}

    def service(self, name: ServiceName) -> MeshService | None:
        """None while the controller has given the name no virtual address, or the catalog was not asked for it,
        or for the config entries: half of what is known would route where nobody said."""
        if self.entries is None or name not in self.services or name not in self.endpoints:
            return None
        index, protocol = self.services[name]
        address = virtual_address(index)
        return MeshService(
            name=name,
            virtual_address=address,
            protocol=protocol,
            endpoints=self.endpoints[name],
            traffic=self._compiled(name),
        )

    def _compiled(self, name: ServiceName) -> ServiceTraffic:
        if name not in self._traffic:
            self._traffic[name] = config.compiled(self.entries or {}, name)
        return self._traffic[name]

    def _reached(self, named: Iterable[ServiceName]) -> set[ServiceName]:
        """`named`, and where their calls may come to by routes, splits, failover and mirrors."""
        found: set[ServiceName] = set()
        left = set(named)
        while left:
            name = left.pop()
            found.add(name)
            left |= {ServiceName(other) for other in config.used(self._compiled(name))} - found
        return found

    def _differences(self, services: Iterable[ServiceName]) -> Updates:
        changed = frozenset(services)
        found = ((node, self._difference(node, session, changed)) for node, session in self._sessions.items())
        return [(node, update) for node, update in found if update is not None]

    def _difference(
        self, node: NodeId, session: _Session | None, changed: frozenset[ServiceName] | None
    ) -> MeshUpdate | None:
        """`changed`: the services to look at; None is all. None: there is nothing to tell."""
        if session is None:
            return None
        interests = self.interests.get(node, Interests())
        full = not session.complete and self._answers(interests)
        if full:
            session.complete, session.services, session.intentions = True, {}, {}
        called = self._reached(self._wanted(interests))
        names = called | session.services.keys()
        if changed is not None and not full:
            names &= changed
        services = {name: self.service(name) if name in called else None for name in names}
        fresh = {name: one for name, one in services.items() if one is not None and session.services.get(name) != one}
        gone = sorted(name for name, one in services.items() if one is None and name in session.services)
        placed = interests.placed if self.intentions is not None else ()
        rules = {
            name: ServiceIntentions(
                service=name,
                intentions=bearing_on(self.intentions or (), name),
                rate=config.rate_of(self.entries or {}, name),
                reach=self.reach(name) if name in interests.transparent else (),
            )
            for name in placed
        }
        new_rules = {name: found for name, found in rules.items() if session.intentions.get(name) != found}
        gone_rules = sorted(name for name in session.intentions if name not in rules)
        roots = self.roots if self.roots != session.roots or (full and self.roots.trust_domain) else None
        if not (full or fresh or gone or new_rules or gone_rules or roots):
            return None
        version = self._next_version()
        session.services.update(fresh)
        session.changed.update(dict.fromkeys((*fresh, *gone), version))
        for name in gone:
            del session.services[name]
        session.intentions, session.roots = rules, self.roots
        session.rooted = version if roots is not None else session.rooted
        return MeshUpdate(
            version=version,
            full=full,
            services=tuple(fresh[name] for name in sorted(fresh)),
            services_removed=tuple(gone),
            intentions=tuple(new_rules[name] for name in sorted(new_rules)),
            intentions_removed=tuple(gone_rules),
            roots=roots,
        )

    def _answers(self, interests: Interests) -> bool:
        """Whether the catalog was asked for all that these interests need."""
        known = self.intentions is not None and self.entries is not None and self.roots.trust_domain != ""
        return known and all(name in self.endpoints for name in self._reached(self._wanted(interests)))

    def _next_version(self) -> int:
        self._version += 1
        return self._version


def _lets(intention: Intention | None) -> bool:
    """Without one: the default, deny."""
    if intention is None:
        return False
    return intention.action is Action.ALLOW or any(one.action is Verdict.ALLOW for one in intention.permissions)
