"""What each node's sidecars know of the mesh, and what they must be told next. Pure: state in place, updates out.

Level-triggered: an update is the difference between what a node was sent and what it should have.
"""

from collections.abc import Iterable, Mapping

from controller.mesh.intentions import bearing_on
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol, Value
from outrider.model.mesh import (
    Endpoint,
    Intention,
    MeshService,
    MeshUpdate,
    ServiceIntentions,
    TrustRoots,
    virtual_address,
)

Updates = list[tuple[NodeId, MeshUpdate]]


class Interests(Value, frozen=True, kw_only=True):
    called: frozenset[ServiceName] = frozenset()
    placed: frozenset[ServiceName] = frozenset()


class _Session:
    """One connected node: what it was sent, under which versions, and what it acknowledged."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.services: dict[ServiceName, MeshService] = {}
        self.changed: dict[ServiceName, int] = {}  # the version that last told of the service's endpoints
        self.intentions: dict[ServiceName, tuple[Intention, ...]] = {}
        self.roots = TrustRoots()


class Views:
    """Every `set_*` gives the updates to send now."""

    def __init__(self) -> None:
        self.services: Mapping[ServiceName, tuple[int, Protocol]] = {}
        self.endpoints: dict[ServiceName, tuple[Endpoint, ...]] = {}
        self.intentions: tuple[Intention, ...] = ()
        self.roots = TrustRoots()
        self.interests: dict[NodeId, Interests] = {}
        self._sessions: dict[NodeId, _Session] = {}
        self._version = 0

    def called(self) -> frozenset[ServiceName]:
        """The services whose endpoints somebody needs."""
        return frozenset().union(*(interests.called for interests in self.interests.values()))

    def set_services(self, services: Mapping[ServiceName, tuple[int, Protocol]]) -> Updates:
        changed = {name for name in {*services, *self.services} if services.get(name) != self.services.get(name)}
        self.services = dict(services)
        return self._differences(changed)

    def set_endpoints(self, service: ServiceName, endpoints: tuple[Endpoint, ...]) -> Updates:
        self.endpoints[service] = endpoints
        return self._differences({service})

    def forget_endpoints(self, service: ServiceName) -> None:
        """Nobody calls it any more."""
        self.endpoints.pop(service, None)

    def set_intentions(self, intentions: tuple[Intention, ...]) -> Updates:
        self.intentions = intentions
        return self._differences(())

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
        """The whole view, for a fresh session; deltas follow it."""
        session = self._sessions[node] = _Session()
        interests = self.interests.get(node, Interests())
        session.services = {name: one for name in sorted(interests.called) if (one := self._service(name)) is not None}
        session.intentions = {name: bearing_on(self.intentions, name) for name in sorted(interests.placed)}
        session.roots = self.roots
        self._version += 1
        session.changed = dict.fromkeys(session.services, self._version)
        return MeshUpdate(
            version=self._version,
            full=True,
            services=tuple(session.services.values()),
            intentions=tuple(
                ServiceIntentions(service=name, intentions=found) for name, found in session.intentions.items()
            ),
            roots=self.roots,
        )

    def disconnect(self, node: NodeId) -> None:
        self._sessions.pop(node, None)

    def acknowledge(self, node: NodeId, version: int) -> None:
        if (session := self._sessions.get(node)) is not None:
            session.acknowledged = max(session.acknowledged, version)

    def withdrawn(self, allocs: frozenset[AllocId], services: Iterable[ServiceName]) -> bool:
        """Whether the watch has seen that `allocs` serve none of `services`, and every connected caller knows."""
        for service in services:
            if any(endpoint.alloc in allocs for endpoint in self.endpoints.get(service, ())):
                return False
            for session in self._sessions.values():
                if session.acknowledged < session.changed.get(service, 0):
                    return False
        return True

    def _service(self, name: ServiceName) -> MeshService | None:
        """None while the controller has given the name no virtual address."""
        if name not in self.services:
            return None
        index, protocol = self.services[name]
        return MeshService(
            name=name,
            virtual_address=virtual_address(index),
            protocol=protocol,
            endpoints=self.endpoints.get(name, ()),
        )

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
        names = (
            {*interests.called, *session.services}
            if changed is None
            else changed
            & {
                *interests.called,
                *session.services,
            }
        )
        services = {name: self._service(name) if name in interests.called else None for name in names}
        fresh = {name: one for name, one in services.items() if one is not None and session.services.get(name) != one}
        gone = sorted(name for name, one in services.items() if one is None and name in session.services)
        rules = {name: bearing_on(self.intentions, name) for name in interests.placed}
        new_rules = {name: found for name, found in rules.items() if session.intentions.get(name) != found}
        gone_rules = sorted(name for name in session.intentions if name not in rules)
        roots = self.roots if self.roots != session.roots else None
        if not (fresh or gone or new_rules or gone_rules or roots):
            return None
        self._version += 1
        session.services.update(fresh)
        session.changed.update(dict.fromkeys((*fresh, *gone), self._version))
        for name in gone:
            del session.services[name]
        session.intentions, session.roots = rules, self.roots
        return MeshUpdate(
            version=self._version,
            services=tuple(fresh[name] for name in sorted(fresh)),
            services_removed=tuple(gone),
            intentions=tuple(ServiceIntentions(service=name, intentions=new_rules[name]) for name in sorted(new_rules)),
            intentions_removed=tuple(gone_rules),
            roots=roots,
        )
