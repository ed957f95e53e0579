"""Consul's health rows -> the endpoints that sidecars dial. Pure."""

from collections.abc import Iterable

from controller.entries import Entries, subsets_of
from controller.mesh.registrations import ALLOC_META, CLUSTER_META, LOCAL_ADDRESS
from controller.mesh.shapes import HealthRow
from outrider.ids import AllocId
from outrider.model.mesh import Endpoint


def endpoints(rows: Iterable[HealthRow], cluster: str, entries: Entries) -> tuple[Endpoint, ...]:
    """In a fixed order, so that equal catalogs give equal endpoints."""
    found = (_endpoint(row, cluster, entries) for row in rows if row.service.port)
    return tuple(sorted(found, key=lambda endpoint: (endpoint.node, endpoint.id)))


def _endpoint(row: HealthRow, cluster: str, entries: Entries) -> Endpoint:
    service = row.service
    local = (service.tagged_addresses or {}).get(LOCAL_ADDRESS)
    # Another cluster of ours in the same Consul: its sidecars are peers, its allocations are not this controller's.
    ours = (row.node.meta or {}).get(CLUSTER_META) == cluster
    alloc = (service.meta or {}).get(ALLOC_META)
    return Endpoint(
        id=(service.proxy.destination_service_id if service.proxy else "") or service.id,
        node=row.node.node,
        address=service.address or row.node.address,
        port=service.port,
        local_address=local.address if local and ours else "",
        local_port=local.port if local and ours else 0,
        # As `?passing` has it: every check that bears on the instance, its node's included.
        healthy=all(check.status == "passing" for check in row.checks or ()),
        alloc=AllocId(alloc) if alloc and ours else None,
        outrider=alloc is not None,
        subsets=subsets_of(entries, _destination(row), service.meta or {}),
    )


def _destination(row: HealthRow) -> str:
    proxy = row.service.proxy
    return proxy.destination_service_name if proxy is not None else row.service.service
