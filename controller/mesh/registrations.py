"""What a node should have in the catalog, what it has, and the operations that make the one the other. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from controller.core.mesh_intent import NodeRegistration, ServiceRegistration
from controller.mesh.shapes import (
    CatalogNode,
    CatalogNodeServices,
    ConsulCheck,
    ConsulService,
    Proxy,
    Registration,
    TaggedAddress,
    Txn,
    TxnCheck,
    TxnNode,
    TxnService,
    Upstream,
)
from outrider.config import host_port
from outrider.ids import NodeId, ServiceName
from outrider.model.job import Value
from outrider.model.mesh import VIRTUAL_PORT

CLUSTER_META, NODE_META = "outrider-cluster", "outrider-node"
ALLOC_META, JOB_META, PROTOCOL_META = "outrider-alloc", "outrider-job", "outrider-protocol"
LOCAL_ADDRESS = "outrider-local"  # where sidecars of the same node dial (DESIGN, decision 10)
NODE_CHECK = "outrider-node"
# Consul: 64 operations and 524,288 bytes of body; one operation is the session check.
OPERATIONS_MAX = 63
AGENT_SERVICE = "outrider-agent"
BODY_BYTES_MAX = 500_000
_OWN_ADDRESSES = ("lan", LOCAL_ADDRESS)
_OUTPUT_CHARS_MAX = 1024


class NodeRecord(Value, frozen=True, kw_only=True):
    """One node's part of the catalog, in a form in which equal means equal."""

    node: CatalogNode
    services: Mapping[str, ConsulService] = {}
    checks: Mapping[str, ConsulCheck] = {}


class Operations(Value, frozen=True, kw_only=True):
    """In this order. Consul 1.8's transactions silently drop what makes a service a proxy (its kind, its destination,
    its tagged addresses): proxies are registered one by one."""

    first: tuple[Txn, ...] = ()
    proxies: tuple[Registration, ...] = ()
    last: tuple[Txn, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.first or self.proxies or self.last)


def consul_node(cluster: str, node: NodeId) -> str:
    return f"{cluster}-{node}"


def service_check(service_id: str) -> str:
    return f"service:{service_id}"


def wanted_record(
    registration: NodeRegistration, cluster: str, virtual_addresses: Mapping[ServiceName, str]
) -> NodeRecord:
    """`virtual_addresses` place the upstreams that the catalog shows; one without an address is left out."""
    name = consul_node(cluster, registration.node)
    services: dict[str, ConsulService] = {}
    checks = {NODE_CHECK: _check(name, NODE_CHECK, "Outrider node", registration.passing, registration.output)}
    for service in registration.services:
        for row in _rows(service, registration.address, virtual_addresses):
            services[row.id] = row
            check_id = service_check(row.id)
            check = _check(name, check_id, f"Outrider {service.service}", service.passing, service.output)
            checks[check_id] = msgspec.structs.replace(check, service_id=row.id)
    if registration.metrics_address:
        row = _agent(registration, cluster)
        services[row.id] = row
    meta = {"external-node": "true", CLUSTER_META: cluster, NODE_META: registration.node}
    node = CatalogNode(node=name, address=registration.address, meta=meta)
    return NodeRecord(node=node, services=services, checks=checks)


def _agent(registration: NodeRegistration, cluster: str) -> ConsulService:
    """The agent's own figures: what a Prometheus that discovers by Consul scrapes. No mesh service."""
    host, port = host_port(registration.metrics_address)
    meta = {CLUSTER_META: cluster, "component": "agent", "node": registration.node}
    return ConsulService(id=AGENT_SERVICE, service=AGENT_SERVICE, address=host, port=port, meta=meta)


def found_record(found: CatalogNodeServices, checks: Iterable[ConsulCheck]) -> NodeRecord:
    """What Consul answered, without what it adds on its own."""
    node = msgspec.structs.replace(found.node, meta=dict(found.node.meta or {}))
    services = {name: own_part(row) for name, row in (found.services or {}).items()}
    return NodeRecord(node=node, services=services, checks={check.check_id: check for check in checks})


def operations(known: NodeRecord | None, wanted: NodeRecord | None) -> Operations:
    """What turns `known` into `wanted`; None is a node that is not there."""
    if wanted is None:
        gone_node = () if known is None else (Txn(node=TxnNode(verb="delete", node=known.node)),)
        return Operations(first=gone_node)
    found = known or NodeRecord(node=CatalogNode(node=""))
    first = [] if found.node == wanted.node else [Txn(node=TxnNode(verb="set", node=wanted.node))]
    gone = [row for name, row in found.services.items() if name not in wanted.services]
    changed = [row for name, row in wanted.services.items() if found.services.get(name) != row]
    first += [_service("set", wanted, row) for row in changed if not row.kind]
    proxies = [_registration(wanted, row) for row in changed if row.kind]
    registered = {one.check.check_id for one in proxies}
    last = [
        Txn(check=TxnCheck(verb="delete", check=check))
        for name, check in found.checks.items()
        if name not in wanted.checks and (not check.service_id or check.service_id in wanted.services)
    ]
    last += [
        Txn(check=TxnCheck(verb="set", check=check))
        for name, check in wanted.checks.items()
        if found.checks.get(name) != check and name not in registered
    ]
    # Last of all: what takes its place, perhaps on another node, passes by then. 1.8 wants the name with the id.
    last += [_service("delete", wanted, ConsulService(id=row.id, service=row.service)) for row in gone]
    return Operations(first=tuple(first), proxies=tuple(proxies), last=tuple(last))


def batches(steps: Iterable[Txn]) -> list[list[Txn]]:
    """`steps` in order, cut where Consul's limits on a transaction demand it."""
    cut: list[list[Txn]] = []
    size = 0
    for step in steps:
        step_bytes = len(msgspec.json.encode(step)) + 1
        if not cut or len(cut[-1]) == OPERATIONS_MAX or size + step_bytes > BODY_BYTES_MAX:
            cut.append([])
            size = 0
        cut[-1].append(step)
        size += step_bytes
    return cut


def _rows(
    service: ServiceRegistration, address: str, virtual_addresses: Mapping[ServiceName, str]
) -> Iterable[ConsulService]:
    name = f"{service.alloc}-{service.service}"
    meta = {**service.meta, ALLOC_META: service.alloc, JOB_META: service.job, PROTOCOL_META: service.protocol.value}
    yield ConsulService(id=name, service=service.service, address=address, port=service.port, meta=meta)
    if not service.port:
        return  # it only calls: nobody dials it, and Consul takes no proxy without a port
    addresses = {"lan": TaggedAddress(address=address, port=service.port)}
    if service.local_address:
        addresses[LOCAL_ADDRESS] = TaggedAddress(address=service.local_address, port=service.local_port)
    upstreams = tuple(
        Upstream(
            destination_name=upstream, local_bind_address=virtual_addresses[upstream], local_bind_port=VIRTUAL_PORT
        )
        for upstream in sorted(set(service.upstreams))
        if upstream in virtual_addresses
    )
    yield ConsulService(
        id=f"{name}-proxy",
        service=f"{service.service}-sidecar-proxy",
        kind="connect-proxy",
        address=address,
        port=service.port,
        tagged_addresses=addresses,
        meta=meta,
        proxy=Proxy(destination_service_name=service.service, destination_service_id=name, upstreams=upstreams or None),
    )


def own_part(row: ConsulService) -> ConsulService:
    addresses = {key: value for key, value in (row.tagged_addresses or {}).items() if key in _OWN_ADDRESSES}
    proxy = row.proxy if row.kind and row.proxy is not None else None
    if proxy is not None:
        proxy = msgspec.structs.replace(proxy, upstreams=proxy.upstreams or None)
    return msgspec.structs.replace(
        row, tagged_addresses=addresses or None, meta=dict(row.meta or {}), proxy=proxy, connect=None
    )


def _check(node: str, check_id: str, name: str, passing: bool, output: str) -> ConsulCheck:
    status = "passing" if passing else "critical"
    return ConsulCheck(node=node, check_id=check_id, name=name, status=status, output=output[:_OUTPUT_CHARS_MAX])


def _service(verb: str, record: NodeRecord, row: ConsulService) -> Txn:
    return Txn(service=TxnService(verb=verb, node=record.node.node, service=row))


def _registration(record: NodeRecord, row: ConsulService) -> Registration:
    node = record.node
    check = record.checks[service_check(row.id)]
    return Registration(node=node.node, address=node.address, skip_node_update=True, service=row, check=check)
