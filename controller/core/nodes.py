"""The nodes, column by column: what each offers, what its allocations take. Owns the accounts; never decides.

A node's reference is its position here, in the order of first registration; it never changes.
"""

import numpy as np

from controller.core.groups import GroupEntry
from controller.core.table import Bools, Ints, Shorts
from outrider.ids import NodeId
from outrider.model.node import Fingerprint, Node

_GROWTH = 64


class NodeTable:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.reference: dict[NodeId, int] = {}
        self.ports: list[set[int]] = []  # taken on the node's address, mesh and static
        self.port_cursor: list[int] = []  # a port just freed is the last to be given out again
        self.serving: list[set[int]] = []  # serials of live allocations with services, by node
        # Offered less taken: all a placement asks. Negative after a fingerprint shrank.
        self.cpu_free: Ints = np.zeros(_GROWTH, np.int64)
        self.memory_free: Ints = np.zeros(_GROWTH, np.int64)
        self.disk_free: Ints = np.zeros(_GROWTH, np.int64)
        self.ports_free: Ints = np.zeros(_GROWTH, np.int64)  # of the node's range
        self.cpu_total: Ints = np.zeros(_GROWTH, np.int64)
        self.memory_total: Ints = np.zeros(_GROWTH, np.int64)
        self.disk_total: Ints = np.zeros(_GROWTH, np.int64)
        self.allocations: Ints = np.zeros(_GROWTH, np.int64)
        self.down: Bools = np.zeros(_GROWTH, np.bool_)
        self.runs_processes: Bools = np.zeros(_GROWTH, np.bool_)
        self.runs_vms: Bools = np.zeros(_GROWTH, np.bool_)
        self.allows_host_image: Bools = np.zeros(_GROWTH, np.bool_)

    def __len__(self) -> int:
        return len(self.nodes)

    def register(self, node: Node) -> int:
        """The reference of `node`, new or as it describes itself now."""
        ref = self.reference.get(node.id)
        if ref is None:
            ref = self._add(node)
        else:
            self.nodes[ref] = node
        found = node.fingerprint
        for total, free, offered in (
            (self.cpu_total, self.cpu_free, found.cpu_millis),
            (self.memory_total, self.memory_free, found.memory_bytes),
            (self.disk_total, self.disk_free, found.disk_bytes),
        ):
            free[ref] += offered - total[ref]
            total[ref] = offered
        self.ports_free[ref] = _range_size(found) - sum(_in_range(found, port) for port in self.ports[ref])
        has_runtime = "crun" in found.runtimes and "conmon" in found.runtimes
        self.runs_processes[ref] = has_runtime
        self.runs_vms[ref] = has_runtime and any(name.startswith("qemu") for name in found.runtimes)
        self.allows_host_image[ref] = found.host_image
        self.down[ref] = False
        return ref

    def take(self, refs: Shorts, group: GroupEntry) -> None:
        """Account one allocation of `group` for each entry of `refs`. Ports are taken one by one."""
        self._account(refs, group, 1)

    def release(self, refs: Shorts, group: GroupEntry) -> None:
        self._account(refs, group, -1)

    def take_port(self, ref: int, port: int) -> None:
        self.ports[ref].add(port)
        self.ports_free[ref] -= _in_range(self.nodes[ref].fingerprint, port)

    def release_port(self, ref: int, port: int) -> None:
        self.ports[ref].discard(port)
        self.ports_free[ref] += _in_range(self.nodes[ref].fingerprint, port)

    def _account(self, refs: Shorts, group: GroupEntry, sign: int) -> None:
        counts = np.bincount(refs, minlength=len(self.cpu_free)) * sign
        self.cpu_free -= counts * group.need.cpu_millis
        self.memory_free -= counts * group.need.memory_bytes
        self.disk_free -= counts * group.need.disk_bytes
        self.allocations += counts

    def _add(self, node: Node) -> int:
        ref = len(self.nodes)
        self.nodes.append(node)
        self.reference[node.id] = ref
        self.ports.append(set())
        self.port_cursor.append(node.fingerprint.port_first)
        self.serving.append(set())
        if ref >= len(self.cpu_free):
            for name, column in vars(self).items():
                if isinstance(column, np.ndarray):
                    setattr(self, name, np.concatenate([column, np.zeros(len(column), column.dtype)]))
        return ref


def _range_size(found: Fingerprint) -> int:
    return max(0, found.port_last - found.port_first + 1)


def _in_range(found: Fingerprint, port: int) -> bool:
    return found.port_first <= port <= found.port_last
