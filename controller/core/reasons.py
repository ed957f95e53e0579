"""Why a group does not fit: how many nodes are out for what, each counted once. Owns the words; decides nothing."""

from collections.abc import Iterator

import numpy as np

from controller.core.groups import GroupEntry
from controller.core.scores import Limit, Near
from controller.core.snapshot import Snapshot
from controller.core.table import Bools, Ints
from outrider.model.attributes import HOST, describe
from outrider.model.hugepages import counted_as
from outrider.model.job import MIB

_GIB = 1024 * MIB
HUGEPAGES = counted_as("")

Filter = tuple[str, Bools]  # why a node is out, and which are not


def filters(snapshot: Snapshot, group: GroupEntry, near: Near, left: Bools) -> Iterator[Filter]:
    """All that a node must pass, in the order in which people want to hear of it.

    `left`: the nodes that passed so far, kept by the caller; of them alone a shortage tells its figures.
    """
    yield "not eligible, or drained", ~snapshot.nodes.closed[: snapshot.size]
    yield "not ready", snapshot.ready
    yield from snapshot.nodes.judged(group.demand)
    for distinct in group.distinct:
        there = near.job if distinct.whole_job else near.group
        if distinct.attribute == HOST:
            taken = np.asarray(there < distinct.most)
        else:
            limit = Limit(snapshot, distinct, there)
            taken = limit.open()[limit.codes]
        yield f"`{describe(distinct.constraint)}` is used up", taken
    for port in group.static_ports:
        free = snapshot.port_free(port)
        yield f"one copy each, port {port} is pinned", free | (near.group == 0)
        yield f"port {port} is taken", free
    for what, wanted, have in shortages(snapshot, group):
        short = np.asarray(have < wanted)
        most = max(0, int(have[left & short].max(initial=0)))
        yield f"{what} {amount(what, wanted)} wanted, at most {amount(what, most)} free", ~short


def shortages(snapshot: Snapshot, group: GroupEntry) -> Iterator[tuple[str, int, Ints]]:
    """What is counted: its name, how much a copy takes, and what is free."""
    need = group.need
    yield "memory", need.memory_bytes, snapshot.memory_free
    yield "cpu", need.cpu_millis, snapshot.cpu_free
    yield "disk", need.disk_bytes, snapshot.disk_free
    yield "ports", group.ports_width, snapshot.ports_free
    for name, count in group.devices:
        pages = name.startswith(HUGEPAGES)
        yield name if pages else f"device {name}", count, snapshot.device_free(name)


def counted_out(snapshot: Snapshot, group: GroupEntry, near: Near, left: Bools) -> list[tuple[str, int]]:
    """Of the nodes `left`, how many are out for what, each counted once; `left` becomes those that pass."""
    found = []
    for name, passed in filters(snapshot, group, near, left):
        out = int((left & ~passed).sum())
        if out:
            found.append((name, out))
        left &= passed
    return found


def explain(snapshot: Snapshot, group: GroupEntry, near: Near, allowed: Bools | None = None) -> str:
    """One line. `allowed`: only these nodes were asked."""
    if not snapshot.size:
        return "no node has joined the fleet"
    left = np.ones(snapshot.size, np.bool_) if allowed is None else allowed.copy()
    total = int(left.sum())
    out = counted_out(snapshot, group, near, left)
    return "; ".join(f"{count} of {total} nodes: {name}" for name, count in out)


def amount(what: str, count: int) -> str:
    if what in {"memory", "disk"}:
        return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / MIB:.0f} MiB"
    return f"{count / 1000:g} cores" if what == "cpu" else str(count)
