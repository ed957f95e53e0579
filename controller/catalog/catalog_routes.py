"""/v1/catalog and /v1/health: what is registered, and how it fares."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from controller.catalog import registry
from controller.catalog.api import Access, Answer, Call, Route, Scope, decode
from controller.catalog.rows import CheckRow, NodeRow, ServiceRow
from controller.catalog.store import CHECKS, NODES, SERVICES, Store, connect_topic, node_topic, service_topic


def register(scope: Scope, call: Call) -> Answer:
    registry.register(scope.store, decode(call, registry.Registration), call.monotonic_s)
    return Answer(body=True)


def deregister(scope: Scope, call: Call) -> Answer:
    registry.deregister(scope.store, decode(call, registry.Deregistration), call.monotonic_s)
    return Answer(body=True)


def datacenters(scope: Scope, _call: Call) -> Answer:
    return Answer(body=[scope.store.datacenter])


def nodes(scope: Scope, call: Call) -> Answer:
    rows = scope.store.nodes
    wanted = [rows[name] for name in sorted(rows) if _has_meta(rows[name].meta, call)]
    return _answer(scope, wanted, NODES)


def services(scope: Scope, call: Call) -> Answer:
    found: dict[str, set[str]] = {}
    for node, rows in scope.store.services.items():
        if _has_meta(scope.store.nodes[node].meta, call):
            for row in rows.values():
                found.setdefault(row.service, set()).update(row.tags or ())
    return _answer(scope, {name: sorted(found[name]) for name in sorted(found)}, SERVICES, NODES)


def node(scope: Scope, call: Call) -> Answer:
    name = call.path["name"]
    row = scope.store.nodes.get(name)
    body = None if row is None else {"Node": row, "Services": scope.store.services_of(name)}
    return _answer(scope, body, node_topic(name))


def service(scope: Scope, call: Call) -> Answer:
    instances = _instances(scope.store, scope.store.by_name, call)
    return _answer(scope, [_flat(*one) for one in instances], service_topic(call.path["name"]))


def connect(scope: Scope, call: Call) -> Answer:
    instances = _instances(scope.store, scope.store.by_destination, call)
    return _answer(scope, [_flat(*one) for one in instances], connect_topic(call.path["name"]))


def health_node(scope: Scope, call: Call) -> Answer:
    name = call.path["name"]
    checks = scope.store.checks_of(name)
    return _answer(scope, [checks[check] for check in sorted(checks)], node_topic(name))


def health_service(scope: Scope, call: Call) -> Answer:
    instances = _instances(scope.store, scope.store.by_name, call)
    return _answer(scope, _health(scope.store, instances, call), service_topic(call.path["name"]))


def health_connect(scope: Scope, call: Call) -> Answer:
    instances = _instances(scope.store, scope.store.by_destination, call)
    return _answer(scope, _health(scope.store, instances, call), connect_topic(call.path["name"]))


def health_checks(scope: Scope, call: Call) -> Answer:
    name = call.path["name"]
    rows = [row for row in _all_checks(scope.store) if row.service_name == name]
    return _answer(scope, rows, service_topic(name))


def health_state(scope: Scope, call: Call) -> Answer:
    state = call.path["state"]
    of_node = {name for name, row in scope.store.nodes.items() if _has_meta(row.meta, call)}
    rows = [row for row in _all_checks(scope.store) if state in ("any", row.status) and row.node in of_node]
    return _answer(scope, rows, CHECKS, NODES)


def _instances(
    store: Store, index: Mapping[str, set[tuple[str, str]]], call: Call
) -> Iterable[tuple[NodeRow, ServiceRow]]:
    tag = call.query.get("tag")
    for name, service_id in sorted(index.get(call.path["name"], ())):
        row = store.services[name][service_id]
        if _has_meta(store.nodes[name].meta, call) and (tag is None or tag in (row.tags or ())):
            yield store.nodes[name], row


def _health(store: Store, instances: Iterable[tuple[NodeRow, ServiceRow]], call: Call) -> list[dict[str, Any]]:
    # Consul: any `passing` but an explicit "false" filters, and a warning does not pass.
    passing = call.flag("passing") and call.query["passing"].lower() not in ("false", "f")
    found = []
    for node_row, service_row in instances:
        checks = registry.checks_for(store, node_row.node, service_row.id)
        if not passing or all(check.status == "passing" for check in checks):
            found.append({"Node": node_row, "Service": service_row, "Checks": checks})
    return found


def _all_checks(store: Store) -> Iterable[CheckRow]:
    for name in sorted(store.checks):
        yield from (store.checks[name][check] for check in sorted(store.checks[name]))


def _flat(node_row: NodeRow, row: ServiceRow) -> dict[str, Any]:
    """Consul's older shape: node and service in one object."""
    shown = msgspec.to_builtins(row)
    prefixed = {"ServiceID": row.id, "ServiceName": row.service}
    for name in ("Kind", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "Weights", "EnableTagOverride"):
        prefixed[f"Service{name}"] = shown[name]
    return {
        "ID": node_row.id,
        "Node": node_row.node,
        "Address": node_row.address,
        "Datacenter": node_row.datacenter,
        "TaggedAddresses": node_row.tagged_addresses,
        "NodeMeta": node_row.meta,
        **prefixed,
        "ServiceProxy": row.proxy,
        "ServiceConnect": row.connect,
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }


def _has_meta(meta: Mapping[str, str] | None, call: Call) -> bool:
    if "node-meta" not in call.query:
        return True
    key, _, value = call.query["node-meta"].partition(":")
    return meta is not None and key in meta and value in ("", meta[key])


def _answer(scope: Scope, body: object, *topics: str) -> Answer:
    return Answer(body=body, index=scope.store.topic_index(*topics), topics=topics)


def _read(path: str, handler: Callable[[Scope, Call], Answer]) -> Route:
    return Route(method="GET", path=path, access=Access.READ, handler=handler)


ROUTES = (
    Route(method="PUT", path="/catalog/register", access=Access.WRITE, handler=register),
    Route(method="PUT", path="/catalog/deregister", access=Access.WRITE, handler=deregister),
    _read("/catalog/datacenters", datacenters),
    _read("/catalog/nodes", nodes),
    _read("/catalog/services", services),
    _read("/catalog/node/{name}", node),
    _read("/catalog/service/{name}", service),
    _read("/catalog/connect/{name}", connect),
    _read("/health/node/{name}", health_node),
    _read("/health/service/{name}", health_service),
    _read("/health/connect/{name}", health_connect),
    _read("/health/checks/{name}", health_checks),
    _read("/health/state/{state}", health_state),
)
