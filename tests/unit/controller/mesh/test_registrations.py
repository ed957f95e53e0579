"""What is written to the catalog, and when nothing is."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from controller.core.mesh_intent import NodeRegistration, ServiceRegistration
from controller.mesh.registrations import (
    AGENT_SERVICE,
    BODY_BYTES_MAX,
    OPERATIONS_MAX,
    NodeRecord,
    batches,
    found_record,
    operations,
    wanted_record,
)
from controller.mesh.shapes import CatalogNodeServices, Txn, TxnKv
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.job import Protocol

API = ServiceName("api")
ADDRESSES = {API: "198.18.1.1"}


def record(*services: ServiceRegistration, passing: bool = True) -> NodeRecord:
    registration = NodeRegistration(
        node=NodeId("n1"), address="10.0.0.1", passing=passing, output="", services=services
    )
    return wanted_record(registration, "c", ADDRESSES)


def service(alloc: str, **more: Any) -> ServiceRegistration:
    values: dict[str, Any] = {"port": 2000, "local_address": "10.9.0.1", "local_port": 15100, "passing": True, **more}
    return ServiceRegistration(
        alloc=AllocId(alloc), service=ServiceName("web"), protocol=Protocol.HTTP, job=JobName("shop"), **values
    )


def kinds(found: tuple[Txn, ...]) -> list[str]:
    return [next(name for name in ("node", "service", "check") if getattr(step, name) is not None) for step in found]


def test_what_stands_as_wanted_is_not_written() -> None:
    assert not operations(record(service("a")), record(service("a")))


def test_a_health_change_is_one_check_for_service_and_one_for_its_proxy() -> None:
    steps = operations(record(service("a")), record(service("a", passing=False)))
    assert (kinds(steps.first), steps.proxies, kinds(steps.last)) == ([], (), ["check", "check"])


def test_node_loss_is_one_check() -> None:
    steps = operations(record(service("a"), service("b")), record(service("a"), service("b"), passing=False))
    assert (kinds(steps.first), steps.proxies, kinds(steps.last)) == ([], (), ["check"])


def test_a_new_instance_has_its_proxy_appear_with_its_health() -> None:
    steps = operations(record(), record(service("a", upstreams=(API, ServiceName("unknown")))))
    assert kinds(steps.first) == ["service"]
    (proxy,) = steps.proxies
    assert (proxy.service.kind, proxy.check.status) == ("connect-proxy", "passing")
    assert proxy.service.proxy is not None
    assert proxy.service.proxy.upstreams is not None
    assert [(one.destination_name, one.local_bind_address) for one in proxy.service.proxy.upstreams] == [
        ("api", "198.18.1.1")
    ]


def test_a_service_that_only_calls_has_no_proxy() -> None:
    assert operations(record(), record(service("a", port=0))).proxies == ()


def test_an_agents_figures_are_found_by_consul() -> None:
    registration = NodeRegistration(
        node=NodeId("n1"), address="10.0.0.1", passing=True, output="", metrics_address="10.0.0.1:9464"
    )
    wanted = wanted_record(registration, "c", ADDRESSES)
    row = wanted.services[AGENT_SERVICE]
    assert (row.service, row.address, row.port) == ("outrider-agent", "10.0.0.1", 9464)
    assert row.meta == {"outrider-cluster": "c", "component": "agent", "node": "n1"}
    assert not operations(wanted, wanted)


def test_a_node_that_is_gone_is_one_deletion() -> None:
    steps = operations(record(service("a")), None)
    assert (kinds(steps.first), steps.proxies, steps.last) == (["node"], (), ())
    assert not operations(None, None)


@given(st.lists(st.booleans(), max_size=4), st.lists(st.booleans(), max_size=4))
def test_what_consul_shows_of_a_record_equals_it(before: list[bool], after: list[bool]) -> None:
    """Written out, read back with what Consul adds, compared: no endless repair."""
    wanted = record(*(service(f"a{number}", passing=passing) for number, passing in enumerate(after)))
    shown = {"Node": as_consul_shows(wanted.node), "Services": {}}
    for name, row in wanted.services.items():
        shown["Services"][name] = {**as_consul_shows(row), "Weights": {"Passing": 1}, "Connect": {}, "Tags": []}
        shown["Services"][name].setdefault("Proxy", {"MeshGateway": {}, "Expose": {}})
        shown["Services"][name]["TaggedAddresses"] = {
            **shown["Services"][name].get("TaggedAddresses", {}),
            "consul-virtual": {"Address": "240.0.0.1", "Port": 1},
        }
    found = found_record(msgspec.convert(shown, CatalogNodeServices), tuple(wanted.checks.values()))
    assert found == wanted
    old = record(*(service(f"a{number}", passing=passing) for number, passing in enumerate(before)))
    assert bool(operations(old, found)) == (before != after)


def as_consul_shows(value: msgspec.Struct) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(value)
    return shown


@given(st.lists(st.integers(1, BODY_BYTES_MAX // 2), max_size=200).map(lambda sizes: sizes[:150]))
def test_batches_keep_order_and_limits(sizes: list[int]) -> None:
    large = "x" * 100_000
    steps = [Txn(kv=TxnKv(verb="get", key=f"{number}-{large[: size % 100_000]}")) for number, size in enumerate(sizes)]
    cut = batches(steps)
    assert [step for batch in cut for step in batch] == steps
    assert all(0 < len(batch) <= OPERATIONS_MAX for batch in cut)
    assert all(len(msgspec.json.encode(batch)) <= BODY_BYTES_MAX + 2 for batch in cut)
