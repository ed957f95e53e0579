"""Nodes, services and checks: register and deregister, as Consul's catalog does. Pure: works on a `Store`."""

from collections.abc import Mapping

import msgspec

from controller.catalog import sessions
from controller.catalog.rows import CheckRow, JsonObject, NodeRow, ServiceRow
from controller.catalog.store import Store
from outrider.errors import InputError, RefusedError

STATUSES = frozenset({"passing", "warning", "critical", "maintenance"})
_DEFAULT_WEIGHTS = {"Passing": 1, "Warning": 1}


class Registration(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """PUT /v1/catalog/register."""

    id: str = msgspec.field(default="", name="ID")
    node: str = ""
    address: str = ""
    datacenter: str = ""
    tagged_addresses: Mapping[str, str] | None = None
    node_meta: Mapping[str, str] | None = None
    service: ServiceRow | None = None
    check: CheckRow | None = None
    checks: tuple[CheckRow, ...] | None = None
    skip_node_update: bool = False


class Deregistration(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """PUT /v1/catalog/deregister: a service, or a check, or with neither the whole node."""

    node: str = ""
    datacenter: str = ""
    service_id: str = msgspec.field(default="", name="ServiceID")
    check_id: str = msgspec.field(default="", name="CheckID")


def register(store: Store, wanted: Registration, now_s: float) -> None:
    """Raises InputError where a part is missing or contradicts itself."""
    if not wanted.node or not (wanted.address or wanted.skip_node_update):
        raise InputError("Must provide node and address")
    _same_datacenter(store, wanted.datacenter)
    if not (wanted.skip_node_update and wanted.node in store.nodes):
        node = NodeRow(
            id=wanted.id,
            node=wanted.node,
            address=wanted.address,
            tagged_addresses=wanted.tagged_addresses,
            meta=wanted.node_meta,
        )
        set_node(store, node)
    if wanted.service is not None:
        set_service(store, wanted.node, wanted.service)
    for check in (*((wanted.check,) if wanted.check else ()), *(wanted.checks or ())):
        if check.node and check.node != wanted.node:
            raise InputError(f"check {check.check_id!r}: its node {check.node!r} is not {wanted.node!r}")
        set_check(store, msgspec.structs.replace(check, node=wanted.node), now_s)


def deregister(store: Store, unwanted: Deregistration, now_s: float) -> None:
    if not unwanted.node:
        raise InputError("Must provide node")
    _same_datacenter(store, unwanted.datacenter)
    if unwanted.service_id:
        delete_service(store, unwanted.node, unwanted.service_id, now_s)
    elif unwanted.check_id:
        delete_check(store, unwanted.node, unwanted.check_id, now_s)
    else:
        delete_node(store, unwanted.node, now_s)


def set_node(store: Store, row: NodeRow) -> NodeRow:
    if not row.node or not row.address:
        raise InputError("Must provide node and address")
    old = store.nodes.get(row.node)
    row = msgspec.structs.replace(
        row,
        datacenter=store.datacenter,
        id=row.id or (old.id if old else ""),
        create_index=old.create_index if old else store.index + 1,
        modify_index=old.modify_index if old else 0,
    )
    if row != old:  # an equal registration changes nothing and wakes nobody
        row = msgspec.structs.replace(row, modify_index=store.index + 1)
        store.set_node(row.node, row)
    return row


def set_service(store: Store, node: str, row: ServiceRow) -> ServiceRow:
    if node not in store.nodes:
        raise RefusedError("conflict", "Missing node registration")
    if not row.service:
        raise InputError("Must provide service name")
    if row.kind == "connect-proxy":
        _check_proxy(row)
    service_id = row.id or row.service
    old = store.services_of(node).get(service_id)
    row = msgspec.structs.replace(
        row,
        id=service_id,
        weights=row.weights or dict(_DEFAULT_WEIGHTS),
        proxy=row.proxy or {},
        connect=row.connect or {},
        create_index=old.create_index if old else store.index + 1,
        modify_index=old.modify_index if old else 0,
    )
    if row != old:
        row = msgspec.structs.replace(row, modify_index=store.index + 1)
        store.set_service(node, service_id, row)
    return row


def set_check(store: Store, row: CheckRow, now_s: float) -> CheckRow:
    if row.node not in store.nodes:
        raise RefusedError("conflict", "Missing node registration")
    check_id = row.check_id or row.name
    if not check_id:
        raise InputError("Must provide check name or ID")
    status = row.status or "critical"  # Consul: a check is critical until somebody says more
    if status not in STATUSES:
        raise InputError(f"check {check_id!r}: status {status!r} is none of {', '.join(sorted(STATUSES))}")
    service = store.services_of(row.node).get(row.service_id)
    if row.service_id and service is None:
        raise RefusedError("conflict", "Missing service registration")
    old = store.checks_of(row.node).get(check_id)
    row = msgspec.structs.replace(
        row,
        check_id=check_id,
        status=status,
        service_name=service.service if service else "",
        service_tags=service.tags if service else None,
        definition=row.definition or {},
        create_index=old.create_index if old else store.index + 1,
        modify_index=old.modify_index if old else 0,
    )
    if row != old:
        row = msgspec.structs.replace(row, modify_index=store.index + 1)
        store.set_check(row.node, check_id, row)
    if status == "critical":
        sessions.invalidate_check(store, row.node, check_id, now_s)
    return row


def delete_node(store: Store, node: str, now_s: float) -> None:
    for service_id in tuple(store.services_of(node)):
        delete_service(store, node, service_id, now_s)
    for check_id in tuple(store.checks_of(node)):
        delete_check(store, node, check_id, now_s)
    sessions.invalidate_node(store, node, now_s)
    store.set_node(node, None)


def delete_service(store: Store, node: str, service_id: str, now_s: float) -> None:
    for check in tuple(store.checks_of(node).values()):
        if check.service_id == service_id:
            delete_check(store, node, check.check_id, now_s)
    store.set_service(node, service_id, None)


def delete_check(store: Store, node: str, check_id: str, now_s: float) -> None:
    if check_id in store.checks_of(node):
        sessions.invalidate_check(store, node, check_id, now_s)
        store.set_check(node, check_id, None)


def checks_for(store: Store, node: str, service_id: str) -> list[CheckRow]:
    """The checks that bear on one instance: its own and its node's."""
    checks = store.checks_of(node)
    return [checks[name] for name in sorted(checks) if checks[name].service_id in ("", service_id)]


def _check_proxy(row: ServiceRow) -> None:
    proxy: JsonObject = row.proxy or {}
    if not proxy.get("DestinationServiceName"):
        raise InputError("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
    if not row.port:
        raise InputError("Port must be set for a Connect proxy")
    for upstream in proxy.get("Upstreams") or ():
        if not isinstance(upstream, dict) or not upstream.get("LocalBindPort"):
            raise InputError("upstream local bind port cannot be zero")


def _same_datacenter(store: Store, datacenter: str) -> None:
    if datacenter and datacenter != store.datacenter:
        raise InputError("No path to datacenter")
