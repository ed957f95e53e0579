"""The nodes, column by column: what each offers, what its allocations take. Owns the accounts; never decides.

A node's reference is its position here, in the order of first registration; it never changes.
"""

from array import array
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from controller.core.attributes import Attributes, Demand
from controller.core.groups import GroupEntry
from controller.core.table import Bools, Ints, Shorts, Times
from outrider.ids import NodeId
from outrider.model.attributes import describe
from outrider.model.job import Constraint
from outrider.model.node import GUEST_KERNEL, Drain, Fingerprint, Node, countable

_GROWTH = 64
_ENDED_SPARE = 32
_FEW = 32
_Scalar = TypeVar("_Scalar", bound=np.generic)


class NodeTable:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.reference: dict[NodeId, int] = {}
        self.attributes = Attributes()
        self.ports: list[set[int]] = []  # taken on the node's address, mesh and static
        self.holders: dict[int, set[int]] = {}  # the same the other way round: nodes by port, those that reserve it too
        self.port_cursor: list[int] = []  # a port just freed is the last to be given out again
        self.drains: dict[int, Drain] = {}  # of the draining ones
        self.hosted: list[array[int]] = []  # serials of what was placed on each node, and some that ended there
        self.serving: list[set[int]] = []  # serials of live allocations with services, by node
        # Offered less taken: all a placement asks. Negative after a fingerprint shrank.
        self.cpu_free: Ints = np.zeros(_GROWTH, np.int64)
        self.memory_free: Ints = np.zeros(_GROWTH, np.int64)
        self.disk_free: Ints = np.zeros(_GROWTH, np.int64)
        self.ports_free: Ints = np.zeros(_GROWTH, np.int64)  # of the node's range
        self.cpu_total: Ints = np.zeros(_GROWTH, np.int64)
        self.memory_total: Ints = np.zeros(_GROWTH, np.int64)
        self.disk_total: Ints = np.zeros(_GROWTH, np.int64)
        # The same to divide by: at least 1.
        self.cpu_scale: Times = np.ones(_GROWTH)
        self.memory_scale: Times = np.ones(_GROWTH)
        self.devices_free: dict[str, Ints] = {}
        self.devices_total: dict[str, Ints] = {}
        self.allocations: Ints = np.zeros(_GROWTH, np.int64)
        self.down: Bools = np.zeros(_GROWTH, np.bool_)
        self.closed: Bools = np.zeros(_GROWTH, np.bool_)  # not eligible for new work
        self.draining: Bools = np.zeros(_GROWTH, np.bool_)
        self.runs_processes: Bools = np.zeros(_GROWTH, np.bool_)
        self.runs_vms: Bools = np.zeros(_GROWTH, np.bool_)
        self.has_kvm: Bools = np.zeros(_GROWTH, np.bool_)
        self.allows_host_image: Bools = np.zeros(_GROWTH, np.bool_)

    def __len__(self) -> int:
        return len(self.nodes)

    def register(self, node: Node) -> int:
        """The reference of `node`, new or as it describes itself now."""
        ref = self.reference.get(node.id)
        before: tuple[int, ...] = ()
        if ref is None:
            ref = self._add(node)
        else:
            before = self.nodes[ref].fingerprint.reserved.ports
            self.nodes[ref] = node
        found = node.fingerprint
        reserved = found.reserved
        counted = countable(found)
        for total, free, offered in (
            (self.cpu_total, self.cpu_free, found.cpu_millis - reserved.cpu_millis),
            (self.memory_total, self.memory_free, found.memory_bytes - reserved.memory_bytes),
            (self.disk_total, self.disk_free, found.disk_bytes - reserved.disk_bytes),
            *(self._device(name, counted.get(name, 0)) for name in self.devices_total.keys() | counted),
        ):
            free[ref] += max(0, offered) - total[ref]
            total[ref] = max(0, offered)
        self.cpu_scale[ref] = max(1, self.cpu_total[ref])
        self.memory_scale[ref] = max(1, self.memory_total[ref])
        self._reserve_ports(ref, before)
        self.attributes.describe(ref, node)
        self._note_abilities(ref, found)
        self.down[ref] = False
        return ref

    def suited(self, demand: Demand) -> Bools:
        """Which nodes could ever run what demands this."""
        mask = self.attributes.suited(demand)
        if mask is None:
            mask = np.ones(len(self), np.bool_)
            for _, passed in self.judged(demand):
                mask &= passed
            self.attributes.keep(demand, mask)
        return mask

    def values_suited(self, attribute: str, demand: Demand) -> Bools:
        """Which of the attribute's values nodes have that could run what demands this."""
        there = self.attributes.values_suited(attribute, demand)
        if there is None:
            column = self.attributes.column(attribute)
            found = np.bincount(column.codes[self.suited(demand)] + 1, minlength=len(column.values) + 1)
            there = np.asarray(found[1:] > 0)
            self.attributes.keep_values(attribute, demand, there)
        return there

    def judged(self, demand: Demand) -> Iterator[tuple[str, Bools]]:
        """Each part of the demand: why a node is out, and which are not."""
        size = len(self)
        yield "crun or conmon is not installed", self.runs_processes[:size]
        if demand.vms:
            yield "qemu is not installed", self.runs_vms[:size]
        if demand.guest_kernel:
            given = (GUEST_KERNEL in node.fingerprint.runtimes for node in self.nodes)
            yield "it has no kernel for `isolation: vm`", np.fromiter(given, np.bool_, size)
        if demand.snapshots:
            held = (set(demand.snapshots) <= set(node.fingerprint.snapshots) for node in self.nodes)
            yield f"snapshot {', '.join(demand.snapshots)} is not there", np.fromiter(held, np.bool_, size)
        if demand.host_image:
            yield "`image: host` is not allowed there", self.allows_host_image[:size]
        if demand.kvm:
            yield "kvm does not work there", self.has_kvm[:size]
        for constraint in demand.constraints:
            yield self._complaint(constraint), self.attributes.passing(constraint)
        for attribute in demand.attributes:
            yield f"{attribute} is not set", self.attributes.column(attribute).codes >= 0

    def device_free(self, name: str) -> Ints:
        free = self.devices_free.get(name)
        return (free if free is not None else np.zeros(len(self), np.int64))[: len(self)]

    def _complaint(self, constraint: Constraint) -> str:
        text = f"`{describe(constraint)}` does not hold"
        unset = not self.attributes.column(constraint.attribute).values
        return f"{text}: {constraint.attribute} is not set" if unset else text

    def _device(self, name: str, offered: int) -> tuple[Ints, Ints, int]:
        if name not in self.devices_total:
            self.devices_total[name] = np.zeros(len(self.cpu_free), np.int64)
            self.devices_free[name] = np.zeros(len(self.cpu_free), np.int64)
        return self.devices_total[name], self.devices_free[name], offered

    def _reserve_ports(self, ref: int, before: tuple[int, ...]) -> None:
        """Reserved ports are held by the node itself. `before`: those of its description until now."""
        found = self.nodes[ref].fingerprint
        for port in before:
            if port not in self.ports[ref]:
                self._let_go(ref, port)
        for port in found.reserved.ports:
            self.holders.setdefault(port, set()).add(ref)
        taken = self.ports[ref] | set(found.reserved.ports)
        self.ports_free[ref] = _range_size(found) - sum(_in_range(found, port) for port in taken)

    def _note_abilities(self, ref: int, found: Fingerprint) -> None:
        has_runtime = "crun" in found.runtimes and "conmon" in found.runtimes
        self.runs_processes[ref] = has_runtime
        self.runs_vms[ref] = has_runtime and any(name.startswith("qemu") for name in found.runtimes)
        self.allows_host_image[ref] = found.host_image
        self.has_kvm[ref] = found.kvm == "works"
        self.attributes.forget()

    def steer(self, ref: int, *, eligible: bool, drain: Drain | None) -> None:
        self.closed[ref], self.draining[ref] = not eligible, drain is not None
        self.drains.pop(ref, None)
        if drain is not None:
            self.drains[ref] = drain

    def take(self, refs: Shorts, serials: Ints, group: GroupEntry) -> None:
        """Account one allocation of `group` for each entry of `refs`. Ports are taken one by one."""
        self._account(refs, group, 1)
        for ref, serial in zip(refs.tolist(), serials.tolist(), strict=True):
            self.hosted[ref].append(serial)

    def release(self, refs: Shorts, group: GroupEntry) -> list[int]:
        """The nodes of which most `hosted` serials have ended: for the caller to keep the others."""
        self._account(refs, group, -1)
        return [
            ref
            for ref in dict.fromkeys(refs.tolist())
            if len(self.hosted[ref]) > 2 * self.allocations[ref] + _ENDED_SPARE
        ]

    def host_only(self, ref: int, serials: Ints) -> None:
        """`serials`: what lives there."""
        self.hosted[ref] = array("q", serials.tobytes())

    def take_port(self, ref: int, port: int) -> None:
        self.ports[ref].add(port)
        self.holders.setdefault(port, set()).add(ref)
        self.ports_free[ref] -= self._counts(ref, port)

    def release_port(self, ref: int, port: int) -> None:
        self.ports[ref].discard(port)
        if port not in self.nodes[ref].fingerprint.reserved.ports:
            self._let_go(ref, port)
        self.ports_free[ref] += self._counts(ref, port)

    def _counts(self, ref: int, port: int) -> bool:
        """Whether a port is one of those that the node has to give."""
        found = self.nodes[ref].fingerprint
        return _in_range(found, port) and port not in found.reserved.ports

    def _let_go(self, ref: int, port: int) -> None:
        holders = self.holders.get(port, set())
        holders.discard(ref)
        if not holders:
            self.holders.pop(port, None)

    def _account(self, refs: Shorts, group: GroupEntry, sign: int) -> None:
        need = group.need
        accounts = [
            (self.cpu_free, -need.cpu_millis),
            (self.memory_free, -need.memory_bytes),
            (self.disk_free, -need.disk_bytes),
            *((self._device(name, 0)[1], -count) for name, count in group.devices),
            (self.allocations, 1),
        ]
        if len(refs) <= _FEW:
            for ref in refs.tolist():
                for column, each in accounts:
                    column[ref] += sign * each
            return
        counts = np.bincount(refs, minlength=len(self.cpu_free)) * sign
        for column, each in accounts:
            np.add(column, counts * each, out=column)

    def _add(self, node: Node) -> int:
        ref = len(self.nodes)
        self.nodes.append(node)
        self.reference[node.id] = ref
        self.ports.append(set())
        self.port_cursor.append(node.fingerprint.port_first)
        self.hosted.append(array("q"))
        self.serving.append(set())
        if ref >= len(self.cpu_free):
            for name, column in vars(self).items():
                if isinstance(column, np.ndarray):
                    setattr(self, name, _doubled(column))
            for columns in (self.devices_free, self.devices_total):
                for name, column in columns.items():
                    columns[name] = _doubled(column)
        return ref


def _doubled(column: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    return np.concatenate([column, np.zeros(len(column), column.dtype)])


def _range_size(found: Fingerprint) -> int:
    return max(0, found.port_last - found.port_first + 1)


def _in_range(found: Fingerprint, port: int) -> bool:
    return found.port_first <= port <= found.port_last
