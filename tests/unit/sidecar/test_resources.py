"""What a sidecar should have, from its spec and its node's view."""

from collections.abc import Mapping

import msgspec

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import Endpoint, Leaf, MeshService, MeshView, TrustRoots
from sidecar.core.access import AccessHistory
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from sidecar.core.resources import (
    EndpointSet,
    InboundListener,
    Kind,
    OutboundListener,
    Resource,
    UpstreamCluster,
    resources,
)
from sidecar.render import render

API, DB, WEB = ServiceName("api"), ServiceName("db"), ServiceName("web")
ROOTS = TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=("root",))
LEAVES = {name: Leaf(service=name, certificate_pem="c", key_pem="k") for name in (API, DB, WEB)}
NEAR = Endpoint(id="1", node="n1", address="10.0.0.1", port=20001, local_address="10.9.0.2", local_port=15100)
FAR = Endpoint(id="2", node="n2", address="10.0.0.2", port=20002, local_address="10.9.0.2", local_port=15100)
SICK = Endpoint(id="3", node="n3", address="10.0.0.3", port=20003, healthy=False)


def _spec(*services: SidecarService) -> SidecarSpec:
    return SidecarSpec(
        alloc=AllocId("0000000001"), node=NodeId("n1"), uid=1, local_address="10.9.0.9", services=services
    )


def _view(protocol: Protocol = Protocol.TCP) -> MeshView:
    db = MeshService(name=DB, virtual_address="198.18.1.0", protocol=protocol, endpoints=(NEAR, FAR, SICK))
    return MeshView(services={DB: db}, roots=ROOTS)


CALLER = SidecarService(service=WEB, public_port=15100, upstreams=(SidecarUpstream(service=DB, local_port=5432),))
SERVER = SidecarService(service=API, public_port=15100, workload_port=8080)


def test_an_endpoint_of_the_same_node_is_dialled_at_its_local_address_and_a_sick_one_not_at_all() -> None:
    found = resources(_spec(CALLER), _view(), LEAVES, {}).resources[Kind.ENDPOINTS]
    assert found == {"db": EndpointSet(name="db", tiers=((("10.9.0.2", 15100), ("10.0.0.2", 20002)),))}


def test_an_upstream_listens_on_its_virtual_address_and_where_the_job_asks() -> None:
    listeners = resources(_spec(CALLER), _view(), LEAVES, {}).resources[Kind.LISTENER].values()
    places = {(each.address, each.port) for each in listeners if isinstance(each, OutboundListener)}
    assert places == {("198.18.1.0", 15001), ("127.0.0.1", 5432)}


def test_two_services_that_share_an_upstream_do_not_bind_its_address_twice() -> None:
    other = SidecarService(service=API, public_port=15101, upstreams=(SidecarUpstream(service=DB),))
    listeners = resources(_spec(CALLER, other), _view(), LEAVES, {}).resources[Kind.LISTENER].values()
    assert len({(each.address, each.port) for each in listeners}) == len(listeners) == 2  # type: ignore[union-attr]


def test_the_public_listener_binds_the_allocations_own_address() -> None:
    listener = resources(_spec(SERVER), _view(), LEAVES, {}).resources[Kind.LISTENER]["inbound/api"]
    assert isinstance(listener, InboundListener)
    assert (listener.address, listener.port) == ("10.9.0.9", 15100)


def test_a_peer_is_expected_under_exactly_its_name_and_addressed_in_consuls_form() -> None:
    cluster = resources(_spec(CALLER), _view(), LEAVES, {}).resources[Kind.CLUSTER]["outbound/web/db"]
    assert isinstance(cluster, UpstreamCluster)
    assert cluster.peers == ("spiffe://mesh.consul/ns/default/dc/dc1/svc/db",)
    assert cluster.sni == "db.default.dc1.internal.mesh.consul"


def test_routes_exist_for_http_only() -> None:
    assert not resources(_spec(CALLER), _view(), LEAVES, {}).resources[Kind.ROUTES]
    assert set(resources(_spec(CALLER), _view(Protocol.GRPC), LEAVES, {}).resources[Kind.ROUTES]) == {"outbound/web/db"}


def test_only_a_revision_changes_a_public_listener() -> None:
    def listener(revision: int) -> object:
        history = {API: AccessHistory(revision=revision)}
        return resources(_spec(SERVER), _view(), LEAVES, history).resources[Kind.LISTENER]["inbound/api"]

    assert listener(0) == listener(0)
    assert listener(0) != listener(1)


def test_a_transparent_service_listens_for_what_is_in_its_reach_and_needs_a_certificate_for_it() -> None:
    walker = SidecarService(service=ServiceName("walker"), public_port=15100)
    view = _view()
    reaching = msgspec.structs.replace(view, reach={walker.service: (*view.services, ServiceName("unknown"))})
    assert resources(_spec(walker), view, {}, {}).missing == ()
    found = resources(_spec(walker), reaching, {}, {})
    assert found.missing == ("the certificate of service walker",)
    listeners = found.resources[Kind.LISTENER].values()
    assert {one.destination for one in listeners if isinstance(one, OutboundListener)} == set(view.services)


def test_what_is_missing_is_named() -> None:
    assert resources(_spec(CALLER), MeshView(), LEAVES, {}).missing == ("the mesh's trust roots",)
    missing = resources(_spec(CALLER), MeshView(roots=ROOTS), {}, {}).missing
    assert missing == ("the certificate of service web", "the virtual address of upstream db")


def test_a_service_that_neither_serves_nor_calls_needs_nothing() -> None:
    found = resources(_spec(SidecarService(service=WEB, public_port=15100)), _view(), {}, {})
    assert found.missing == ()
    assert not found.resources[Kind.LISTENER]


def test_of_a_shared_sidecar_every_name_is_the_allocations_and_so_are_its_listeners_addresses() -> None:
    view = _view(Protocol.HTTP)

    def share(alloc: str, address: str) -> Mapping[Kind, Mapping[str, Resource]]:
        upstream = SidecarUpstream(service=DB)
        both = SidecarService(service=WEB, public_port=15100, workload_port=8080, upstreams=(upstream,))
        spec = _spec(both)
        changed = msgspec.structs.replace(spec, alloc=AllocId(alloc), local_address=address, shared=True)
        return resources(changed, view, LEAVES, {}).resources

    one, other = share("0000000001", "100.64.4.2"), share("0000000002", "100.64.4.3")
    assert all(name.startswith("0000000001/") for by_name in one.values() for name in by_name)
    assert all(one[kind].keys().isdisjoint(other[kind]) for kind in Kind)
    places = [
        {(each.address, each.port) for each in found[Kind.LISTENER].values()}  # type: ignore[union-attr]
        for found in (one, other)
    ]
    assert places == [{("240.4.0.0", 15100), ("240.4.1.0", 15001)}, {("240.6.0.0", 15100), ("240.6.1.0", 15001)}]
    texts = [str([render(each).resource.value for each in found[kind].values()]) for found in (one,) for kind in Kind]
    unscoped = [name for text in texts for name in ("outbound/web/db", "roots", "leaf/web", "local/web", "rules/web")
                if text.replace(f"0000000001/{name}", "").count(name)]  # fmt: skip
    assert unscoped == [], "what refers to a resource names it in full"
