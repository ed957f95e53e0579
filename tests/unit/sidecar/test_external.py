"""Ways outside as a sidecar has them: by port, told where hosts are, and a listener that never changes."""

import json

from google.protobuf import json_format

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.external import External, ExternalPort, ExternalTls
from outrider.model.mesh import MeshView, TrustRoots
from sidecar.core.external import ExternalListener
from sidecar.core.intent import SidecarService, SidecarSpec
from sidecar.core.resources import EndpointSet, Kind, Resource, resources
from sidecar.render import render

PAY = External(
    name=ServiceName("pay"),
    hosts=("a.example", "203.0.113.9"),
    ports=(ExternalPort(port=80, to=443), ExternalPort(port=443, to=443), ExternalPort(port=25, to=25)),
    tls=ExternalTls(server_name="a.example"),
)
MAIL = External(name=ServiceName("mail"), hosts=("b.example",), ports=(ExternalPort(port=25, to=25),))
SPEC = SidecarSpec(
    alloc=AllocId("1"),
    node=NodeId("n"),
    uid=1,
    local_address="10.9.0.9",
    services=(SidecarService(service=ServiceName("web"), public_port=15100),),
    external=(PAY, MAIL),
)
VIEW = MeshView(roots=TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=("r",)))
FOUND = {"a.example": ("203.0.113.1", "203.0.113.2"), "203.0.113.9": ("203.0.113.9",)}


def made(addresses: dict[str, tuple[str, ...]]) -> dict[Kind, dict[str, Resource]]:
    found = resources(SPEC, VIEW, {}, {}, addresses=addresses)
    assert found.missing == (), "a certificate of the mesh is not needed to call outside of it"
    return {kind: dict(by_name) for kind, by_name in found.resources.items()}


def test_each_port_has_the_hosts_at_where_it_leads() -> None:
    endpoints = made(FOUND)[Kind.ENDPOINTS]
    hosts = ("203.0.113.1", "203.0.113.2", "203.0.113.9")
    assert endpoints == {
        "external/pay/443": EndpointSet(name="external/pay/443", tiers=(tuple((host, 443) for host in hosts),)),
        "external/pay/25": EndpointSet(name="external/pay/25", tiers=(tuple((host, 25) for host in hosts),)),
        "external/mail/25": EndpointSet(name="external/mail/25"),
    }


def test_where_hosts_are_changes_endpoints_alone() -> None:
    before, after = made({}), made(FOUND)
    changed = {kind for kind in Kind if before[kind] != after[kind]}
    assert changed == {Kind.ENDPOINTS}


def test_a_port_that_is_not_listed_leads_nowhere() -> None:
    found = made(FOUND)
    listener = found[Kind.LISTENER]["external/pay"]
    assert isinstance(listener, ExternalListener)
    assert (listener.address, found[Kind.LISTENER]["external/mail"].address) == ("198.19.255.0", "198.19.255.1")  # type: ignore[union-attr]
    rendered = json_format.MessageToDict(render(listener))["resource"]
    by_port = {
        chain["filterChainMatch"]["destinationPort"]: chain["filters"][0]["typedConfig"]["cluster"]
        for chain in rendered["filterChains"]
    }
    assert by_port == {80: "external/pay/443", 443: "external/pay/443", 25: "external/pay/25"}
    otherwise = rendered["defaultFilterChain"]["filters"][0]["typedConfig"]["cluster"]
    nowhere = json_format.MessageToDict(render(found[Kind.CLUSTER][otherwise]))["resource"]
    assert "loadAssignment" not in nowhere
    assert "edsClusterConfig" not in nowhere


def test_tls_expects_the_one_name_from_whom_is_trusted() -> None:
    clusters = made(FOUND)[Kind.CLUSTER]
    text = json.dumps(json_format.MessageToDict(render(clusters["external/pay/443"])))
    assert '"sni": "a.example"' in text
    assert '{"exact": "a.example"}' in text
    assert "/etc/ssl/certs/ca-certificates.crt" in text
    assert "transportSocket" not in json.dumps(json_format.MessageToDict(render(clusters["external/mail/25"])))
