"""The catalog's store under any sequence of operations: transactions whole or not at all, indexes that only grow."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.catalog import kv, registry, txn
from controller.catalog.rows import CheckRow, NodeRow, ServiceRow, connect_destination
from controller.catalog.store import Change, Store, connect_topic, node_topic, service_topic

NODES, SERVICES, KEYS = ["n1", "n2"], ["web", "api"], ["a", "a/b", "b"]
TOPICS = (
    *(node_topic(node) for node in NODES),
    *(topic(service) for service in SERVICES for topic in (service_topic, connect_topic)),
    "nodes",
    "services",
    "checks",
    "kv",
)

nodes, services, keys = st.sampled_from(NODES), st.sampled_from(SERVICES), st.sampled_from(KEYS)


def service_row(name: str, port: int, *, proxy: bool) -> ServiceRow:
    if not proxy:
        return ServiceRow(id=name, service=name, port=port)
    destination = {"DestinationServiceName": name}
    return ServiceRow(id=f"{name}-proxy", service=f"{name}-proxy", kind="connect-proxy", port=port, proxy=destination)


operations = st.one_of(
    st.builds(
        lambda verb, node, port: txn.Operation(
            node=txn.NodeOperation(verb=verb, node=NodeRow(node=node, address=f"10.0.0.{port}"))
        ),
        st.sampled_from(["set", "delete", "get", "cas"]),
        nodes,
        st.integers(1, 2),
    ),
    st.builds(
        lambda verb, node, name, port, proxy: txn.Operation(
            service=txn.ServiceOperation(verb=verb, node=node, service=service_row(name, port, proxy=proxy))
        ),
        st.sampled_from(["set", "delete", "get", "delete-cas"]),
        nodes,
        services,
        st.integers(0, 2),
        st.booleans(),
    ),
    st.builds(
        lambda verb, node, check, status, service: txn.Operation(
            check=txn.CheckOperation(
                verb=verb, check=CheckRow(node=node, check_id=check, name=check, status=status, service_id=service)
            )
        ),
        st.sampled_from(["set", "delete", "get"]),
        nodes,
        st.sampled_from(["c1", "c2"]),
        st.sampled_from(["passing", "critical", "strange"]),
        st.sampled_from(["", "web", "api-proxy"]),
    ),
    st.builds(
        lambda verb, key, index: txn.Operation(kv=txn.KvOperation(verb=verb, key=key, value="eA==", index=index)),
        st.sampled_from(["set", "cas", "delete", "delete-tree", "get", "check-not-exists", "check-index"]),
        keys,
        st.integers(0, 3),
    ),
)
transactions = st.lists(st.lists(operations, min_size=1, max_size=5), max_size=12)


def contents(store: Store) -> dict[str, Any]:
    """All that can be read, derived indexes included; deep, so that it does not change with the store."""
    names = ("nodes", "kv", "kv_keys", "sessions", "intentions", "index")
    shown = {name: copy.deepcopy(getattr(store, name)) for name in names}
    for name in ("services", "checks", "by_name", "by_destination"):
        shown[name] = {key: copy.deepcopy(value) for key, value in getattr(store, name).items() if value}
    return shown


@given(transactions)
def test_a_transaction_is_whole_or_not_at_all_and_indexes_only_grow(batches: list[list[txn.Operation]]) -> None:
    store = Store("dc1")
    for batch in batches:
        before = contents(store)
        topics = {topic: store.topic_index(topic) for topic in TOPICS}
        try:
            with store.transaction():
                txn.run(store, batch, 0.0)
        except txn.FailedTransactionError:
            assert contents(store) == before
        else:
            changed = {**contents(store), "index": 0} != {**before, "index": 0}
            assert store.index == before["index"] + 1 or not changed
        for topic, index in topics.items():
            assert index <= store.topic_index(topic) <= store.index
        assert_whole(store)


def assert_whole(store: Store) -> None:
    """Nothing hangs in the air, and the derived indexes say what the tables say."""
    assert set(store.services) <= set(store.nodes)
    assert set(store.checks) <= set(store.nodes)
    for node, checks in store.checks.items():
        assert {check.service_id for check in checks.values()} <= {"", *store.services_of(node)}
    rows = [(node, row) for node, found in store.services.items() for row in found.values()]
    assert {(row.service, node, row.id) for node, row in rows} == {
        (name, *member) for name, members in store.by_name.items() for member in members
    }
    assert {(connect_destination(row), node, row.id) for node, row in rows if connect_destination(row)} == {
        (name, *member) for name, members in store.by_destination.items() for member in members
    }
    assert store.kv_keys == sorted(store.kv)


@given(transactions)
def test_replaying_the_commits_gives_the_same_store(batches: list[list[txn.Operation]]) -> None:
    store, kept = Store("dc1"), dict[tuple[str, str, str], Change]()
    for batch in batches:
        try:
            with store.transaction():
                txn.run(store, batch, 0.0)
        except txn.FailedTransactionError:
            continue
        for change in store.last_commit.changes:
            kept[change.table, change.owner, change.key] = change
    replayed = Store("dc1", store.index)
    replayed.load(change for change in kept.values() if change.row is not None)
    assert contents(replayed) == contents(store)


@given(transactions, nodes, services, st.sampled_from(["passing", "critical"]))
def test_a_change_wakes_who_watches_it(
    batches: list[list[txn.Operation]], node: str, service: str, status: str
) -> None:
    """A check of the node bears on every service of it."""
    store = Store("dc1")
    for batch in batches:
        try:
            with store.transaction():
                txn.run(store, batch, 0.0)
        except txn.FailedTransactionError:
            continue
    with store.transaction():
        registry.set_node(store, NodeRow(node=node, address="10.0.0.9"))
        registry.set_service(store, node, service_row(service, 7, proxy=True))
    before = store.topic_index(connect_topic(service))
    with store.transaction():
        registry.set_check(store, CheckRow(node=node, check_id="fresh", name="fresh", status=status), 0.0)
    assert connect_topic(service) in store.last_commit.topics
    assert store.topic_index(connect_topic(service)) > before


@pytest.mark.parametrize("prefix", ["", "a", "a/", "b", "c"])
def test_prefixes_find_exactly_their_keys(prefix: str) -> None:
    store = Store("dc1")
    names = ["a", "a/b", "a/c", "ab", "b", "b/"]
    with store.transaction():
        for name in reversed(names):
            kv.put(store, name, b"", 0)
    assert store.kv_below(prefix) == [name for name in names if name.startswith(prefix)]
