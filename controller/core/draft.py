"""A plan in the making: gathers stops and placements, gives out serials. Owns the one snapshot that they share.

Beside the plan it leaves in `live` why something found no node, and for whom room was made on which.
"""

import itertools
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from controller.core import dependencies, retry, sticky, volumes
from controller.core import table as columns
from controller.core.groups import GroupEntry, VolumeKey
from controller.core.near import neighbours
from controller.core.preempt import make_room
from controller.core.records import LatePlacement, Plan, Run, Stop, Update
from controller.core.schedule import Placement, held_back, place, place_on
from controller.core.scores import Near
from controller.core.snapshot import Hold, Snapshot
from controller.core.state import State
from controller.core.table import Bools, Codes, Ints, Shorts, among
from outrider.ids import JobName
from outrider.model.allocation import Generation
from outrider.model.job import JobType


class Draft:
    def __init__(self, state: State, seed: int) -> None:
        self._state = state
        self._seed = seed
        self._snapshot: Snapshot | None = None
        self._runs: list[Run] = []
        self._late: list[LatePlacement] = []
        self._stops: list[Stop] = []
        self._stopped: list[Ints] = []  # rows
        self._updates: list[Update] = []
        self._settled: list[Ints] = []  # serials
        self._is_stopped: Bools = np.zeros(state.table.size, np.bool_)  # by row, as is the next
        self._is_settled: Bools = np.zeros(state.table.size, np.bool_)
        self._moves: list[tuple[int, int]] = []
        self._given: dict[JobName, list[Ints]] = {}  # nodes, of jobs whose groups keep apart from each other
        self._next_serial = state.next_serial
        self._claimed: set[VolumeKey] = set()  # for one allocation alone, and given to it
        self.size = 0  # allocations made or placed
        self.cut = False  # something did not fit into this plan and must go with the next

    def stop(self, rows: Ints, reason: str, by: JobName | None = None) -> None:
        """`by`: the job that takes their place. What this plan stops already is left out."""
        if len(rows) and self._stopped:
            rows = rows[~self._is_stopped[rows]]
        if len(rows):
            self._is_stopped[rows] = True
            self._stopped.append(rows)
            self._stops.append(Stop(serials=self._state.table.serial[rows].tobytes(), reason=reason, by=by))

    def update(self, key: int, rows: Ints) -> None:
        """The allocations are of the group with `key` from here on: nothing that made them differs."""
        if len(rows):
            group, serials = self._state.groups[key], self._state.table.serial[rows]
            update = Update(job=group.job, version=group.version, group=group.position, serials=serials.tobytes())
            self._updates.append(update)

    def settle(self, rows: Ints) -> None:
        """Canaries and successors are copies like others from here on."""
        if len(rows):
            self._is_settled[rows] = True
            self._settled.append(self._state.table.serial[rows])

    def roles(self, rows: Ints) -> Codes:
        """As they are once this plan is carried out."""
        table = self._state.table
        roles = table.role[rows]
        if self._settled:
            roles[self._is_settled[rows]] = columns.ORDINARY
        return roles

    def place(  # noqa: PLR0917  what is missing, and where it may not go
        self, key: int, missing: Ints, pending: Ints, spread: Ints, now_s: float, role: int = columns.ORDINARY
    ) -> None:
        """Allocations of the group for the `missing` indices, and nodes for the `pending` rows.

        `spread`: the rows of the group that new copies should keep away from. Those that failed on a node lately keep
        away from it, where another can have them.
        """
        missing = self._not_still_there(self._state.groups[key], missing, role)
        room = max(0, self._state.policy.plan_placements_max - self.size)
        self.cut |= len(missing) > room
        missing = missing[:room]
        group, unplaced = self._state.groups[key], self._state.live.unplaced
        if not len(pending) and not len(missing):
            return
        near = neighbours(self._state, group, spread, self._given.get(group.job, ()))
        indices = np.concatenate([self._state.table.index[pending].astype(np.int64), missing])
        waits = dependencies.unmet(self._state, group)
        if waits:
            found = _nowhere(group, len(indices), waits)
        elif group.type is JobType.SYSTEM:
            found = self._place_each(group, indices, near)
        elif avoid := retry.nodes_to_avoid(self._state, group, indices, now_s):
            found = self._place_apart(group, indices, near, avoid)
        elif group.sticky and (homes := sticky.homes(self._state, group, indices)):
            found = self._place_at_home(group, indices, near, homes)
        else:
            found = self._place_all(group, len(indices), near)
        nodes = np.array(found.nodes, np.int32)
        ports = np.array(found.ports, np.int32).reshape(len(nodes), group.ports_width)
        if group.distinct:
            self._given.setdefault(group.job, []).append(nodes[nodes >= 0].astype(np.int64))
        reason = found.reason
        if reason and not waits and self._state.policy.preempts:
            serials = self._state.table.serial[pending].tolist()
            serials.extend(range(self._next_serial, self._next_serial + len(missing)))
            waiting = dict.fromkeys(serials[at] for at in np.flatnonzero(nodes < 0).tolist())
            if group.type is JobType.SYSTEM:
                waiting = {serial: int(ref) for serial, ref in zip(serials, indices, strict=True) if serial in waiting}
            elif group.volumes:
                waiting = self._beside_volumes(group, waiting)
            reason = self._make_room(group, near.joined_by(nodes[nodes >= 0].astype(np.int64)), waiting) or reason
        if reason:
            unplaced[group.family] = reason
        if len(pending):
            self._add_late(pending, nodes[: len(pending)], ports[: len(pending)])
        self._add_runs(group, missing, nodes[len(pending) :], ports[len(pending) :], role)

    def stops(self, row: int) -> bool:
        return bool(self._is_stopped[row])

    def move(self, row: int, allowed: Bools) -> str:
        """A successor of `row` on one of the `allowed` nodes, for its guest. Why there is none; or ""."""
        serial = self._next_serial
        reason = self._again(row, allowed, columns.SUCCESSOR)
        if not reason:
            self._moves.append((int(self._state.table.serial[row]), serial))
        return reason

    def replace(self, row: int, allowed: Bools, reason: str) -> str:
        """Another copy there instead of `row`, which stops for `reason`."""
        found = self._again(row, allowed, int(self._state.table.role[row]))
        if not found:
            self.stop(np.array([row]), reason)
        return found

    def _again(self, row: int, allowed: Bools, role: int) -> str:
        group = self._state.group_of(row)
        near = neighbours(self._state, group, np.array([row]), self._given.get(group.job, ()))
        self._seed += 1
        found = place(self._nodes(), group, 1, near, seed=self._seed, allowed=allowed)
        if not found.nodes:
            return found.reason or "no node has room for it"
        nodes = np.array(found.nodes, np.int32)
        ports = np.array(found.ports, np.int32).reshape(1, group.ports_width)
        self._add_runs(group, self._state.table.index[[row]].astype(np.int64), nodes, ports, role)
        return ""

    def plan(self, now_s: float) -> Plan | None:
        """None where nothing is to be changed."""
        if not (self._runs or self._late or self._stops or self._updates or self._settled):
            return None
        parent = self._state.generation
        return Plan(
            generation=Generation(parent.epoch, parent.counter + 1),
            parent=parent,
            at_s=now_s,
            runs=tuple(self._runs),
            late=tuple(self._late),
            stops=tuple(self._stops),
            updates=tuple(self._updates),
            settled=b"".join(serials.tobytes() for serials in self._settled),
            moves=tuple(self._moves),
        )

    def _place_apart(
        self, group: GroupEntry, indices: Ints, near: Near, avoid: Mapping[int, tuple[int, ...]]
    ) -> Placement:
        """As `_place_all`, and those with nodes to avoid one by one: elsewhere; if nothing else has room, where it is
        longest ago that they failed, and on the last one only if it is the only one.
        """
        burdened = among(indices, list(avoid))
        nodes = np.full(len(indices), -1)
        ports = np.zeros((len(indices), group.ports_width), np.int64)
        together = self._place_all(group, int((~burdened).sum()), near)
        nodes[~burdened] = together.nodes
        ports[~burdened] = np.array(together.ports, np.int64).reshape(len(together.nodes), ports.shape[1])
        near, reason = near.joined_by(nodes[nodes >= 0]), together.reason
        for at in np.flatnonzero(burdened).tolist():
            failed_on = avoid[int(indices[at])]
            apart = Near(near.group, near.job, failed_on)
            allowed = np.ones(self._nodes().size, np.bool_)
            allowed[failed_on[0]] = False
            found = self._place_all(group, 1, apart, allowed)
            if found.nodes[0] < 0:
                found = self._place_all(group, 1, apart)
            nodes[at], ports[at] = found.nodes[0], found.ports
            near, reason = near.joined_by(nodes[at : at + 1][nodes[at : at + 1] >= 0]), reason or found.reason
        return Placement(nodes=nodes.tolist(), ports=ports.ravel().tolist(), reason=reason)

    def _place_all(self, group: GroupEntry, count: int, near: Near, allowed: Bools | None = None) -> Placement:
        """A node or -1 for each."""
        self._seed += 1
        where = volumes.where(self._state, group, self._claimed)
        if where.reason:
            found = Placement(nodes=[], ports=[], reason=where.reason)
        else:
            found = place(self._nodes(), group, count, near, seed=self._seed, allowed=_both(where.allowed, allowed))
            if found.nodes:
                self._claimed |= volumes.single(self._state, group)
        short = count - len(found.nodes)
        return Placement(
            nodes=found.nodes + [-1] * short,
            ports=found.ports + [0] * (short * group.ports_width),
            reason="; ".join(filter(None, (found.reason, found.reason and where.note))),
        )

    def _place_at_home(self, group: GroupEntry, indices: Ints, near: Near, homes: Mapping[int, int]) -> Placement:
        """One by one: where the copy before it was, if that node has room, else anywhere."""
        nodes, ports, reason = [], [], ""
        for index in indices.tolist():
            found = None
            if index in homes:
                allowed = np.zeros(self._nodes().size, np.bool_)
                allowed[homes[index]] = True
                found = self._place_all(group, 1, near, allowed)
            if found is None or found.nodes[0] < 0:
                found = self._place_all(group, 1, near)
            nodes += found.nodes
            ports += found.ports
            near, reason = (
                near.joined_by(np.array([ref for ref in found.nodes if ref >= 0], np.int64)),
                reason or found.reason,
            )
        return Placement(nodes=nodes, ports=ports, reason=reason)

    def _place_each(self, group: GroupEntry, indices: Ints, near: Near) -> Placement:
        """Each on the node that its index names, or -1."""
        found = place_on(self._nodes(), group, indices, near)
        width, given = group.ports_width, dict(zip(found.nodes, itertools.count(), strict=False))
        ports = [
            port
            for ref in indices.tolist()
            for port in (found.ports[given[ref] * width :][:width] if ref in given else [0] * width)
        ]
        return Placement(
            nodes=[ref if ref in given else -1 for ref in indices.tolist()], ports=ports, reason=found.reason
        )

    def _beside_volumes(self, group: GroupEntry, waiting: dict[int, None]) -> dict[int, int | None]:
        """One at a time, on the node of its volumes; none where somebody has them."""
        where = volumes.where(self._state, group, self._claimed)
        if where.reason or where.allowed is None:
            return {}
        return {serial: int(ref) for serial, ref in zip(waiting, np.flatnonzero(where.allowed), strict=False)}

    def _make_room(self, group: GroupEntry, near: Near, waiting: dict[int, int | None]) -> str:
        """Allocations of lower priority go, for those by serial that found no node. What they wait for; or "".

        `waiting`: where a serial may run alone, None: anywhere.
        """
        state, snapshot = self._state, self._nodes()
        if self._lowest >= group.priority:
            return ""
        only = {ref: serial for serial, ref in waiting.items() if ref is not None}
        allowed = np.ones(snapshot.size, np.bool_)
        if only:
            allowed[:] = False
            allowed[list(only)] = True
        stopped = np.concatenate(self._stopped) if self._stopped else np.zeros(0, np.int64)
        for serial in waiting:
            state.live.nominated.pop(serial, None)
        snapshot.holds = tuple(hold for hold in snapshot.holds if hold.group.family != group.family)
        with held_back(snapshot, group):
            rooms = list(make_room(state, snapshot, group, near, len(waiting), stopped=stopped, allowed=allowed))
        for serial, room in zip(waiting, rooms, strict=False):
            rows = np.array(room.victims, np.int64)
            self.stop(rows, f"preempted by {group.job}, priority {group.priority}", group.job)
            state.live.nominated[only.get(room.ref, serial)] = room.ref
            snapshot.holds = (*snapshot.holds, Hold(ref=room.ref, group=group))
        names = sorted({state.nodes.nodes[room.ref].id for room in rooms})
        return f"waits until what stops on {', '.join(names)} has ended" if names else ""

    @cached_property
    def _lowest(self) -> int:
        """The lowest priority of any job."""
        return min((entry.job.priority for entry in self._state.jobs.values()), default=0)

    def _nodes(self) -> Snapshot:
        if self._snapshot is None:
            state = self._state
            self._snapshot = Snapshot(state.nodes, state.open_nodes, state.policy.placement, tuple(self._holds()))
        return self._snapshot

    def _holds(self) -> Iterable[Hold]:
        """Room that was made for those which still wait for it."""
        table, nominated = self._state.table, self._state.live.nominated
        for serial, ref in list(nominated.items()):
            row = table.row(serial)
            waits = row is not None and table.node[row] < 0 and table.status[row] == columns.LIVE
            if row is None or not waits or table.desired[row] != columns.RUN:
                del nominated[serial]
            else:
                yield Hold(ref=ref, group=self._state.group_of(row))

    def _not_still_there(self, group: GroupEntry, missing: Ints, role: int) -> Ints:
        """Of a group that must never run twice, or whose copies leave something to the next: what takes a copy's place
        waits until nothing of that is left.
        """
        waits = group.group.disconnect.stop_after_s is not None or (group.sticky and role == columns.ORDINARY)
        if not waits or not len(missing):
            return missing
        table, rows = self._state.table, self._state.family_rows(group.family)
        there = table.index[rows[(table.status[rows] == columns.LIVE) & (table.node[rows] >= 0)]]
        left: Ints = missing[~np.isin(missing, there)]
        return left

    def _add_late(self, pending: Ints, nodes: Shorts, ports: Shorts) -> None:
        placed = nodes >= 0
        # One entry for each version: a pending allocation may be of an older one with the same content.
        keys = self._state.table.group[pending]
        for key in np.unique(keys[placed]).tolist():
            chosen = placed & (keys == key)
            serials = self._state.table.serial[pending[chosen]]
            self._late.append(
                LatePlacement(serials=serials.tobytes(), nodes=nodes[chosen].tobytes(), ports=ports[chosen].tobytes())
            )
        self.size += int(placed.sum())

    def _add_runs(self, group: GroupEntry, missing: Ints, nodes: Shorts, ports: Shorts, role: int) -> None:
        starts = [0, len(missing)]
        if len(missing) and missing[-1] - missing[0] != len(missing) - 1:
            breaks = np.flatnonzero(np.diff(missing) != 1) + 1
            starts = [0, *breaks.tolist(), len(missing)]
        for first, end in itertools.pairwise(starts):
            if first == end:
                continue
            self._runs.append(
                Run(
                    job=group.job,
                    version=group.version,
                    group=group.position,
                    first_serial=self._next_serial,
                    first_index=int(missing[first]),
                    nodes=nodes[first:end].tobytes(),
                    ports=ports[first:end].tobytes(),
                    role=role,
                )
            )
            self._next_serial += end - first
        self.size += len(missing)


def _both(one: Bools | None, other: Bools | None) -> Bools | None:
    """Nodes that both allow; None: all."""
    if one is None or other is None:
        return other if one is None else one
    both: Bools = one & other
    return both


def _nowhere(group: GroupEntry, count: int, reason: str) -> Placement:
    return Placement(nodes=[-1] * count, ports=[0] * (count * group.ports_width), reason=reason)
