"""Deltas put together give what a fresh session would be told; withdrawals wait for every caller."""

from hypothesis import given
from hypothesis import strategies as st

from controller.core.mesh_intent import Interests
from controller.mesh.views import Updates, Views
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
)

NODES = [NodeId("n1"), NodeId("n2")]
SERVICES = [ServiceName("web"), ServiceName("api"), ServiceName("db")]


class Agent:
    """Puts updates together as an agent does."""

    def __init__(self) -> None:
        self.version = 0
        self.services: dict[ServiceName, MeshService] = {}
        self.intentions: dict[ServiceName, ServiceIntentions] = {}
        self.roots = TrustRoots()

    def take(self, update: MeshUpdate) -> None:
        assert update.version > self.version
        self.version = update.version
        if update.full:
            self.services, self.intentions = {}, {}
        self.services.update({service.name: service for service in update.services})
        self.intentions.update({rules.service: rules for rules in update.intentions})
        for name in update.services_removed:
            del self.services[name]
        for name in update.intentions_removed:
            del self.intentions[name]
        self.roots = update.roots or self.roots


def endpoint(alloc: str) -> Endpoint:
    return Endpoint(id=alloc, node="n9", address="10.0.0.9", port=1, alloc=AllocId(alloc))


names = st.frozensets(st.sampled_from(SERVICES))
steps = st.one_of(
    st.tuples(st.just("services"), names),
    st.tuples(st.just("endpoints"), st.tuples(st.sampled_from(SERVICES), st.lists(st.sampled_from("abc"), max_size=2))),
    st.tuples(st.just("intentions"), st.lists(st.tuples(st.sampled_from([*SERVICES, "*"])), max_size=3)),
    st.tuples(st.just("roots"), st.sampled_from(["x", "y"])),
    st.tuples(st.just("interests"), st.tuples(st.sampled_from(NODES), names, names, names)),
)


@given(st.lists(steps, max_size=25))
def test_deltas_add_up_to_the_full_view(script: list[tuple[str, object]]) -> None:
    views = Views()
    views.set_entries({})
    agents = {node: Agent() for node in NODES}
    for node, agent in agents.items():
        agent.take(views.connect(node))
    for kind, value in script:
        for node, update in apply(views, kind, value):
            agents[node].take(update)
    for node, agent in agents.items():
        fresh = Agent()
        fresh.take(views.connect(node))
        assert (agent.services, agent.intentions, agent.roots) == (fresh.services, fresh.intentions, fresh.roots)


def apply(views: Views, kind: str, value: object) -> Updates:
    match kind, value:
        case "services", frozenset():
            return views.set_services({name: (SERVICES.index(name), Protocol.TCP) for name in value})
        case "endpoints", (str(service), list(allocs)):
            return views.set_endpoints(ServiceName(service), tuple(map(endpoint, allocs)))
        case "intentions", list(destinations):
            made = [Intention(source="*", destination=one[0], action=Action.ALLOW) for one in destinations]
            return views.set_intentions(tuple(made))
        case "roots", str(domain):
            return views.set_roots(TrustRoots(trust_domain=domain))
        case "interests", (str(node), frozenset() as called, frozenset() as placed, frozenset() as transparent):
            interests = Interests(called=called, placed=placed, transparent=placed & transparent)
            return views.set_interests(NodeId(node), interests)
    raise AssertionError(kind)


def test_a_change_that_changes_nothing_tells_nobody() -> None:
    views = Views()
    views.set_entries({})
    views.set_services({SERVICES[0]: (0, Protocol.TCP)})
    views.set_interests(NODES[0], Interests(called=frozenset(SERVICES)))
    views.connect(NODES[0])
    assert len(views.set_endpoints(SERVICES[0], (endpoint("a"),))) == 1
    assert views.set_endpoints(SERVICES[0], (endpoint("a"),)) == []
    assert views.set_endpoints(SERVICES[1], (endpoint("a"),)) == [], "it has no virtual address yet"


def test_a_transparent_service_is_told_of_all_that_let_it_call_and_of_no_other() -> None:
    web, api, db = SERVICES
    views = Views()
    views.set_entries({})
    views.set_roots(TrustRoots(trust_domain="x"))
    views.set_services({name: (index, Protocol.TCP) for index, name in enumerate(SERVICES)})
    views.set_intentions((Intention(source=web, destination=api, action=Action.ALLOW),))
    views.set_interests(NODES[0], Interests(placed=frozenset({web}), transparent=frozenset({web})))
    assert views.called() == {api}
    views.set_endpoints(api, (endpoint("a"),))
    told = views.connect(NODES[0])
    assert ([one.name for one in told.services], told.intentions[0].reach) == ([api], (api,))
    ((_, update),) = views.set_intentions(
        (
            Intention(source=web, destination="*", action=Action.ALLOW, precedence=6),
            Intention(source=web, destination=api, action=Action.DENY, precedence=9),
        )
    )
    assert (views.called(), update.services_removed, update.intentions[0].reach) == ({db}, (api,), (db,))


def test_a_controller_that_has_just_started_takes_nothing_away() -> None:
    web = SERVICES[0]
    views = Views()
    views.set_entries({})
    views.set_services({web: (0, Protocol.TCP)})
    views.set_interests(NODES[0], Interests(called=frozenset({web}), placed=frozenset({web})))

    first = views.connect(NODES[0])
    assert (first.full, first.services, first.intentions, first.roots) == (False, (), (), None)
    ((_, early),) = views.set_endpoints(web, (endpoint("a"),))
    assert (early.full, early.services[0].endpoints) == (False, (endpoint("a"),))
    views.set_intentions(())
    ((_, whole),) = views.set_roots(TrustRoots(trust_domain="x"))
    assert whole.full
    assert (len(whole.services), len(whole.intentions), whole.roots) == (1, 1, TrustRoots(trust_domain="x"))
    ((_, later),) = views.set_endpoints(web, ())
    assert not later.full


def test_withdrawn_means_that_every_connected_caller_acknowledged() -> None:
    web, gone = SERVICES[0], frozenset({AllocId("a")})
    views = Views()
    views.set_entries({})
    views.set_services({web: (0, Protocol.TCP)})
    for node in NODES:
        views.set_interests(node, Interests(called=frozenset({web})))
        views.acknowledge(node, views.connect(node).version)
    for node, update in views.set_endpoints(web, (endpoint("a"), endpoint("b"))):
        views.acknowledge(node, update.version)
    assert not views.withdrawn(gone, [web])

    updates = views.set_endpoints(web, (endpoint("b"),))
    assert not views.withdrawn(gone, [web])
    first, update = updates[0]
    views.acknowledge(first, update.version)
    assert not views.withdrawn(gone, [web])
    views.disconnect(next(node for node in NODES if node != first))
    assert views.withdrawn(gone, [web])
