"""What the catalog has, as last written or read: the other half of every comparison. Pure: state in place."""

from collections import defaultdict
from collections.abc import Iterable

from controller.mesh.registrations import ALLOC_META, CLUSTER_META, NodeRecord, own_part
from controller.mesh.shapes import ConsulService, HealthRow


class Known:
    """Records by Consul's node name. A name that is absent is not in the catalog."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._records: dict[str, NodeRecord] = {}
        self._fronting: dict[str, set[tuple[str, str]]] = defaultdict(set)  # service -> (node, id) of its proxies

    def names(self) -> frozenset[str]:
        return frozenset(self._records)

    def get(self, name: str) -> NodeRecord | None:
        return self._records.get(name)

    def put(self, name: str, record: NodeRecord | None) -> None:
        if (old := self._records.pop(name, None)) is not None:
            for row in old.services.values():
                self._fronting[_destination(row)].discard((name, row.id))
        if record is not None:
            self._records[name] = record
            for row in record.services.values():
                self._fronting[_destination(row)].add((name, row.id))

    def clear(self) -> None:
        self._records.clear()
        self._fronting.clear()

    def having(self, allocs: frozenset[str]) -> frozenset[str]:
        """The nodes on which one of `allocs` is registered."""
        return frozenset(name for name, record in self._records.items() if registers(record, allocs))

    def drifted(self, service: str, rows: Iterable[HealthRow]) -> set[str]:
        """The nodes of which the catalog shows something else about `service` than it was told."""
        seen, drifted = set(), set()
        for row in rows:
            if (row.node.meta or {}).get(CLUSTER_META) != self._cluster:
                continue
            name, record = row.node.node, self._records.get(row.node.node)
            seen.add((name, row.service.id))
            if (
                record is None
                or record.services.get(row.service.id) != own_part(row.service)
                or any(record.checks.get(check.check_id) != check for check in row.checks or ())
            ):
                drifted.add(name)
        return drifted | {name for name, _ in self._fronting[service] - seen}


def registers(record: NodeRecord | None, allocs: frozenset[str]) -> bool:
    rows = record.services.values() if record is not None else ()
    return any((row.meta or {}).get(ALLOC_META) in allocs for row in rows)


def _destination(row: ConsulService) -> str:
    return row.proxy.destination_service_name if row.proxy is not None else ""
