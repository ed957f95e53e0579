"""Values as Envoy's messages: encoded once, versioned by content, and nothing in a listener that varies."""

import json

from google.protobuf import json_format

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Endpoint, Intention, Leaf, MeshService, MeshView, TrustRoots
from sidecar.bootstrap import bootstrap
from sidecar.core.access import ANYONE, AccessRule, access_rules, remember
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from sidecar.core.resources import AccessRules, EndpointSet, Kind, resources
from sidecar.render import render

API, DB = ServiceName("api"), ServiceName("db")


def _versions(*, roots: tuple[str, ...], key: str, address: str, intentions: tuple[Intention, ...]) -> dict[str, str]:
    """name -> version of all that one sidecar is sent."""
    spec = SidecarSpec(
        alloc=AllocId("1"),
        node=NodeId("n"),
        uid=1,
        local_address="10.9.0.9",
        services=(
            SidecarService(
                service=API,
                public_port=15100,
                workload_port=80,
                protocol=Protocol.HTTP,
                upstreams=(SidecarUpstream(service=DB),),
            ),
        ),
    )
    endpoints = (Endpoint(id="1", node="m", address=address, port=1),)
    view = MeshView(
        services={DB: MeshService(name=DB, virtual_address="198.18.1.0", endpoints=endpoints)},
        intentions={API: intentions},
        roots=TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=roots),
    )
    history = remember({}, {API: access_rules(API, intentions, view.roots)})
    found = resources(spec, view, {API: Leaf(service=API, certificate_pem="c", key_pem=key)}, history)
    return {
        f"{kind} {name}": render(resource).version
        for kind, by_name in found.resources.items()
        for name, resource in by_name.items()
    }


def test_what_varies_changes_its_own_resource_and_no_listener_or_cluster() -> None:
    allow = Intention(source="web", destination="api", action=Action.ALLOW, id="1")
    base = {"roots": ("r",), "key": "k", "address": "10.0.0.1", "intentions": ()}
    before = _versions(**base)  # type: ignore[arg-type]
    for change, changed in (
        ({"roots": ("r2", "r")}, "secret roots"),
        ({"key": "k2"}, "secret leaf/api"),
        ({"address": "10.0.0.2"}, "endpoints db"),
        ({"intentions": (allow,)}, "rules rules/api"),
    ):
        after = _versions(**{**base, **change})  # type: ignore[arg-type]
        assert {name for name in after if after[name] != before[name]} == {changed}


def test_equal_contents_are_encoded_once() -> None:
    one, other = (EndpointSet(name="db", tiers=((("10.0.0.1", 1),),)) for _ in range(2))
    assert render(one) is render(other)


def test_anyone_is_a_pattern_in_which_the_trust_domains_dots_are_dots() -> None:
    rules = AccessRules(
        name="rules/db",
        service=DB,
        protocol=Protocol.TCP,
        trust_domain="mesh.consul",
        datacenter="dc1",
        rules=(AccessRule(name="allow", source=ANYONE, action=Action.ALLOW),),
    )
    text = json.dumps(json_format.MessageToDict(render(rules)))
    assert json.dumps(r"spiffe://mesh\.consul/ns/default/dc/dc1/svc/[a-z0-9-]+") in text
    assert Kind.RULES.value in text


def test_the_bootstrap_listens_nowhere_but_on_a_unix_socket() -> None:
    config = bootstrap(AllocId("1"), "secret")
    assert config["admin"] == {"address": {"pipe": {"path": "/run/outrider/sidecar/admin.sock", "mode": 0o600}}}
    assert "socket_address" not in json.dumps(config)
