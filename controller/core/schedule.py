"""Where copies of a group go: filter, score, place, over a snapshot of the nodes' columns. Owns the choice of nodes.

Never changes the state; what it gives away it subtracts from its own snapshot. Copies of a group go to the nodes with
the fewest of them, and among those to the least loaded one; ties fall by `seed`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from controller.core.groups import GroupEntry
from controller.core.nodes import NodeTable
from controller.core.table import Bools, Ints
from outrider.model.job import MIB, Value

_TIE_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying is a bijection
_GIB = 1024 * MIB

Filter = tuple[str, Bools]  # why a node is out, and which are not


class Placement(Value, frozen=True, kw_only=True):
    nodes: list[int]  # fewer than asked for where they did not fit
    ports: list[int]  # mesh ports, group by group
    reason: str = ""  # why the rest did not fit


class Snapshot:
    """What one plan may still give away."""

    def __init__(self, nodes: NodeTable, ready: Bools) -> None:
        size = len(nodes)
        self.nodes = nodes
        self.size = size
        self.ready = ready
        self.cpu_free: Ints = nodes.cpu_free[:size].copy()
        self.memory_free: Ints = nodes.memory_free[:size].copy()
        self.disk_free: Ints = nodes.disk_free[:size].copy()
        self.ports_free: Ints = nodes.ports_free[:size].copy()
        self._cpu_total = np.maximum(nodes.cpu_total[:size], 1)
        self._memory_total = np.maximum(nodes.memory_total[:size], 1)
        self._given: dict[int, set[int]] = {}  # ports, by node, in this snapshot

    def load(self, group: GroupEntry, counts: Ints | int = 0) -> npt.NDArray[np.float64]:
        """The share of its scarcer resource that each node has given away, `counts` more copies of `group` included."""
        cpu_free = (self.cpu_free - counts * group.need.cpu_millis) / self._cpu_total
        memory_free = (self.memory_free - counts * group.need.memory_bytes) / self._memory_total
        return 1.0 - np.minimum(cpu_free, memory_free)

    def port_free(self, port: int) -> Bools:
        taken, given = self.nodes.ports, self._given
        return np.fromiter(
            (port not in taken[ref] and port not in given.get(ref, ()) for ref in range(self.size)), np.bool_, self.size
        )

    def take(self, refs: Ints, group: GroupEntry) -> list[int]:
        """Give these nodes a copy of `group` for each entry; the mesh ports for them, in the same order."""
        counts = np.bincount(refs, minlength=self.size)
        self.cpu_free -= counts * group.need.cpu_millis
        self.memory_free -= counts * group.need.memory_bytes
        self.disk_free -= counts * group.need.disk_bytes
        width = len(group.mesh_services)
        self.ports_free -= counts * width
        ports: list[int] = []
        if width or group.static_ports:
            for ref in refs.tolist():
                self._given.setdefault(ref, set()).update(group.static_ports)
                ports.extend(self._next_port(ref) for _ in range(width))
        return ports

    def _next_port(self, ref: int) -> int:
        found = self.nodes.nodes[ref].fingerprint
        given = self._given.setdefault(ref, set())
        port = self.nodes.port_cursor[ref]
        for _ in range(found.port_last - found.port_first + 1):
            if not found.port_first <= port <= found.port_last:
                port = found.port_first
            if port not in self.nodes.ports[ref] and port not in given:
                break
            port += 1
        given.add(port)
        self.nodes.port_cursor[ref] = port + 1
        return port


def place(
    snapshot: Snapshot, group: GroupEntry, count: int, have: Ints, *, seed: int, allowed: Bools | None = None
) -> Placement:
    """At most `count` more copies, where `have` says how many of them each node has; only on `allowed` nodes."""
    filters = tuple(_filters(snapshot, group, allowed))
    room = _room(snapshot, group)
    for _, passed in filters:
        room = np.where(passed, room, 0)
    choose = _best if count == 1 else _spread
    refs = choose(snapshot, group, room, have, count=count, seed=seed)
    ports = snapshot.take(refs, group)
    reason = ""
    if len(refs) < count:
        reason = _explain(snapshot, group, filters)
    return Placement(nodes=refs.tolist(), ports=ports, reason=reason)


def suits(nodes: NodeTable, group: GroupEntry) -> Bools:
    """Which nodes could ever run it: what a system job counts as its own."""
    suited = np.ones(len(nodes), np.bool_)
    for _, passed in _kind_filters(nodes, group):
        suited &= passed
    return suited


def _kind_filters(nodes: NodeTable, group: GroupEntry) -> Iterator[Filter]:
    size = len(nodes)
    yield "crun or conmon is not installed", nodes.runs_processes[:size]
    if group.has_vms:
        yield "qemu is not installed", nodes.runs_vms[:size]
    if group.snapshots:
        held = (group.snapshots <= set(node.fingerprint.snapshots) for node in nodes.nodes)
        yield f"snapshot {', '.join(sorted(group.snapshots))} is not there", np.fromiter(held, np.bool_, size)
    if group.uses_host_image:
        yield "`image: host` is not allowed there", nodes.allows_host_image[:size]


def _filters(snapshot: Snapshot, group: GroupEntry, allowed: Bools | None) -> Iterator[Filter]:
    if allowed is not None:
        yield "not asked for", allowed
    yield "not ready", snapshot.ready
    yield from _kind_filters(snapshot.nodes, group)
    for port in group.static_ports:
        yield f"port {port} is taken", snapshot.port_free(port)


def _room(snapshot: Snapshot, group: GroupEntry) -> Ints:
    """How many copies each node's resources hold."""
    room = np.full(snapshot.size, 1 if group.static_ports else np.iinfo(np.int64).max)
    need = group.need
    for free, wanted in (
        (snapshot.cpu_free, need.cpu_millis),
        (snapshot.memory_free, need.memory_bytes),
        (snapshot.disk_free, need.disk_bytes),
        (snapshot.ports_free, len(group.mesh_services)),
    ):
        if wanted > 0:
            room = np.minimum(room, free // wanted)
    held: Ints = np.maximum(room, 0)
    return held


def _ties(size: int, seed: int) -> npt.NDArray[np.uint64]:
    return (np.arange(size, dtype=np.uint64) ^ np.uint64(seed)) * _TIE_SPREAD


def _best(snapshot: Snapshot, group: GroupEntry, room: Ints, have: Ints, *, count: int, seed: int) -> Ints:
    assert count == 1, "more at once is for _spread"
    candidates = np.flatnonzero(room > 0)
    if not len(candidates):
        return candidates
    fewest = have[candidates]
    candidates = candidates[fewest == fewest.min()]
    load = snapshot.load(group)[candidates]
    candidates = candidates[load == load.min()]
    best = int(np.argmin(_ties(snapshot.size, seed)[candidates]))
    chosen: Ints = candidates[best : best + 1]
    return chosen


def _spread(snapshot: Snapshot, group: GroupEntry, room: Ints, have: Ints, *, count: int, seed: int) -> Ints:
    """What placing one after the other would give, at once: fill all nodes to a common level."""
    room = np.minimum(room, count)
    low, high = 0, int((have + room).max(initial=0))
    while low < high:
        level = (low + high + 1) // 2
        if int(np.clip(level - have, 0, room).sum()) <= count:
            low = level
        else:
            high = level - 1
    counts = np.clip(low - have, 0, room)
    ties = _ties(snapshot.size, seed)
    load = snapshot.load(group, counts)
    rest = count - int(counts.sum())
    if rest:
        next_up = np.flatnonzero((have <= low) & (room > counts))
        order = np.lexsort((ties[next_up], load[next_up]))
        counts[next_up[order[:rest]]] += 1
    refs = np.repeat(np.arange(snapshot.size), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    level_of = np.arange(len(refs)) - first + have[refs]
    rank = np.empty(snapshot.size, np.int64)
    rank[np.lexsort((ties, load))] = np.arange(snapshot.size)
    ordered: Ints = refs[np.lexsort((rank[refs], level_of))]
    return ordered


def _explain(snapshot: Snapshot, group: GroupEntry, filters: tuple[Filter, ...]) -> str:
    """How many nodes were filtered by what, each counted once."""
    if not snapshot.size:
        return "no node has joined the fleet"
    left = np.ones(snapshot.size, np.bool_)
    parts = []
    total = snapshot.size
    for name, passed in filters:
        out = int((left & ~passed).sum())
        if name == "not asked for":
            total -= out
        elif out:
            parts.append(f"{out} of {total} nodes: {name}")
        left &= passed
    need = group.need
    for what, wanted, free, show in (
        ("memory", need.memory_bytes, snapshot.memory_free, _bytes_text),
        ("cpu", need.cpu_millis, snapshot.cpu_free, _cpu_text),
        ("disk", need.disk_bytes, snapshot.disk_free, _bytes_text),
        ("mesh ports", len(group.mesh_services), snapshot.ports_free, str),
    ):
        short = left & (free < wanted)
        if out := int(short.sum()):
            most = max(0, int(free[short].max()))
            parts.append(f"{out} of {total} nodes: {what} {show(wanted)} wanted, at most {show(most)} free")
        left &= ~short
    if group.static_ports and (out := int(left.sum())):
        parts.append(f"{out} of {total} nodes: one copy each, port {group.static_ports[0]} is pinned")
    return "; ".join(parts)


def _bytes_text(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / MIB:.0f} MiB"


def _cpu_text(millis: int) -> str:
    return f"{millis / 1000:g} cores"
