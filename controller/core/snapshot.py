"""What one plan may still give away. Owns copies of the nodes' free columns; never changes the nodes themselves,
but for where the search for a free port goes on.
"""

import numpy as np

from controller.core.groups import GroupEntry
from controller.core.nodes import NodeTable
from controller.core.table import Bools, Ints, Times
from outrider.model.job import Packing, Value


class Hold(Value, frozen=True, kw_only=True):
    """Room on a node that was made for an allocation which waits for it: not for those of less or equal priority."""

    ref: int
    group: GroupEntry


class Snapshot:
    def __init__(
        self, nodes: NodeTable, ready: Bools, packing: Packing = Packing.SPREAD, holds: tuple[Hold, ...] = ()
    ) -> None:
        size = len(nodes)
        self.nodes = nodes
        self.size = size
        self.ready = ready
        self.packing = packing
        self.cpu_free: Ints = nodes.cpu_free[:size].copy()
        self.memory_free: Ints = nodes.memory_free[:size].copy()
        self.disk_free: Ints = nodes.disk_free[:size].copy()
        self.ports_free: Ints = nodes.ports_free[:size].copy()
        self.devices_free: dict[str, Ints] = {}  # of those that somebody asked for
        self.cpu_scale: Times = nodes.cpu_scale[:size]
        self.memory_scale: Times = nodes.memory_scale[:size]
        self.holds = holds
        self._returned: set[tuple[int, int]] = set()
        self._given: dict[int, set[int]] = {}  # ports, by node, in this snapshot

    def device_free(self, name: str) -> Ints:
        free = self.devices_free.get(name)
        if free is None:
            free = self.devices_free[name] = self.nodes.device_free(name).copy()
        return free

    def port_free(self, port: int) -> Bools:
        free = np.ones(self.size, np.bool_)
        free[[ref for ref in self.nodes.holders.get(port, ()) if (ref, port) not in self._returned]] = False
        free[[ref for ref, given in self._given.items() if port in given]] = False
        return free

    def fits(self, group: GroupEntry) -> Bools:
        """Which nodes take one more copy, by all that is counted."""
        need = group.need
        room: Bools = self.cpu_free >= need.cpu_millis
        room &= self.memory_free >= need.memory_bytes
        room &= self.disk_free >= need.disk_bytes
        if group.ports_width:
            room &= self.ports_free >= group.ports_width
        for name, count in group.devices:
            room &= self.device_free(name) >= count
        for port in group.static_ports:
            room &= self.port_free(port)
        return room

    def room(self, group: GroupEntry) -> Ints:
        """How many copies each node takes, where `fits` lets it."""
        room = np.full(self.size, 1 if group.static_ports else np.iinfo(np.int64).max)
        for free, wanted in self.counted(group):
            if wanted > 0:
                room = np.minimum(room, free // wanted)
        held: Ints = np.maximum(room, 0)
        return held

    def counted(self, group: GroupEntry) -> tuple[tuple[Ints, int], ...]:
        """What is free, and what a copy takes of it."""
        need = group.need
        return (
            (self.cpu_free, need.cpu_millis),
            (self.memory_free, need.memory_bytes),
            (self.disk_free, need.disk_bytes),
            (self.ports_free, group.ports_width),
            *((self.device_free(name), count) for name, count in group.devices),
        )

    def keep_held(self, group: GroupEntry, sign: int) -> None:
        """Take (1) or give back (-1) the room that is held against `group`: its own copies may use it."""
        for hold in self.holds:
            if hold.group.priority >= group.priority and hold.group.family != group.family:
                for free, wanted in self.counted(hold.group):
                    free[hold.ref] -= sign * wanted

    def take(self, refs: Ints, group: GroupEntry) -> list[int]:
        """Give these nodes a copy of `group` for each entry; the ports for them, in the same order."""
        if len(refs) == 1:
            for free, wanted in self.counted(group):
                free[refs[0]] -= wanted
        elif len(refs):
            counts = np.bincount(refs, minlength=self.size)
            for free, wanted in self.counted(group):
                if wanted:
                    np.subtract(free, counts * wanted, out=free)
        ports: list[int] = []
        width = group.ports_width
        if width or group.static_ports:
            for ref in refs.tolist():
                self._given.setdefault(ref, set()).update(group.static_ports)
                ports.extend(self._next_port(ref) for _ in range(width))
        return ports

    def give_back(self, ref: int, group: GroupEntry, ports: tuple[int, ...]) -> None:
        """As if an allocation of the group, with these ports of the node's range, were not there."""
        for free, wanted in self.counted(group):
            free[ref] += wanted
        self._returned.update((ref, port) for port in (*ports, *group.static_ports))

    def _next_port(self, ref: int) -> int:
        found = self.nodes.nodes[ref].fingerprint
        given = self._given.setdefault(ref, set())
        port = self.nodes.port_cursor[ref]
        for _ in range(found.port_last - found.port_first + 1):
            if not found.port_first <= port <= found.port_last:
                port = found.port_first
            if port not in self.nodes.ports[ref] and port not in given and port not in found.reserved.ports:
                break
            port += 1
        given.add(port)
        self.nodes.port_cursor[ref] = port + 1
        return port
