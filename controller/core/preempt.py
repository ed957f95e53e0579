"""Who must go so that a copy of higher priority fits. Owns the choice of victims; stops nobody itself.

Least harm: the most important victim is as unimportant as can be; then as few as possible. Never one of the same or a
higher priority. Room that is about to come free by itself is waited for first.
"""

from collections.abc import Iterator

import numpy as np

from controller.core import table as columns
from controller.core.groups import GroupEntry
from controller.core.scores import Near, Scores
from controller.core.snapshot import Snapshot
from controller.core.state import State
from controller.core.table import Bools, Ints
from outrider.model.job import JobType, Value

_NODES_TRIED_MAX = 32  # of those where the harm may be least
_COPIES_MAX = 256  # in one plan


class Room(Value, frozen=True, kw_only=True):
    """A node where a copy fits once these allocations, by row, are gone; none: once those have ended that stop now."""

    ref: int
    victims: tuple[int, ...] = ()


class _Standing:
    """What stands on the nodes: what it takes, and how important it is."""

    def __init__(self, state: State, snapshot: Snapshot, group: GroupEntry, stopped: Ints) -> None:
        table = state.table
        live = np.flatnonzero((table.status[: table.size] == columns.LIVE) & (table.node[: table.size] >= 0))
        keys, which = np.unique(table.group[live], return_inverse=True)
        entries = [state.groups[key] for key in keys.tolist()]
        going = (table.desired[live] == columns.STOP) | np.isin(live, stopped)
        self.priority: Ints = np.array([entry.priority for entry in entries], np.int64)[which]
        self.rows, self.nodes = live, table.node[live].astype(np.int64)
        needs = np.array([_needs(group, entry) for entry in entries], np.int64)
        needs = needs.reshape(len(entries), 4 + len(group.devices))
        self.taken: list[Ints] = [column[which] for column in needs.T]
        self.wanted = [wanted for _, wanted in snapshot.counted(group)]
        self.soon = [
            free + self.sum(snapshot.size, taken, going)
            for (free, _), taken in zip(snapshot.counted(group), self.taken, strict=True)
        ]
        self.open: Bools = ~going & (self.priority < group.priority)  # may be told to go

    def sum(self, size: int, taken: Ints, which: Bools) -> Ints:
        sums: Ints = np.bincount(self.nodes[which], weights=taken[which], minlength=size).astype(np.int64)
        return sums

    def enough(self, more: list[Ints] | None = None) -> Bools:
        """Where a copy fits once what is going, and `more`, is gone."""
        enough = np.ones(len(self.soon[0]), np.bool_)
        for at, wanted in enumerate(self.wanted):
            enough &= self.soon[at] + (more[at] if more else 0) >= wanted
        return enough


def make_room(
    state: State, snapshot: Snapshot, group: GroupEntry, near: Near, count: int, *, stopped: Ints, allowed: Bools
) -> Iterator[Room]:
    """For up to `count` copies, each told with what the ones before it took in mind."""
    standing = _Standing(state, snapshot, group, stopped)
    for _ in range(min(count, _COPIES_MAX)):
        scores = Scores(snapshot, group, near, allowed)
        possible = scores.eligible if scores.most is None else scores.eligible & (scores.most > 0)
        for limit in scores.limits:
            possible = possible & limit.open()[limit.codes]
        found = _room(state, standing, group, possible)
        if found is None:
            return
        yield found
        gone = np.isin(standing.rows, np.array(found.victims, np.int64))
        standing.open &= ~gone
        for at, taken in enumerate(standing.taken):
            standing.soon[at][found.ref] += int(taken[gone].sum()) - standing.wanted[at]
        if group.static_ports or group.type is JobType.SYSTEM:
            allowed = allowed & (np.arange(snapshot.size) != found.ref)
        near = near.joined_by(np.array([found.ref]))


def _room(state: State, standing: _Standing, group: GroupEntry, possible: Bools) -> Room | None:
    free = _ports_come_free(state, group, possible)
    waiting = np.flatnonzero(possible & free & standing.enough())
    if len(waiting):
        return Room(ref=int(waiting[0]))
    for priority in np.unique(standing.priority[standing.open]).tolist():
        which = standing.open & (standing.priority <= priority)
        size = len(possible)
        more = [standing.sum(size, taken, which) for taken in standing.taken]
        nodes = np.flatnonzero(possible & standing.enough(more))
        rooms = []
        for ref in nodes[:_NODES_TRIED_MAX].tolist():
            victims = _victims(state, standing, group, ref, which & (standing.nodes == ref))
            if victims is not None:
                rooms.append(Room(ref=ref, victims=victims))
        if rooms:
            return min(rooms, key=lambda room: (len(room.victims), room.ref))
    return None


def _victims(state: State, standing: _Standing, group: GroupEntry, ref: int, which: Bools) -> tuple[int, ...] | None:
    """The fewest of these that make room; None where a pinned port stays taken."""
    at = np.flatnonzero(which)
    takes = {int(place): [int(taken[place]) for taken in standing.taken] for place in at.tolist()}
    lacking = [wanted - int(soon[ref]) for wanted, soon in zip(standing.wanted, standing.soon, strict=True)]
    chosen: list[int] = []
    for port in group.static_ports:
        holders = [place for place in takes if port in _ports(state, int(standing.rows[place]))]
        if not holders and ref in state.nodes.holders.get(port, ()) and not _goes(state, standing, ref, port):
            return None
        chosen.extend(place for place in holders if place not in chosen)
    pinned = set(chosen)
    while any(short > 0 for short in _still(lacking, chosen, takes)):
        short = _still(lacking, chosen, takes)
        left = [place for place in takes if place not in chosen]
        if not left:
            return None
        chosen.append(max(left, key=lambda place: (_helps(takes[place], short), -int(standing.priority[place]))))
    for place in sorted(chosen, key=lambda place: -int(standing.priority[place])):
        without = [one for one in chosen if one != place]
        if place not in pinned and not any(short > 0 for short in _still(lacking, without, takes)):
            chosen = without
    return tuple(sorted(int(standing.rows[place]) for place in chosen))


def _still(lacking: list[int], chosen: list[int], takes: dict[int, list[int]]) -> list[int]:
    return [short - sum(takes[place][at] for place in chosen) for at, short in enumerate(lacking)]


def _helps(takes: list[int], short: list[int]) -> float:
    """How much of what is lacking it gives, each resource counted as a share."""
    return sum(min(taken, lack) / lack for taken, lack in zip(takes, short, strict=True) if lack > 0)


def _needs(asking: GroupEntry, entry: GroupEntry) -> tuple[int, ...]:
    """What `entry` takes of each thing that the asking group is counted by, in the order of `Snapshot.counted`."""
    need, devices = entry.need, dict(entry.devices)
    counted = (need.cpu_millis, need.memory_bytes, need.disk_bytes, entry.ports_width)
    return (*counted, *(devices.get(name, 0) for name, _ in asking.devices))


def _ports_come_free(state: State, group: GroupEntry, possible: Bools) -> Bools:
    """Where no pinned port is taken, or only by what is going already."""
    free = np.ones(len(possible), np.bool_)
    for port in group.static_ports:
        for ref in state.nodes.holders.get(port, ()):
            rows = state.node_rows(ref).tolist()
            holder = next((row for row in rows if port in _ports(state, row)), None)
            free[ref] &= holder is not None and state.table.desired[holder] == columns.STOP
    return free


def _goes(state: State, standing: _Standing, ref: int, port: int) -> bool:
    rows = standing.rows[(standing.nodes == ref) & ~standing.open].tolist()
    return any(port in _ports(state, row) and state.table.desired[row] == columns.STOP for row in rows)


def _ports(state: State, row: int) -> tuple[int, ...]:
    return (*state.ports.get(int(state.table.serial[row]), ()), *state.group_of(row).static_ports)
