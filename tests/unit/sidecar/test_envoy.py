"""Whose configuration an Envoy has, and when it is told: its one allocation's, or that of all that share it."""

import asyncio
from pathlib import Path

import msgspec

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.mesh import Leaf, MeshView, TrustRoots
from sidecar.admin import Admin
from sidecar.ads import Stream
from sidecar.core.intent import SidecarService, SidecarSpec
from sidecar.core.resources import Kind
from sidecar.core.subscription import Rejection, Request, Subscription
from sidecar.directory import SHARED, SidecarState
from sidecar.envoy import Envoy
from sidecar.sidecar import Sidecar

API, WEB = ServiceName("api"), ServiceName("web")
VIEW = MeshView(roots=TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=("root",)))
LEAVES = {name: Leaf(service=name, certificate_pem="c", key_pem="k") for name in (API, WEB)}


def _share(alloc: str, service: ServiceName) -> Sidecar:
    served = SidecarService(service=service, public_port=15100, workload_port=8080)
    spec = SidecarSpec(
        alloc=AllocId(alloc), node=NodeId("n1"), uid=1, local_address="100.64.4.2", services=(served,), shared=True
    )
    return Sidecar(spec, SidecarState())


def _envoy(*parts: Sidecar) -> Envoy:
    envoy = Envoy(SHARED, "token", Admin(SHARED, Path("/nowhere")), shared=True)
    for part in parts:
        envoy.parts[part.alloc] = part
        part.update(VIEW, {})
    envoy.refresh()
    return envoy


def _listeners(envoy: Envoy) -> set[str]:
    return set(envoy.versions[Kind.LISTENER])


def test_a_shared_one_has_what_is_complete_and_waits_for_nobody() -> None:
    api, web = _share("0000000001", API), _share("0000000002", WEB)
    envoy = _envoy(api, web)
    assert (envoy.complete, _listeners(envoy)) == (True, set()), "it starts, with nothing"
    api.update(VIEW, LEAVES)
    envoy.refresh()
    assert _listeners(envoy) == {"0000000001/inbound/api"}
    assert envoy.why_not(web) == "the controller has not sent the certificate of service web"
    del envoy.parts[api.alloc]
    envoy.refresh()
    assert _listeners(envoy) == set()


def test_one_that_outlived_an_agent_keeps_what_it_has_of_each_until_that_is_known_again() -> None:
    api, web = _share("0000000001", API), _share("0000000002", WEB)
    envoy = _envoy(api, web)
    envoy.awaited = {api.alloc, web.alloc}
    subscription = Subscription(envoy.kept)
    has = {f"{part.alloc}/inbound/{name}": "before" for part in (api, web) for name in ("api", "web", "gone")}
    subscription.receive(Request(kind=Kind.LISTENER, versions=has))
    assert subscription.responses(envoy.versions) == ()
    api.update(VIEW, LEAVES)
    envoy.refresh()
    (response,) = subscription.responses(envoy.versions)
    assert response.changed == ("0000000001/inbound/api",)
    assert set(response.removed) == {"0000000001/inbound/gone", "0000000001/inbound/web"}
    web.update(VIEW, LEAVES)
    envoy.refresh()
    web.update(msgspec.structs.replace(VIEW, roots=TrustRoots()), LEAVES)
    envoy.refresh()
    assert len(_listeners(envoy)) == 2, "what is missing later takes nothing away"


def test_a_refusal_is_told_to_whose_it_is() -> None:
    api, web = _share("0000000001", API), _share("0000000002", WEB)
    envoy = _envoy(api, web)
    for part in (api, web):
        part.update(VIEW, LEAVES)
    envoy.refresh()
    names = ("0000000001/leaf/api", "0000000009/leaf/gone")
    envoy.answered(Rejection(kind=Kind.SECRET, names=names, error="no certificate"))
    assert envoy.rejected(api) == "0000000001/leaf/api: no certificate"
    assert envoy.rejected(web) == ""
    assert (envoy.whose("0000000001/api"), envoy.whose("0000000002/web")) == (api.alloc, web.alloc)


async def test_a_share_is_served_once_its_envoy_has_answered_for_all() -> None:
    api = _share("0000000001", API)
    envoy = _envoy(api)
    api.update(VIEW, LEAVES)
    envoy.refresh()
    subscription = Subscription()
    envoy.connected(Stream(subscription, asyncio.Event()))
    for kind in (Kind.CLUSTER, Kind.LISTENER):
        subscription.receive(Request(kind=kind))
    for response in subscription.responses(envoy.versions):
        assert not envoy.serves(api)
        subscription.receive(Request(kind=response.kind, nonce=response.nonce))
    assert envoy.serves(api)
