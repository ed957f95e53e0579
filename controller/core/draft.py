"""A plan in the making: gathers stops and placements, gives out serials. Owns the one snapshot that they share."""

import itertools

import numpy as np

from controller.core.groups import GroupEntry
from controller.core.records import LatePlacement, Plan, Run, Stop
from controller.core.schedule import Placement, Snapshot, place
from controller.core.state import State
from controller.core.table import Ints, Shorts
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
        self.size = 0  # allocations made or placed
        self.cut = False  # something did not fit into this plan and must go with the next

    def stop(self, rows: Ints, reason: str) -> None:
        if len(rows):
            self._stops.append(Stop(serials=self._state.table.serial[rows].tobytes(), reason=reason))

    def place(self, key: int, missing: Ints, pending: Ints, spread: Ints) -> None:
        """Allocations of the group for the `missing` indices, and nodes for the `pending` rows.

        `spread`: the rows of the group that new copies should keep away from.
        """
        room = max(0, self._state.policy.plan_placements_max - self.size)
        self.cut |= len(missing) > room
        missing = missing[:room]
        count = len(pending) + len(missing)
        group = self._state.groups[key]
        if not count:
            if not len(pending):
                self._state.live.unplaced.pop(group.family, None)
            return
        if group.type is JobType.SYSTEM:
            indices = np.concatenate([self._state.table.index[pending].astype(np.int64), missing])
            found = self._place_each(group, indices)
        else:
            found = self._place_all(group, count, spread)
        nodes = np.array(found.nodes, np.int32)
        ports = np.array(found.ports, np.int32).reshape(len(nodes), len(group.mesh_services))
        if found.reason:
            self._state.live.unplaced[group.family] = found.reason
        else:
            self._state.live.unplaced.pop(group.family, None)
        self._add_late(pending, nodes[: len(pending)], ports[: len(pending)])
        self._add_runs(group, missing, nodes[len(pending) :], ports[len(pending) :])

    def plan(self, now_s: float) -> Plan | None:
        """None where nothing is to be changed."""
        if not (self._runs or self._late or self._stops):
            return None
        parent = self._state.generation
        return Plan(
            generation=Generation(parent.epoch, parent.counter + 1),
            parent=parent,
            at_s=now_s,
            runs=tuple(self._runs),
            late=tuple(self._late),
            stops=tuple(self._stops),
        )

    def _place_all(self, group: GroupEntry, count: int, spread: Ints) -> Placement:
        """A node or -1 for each."""
        snapshot = self._nodes()
        near = self._state.table.node[spread]
        have = np.bincount(near[near >= 0], minlength=snapshot.size)
        self._seed += 1
        found = place(snapshot, group, count, have, seed=self._seed)
        short = count - len(found.nodes)
        return Placement(
            nodes=found.nodes + [-1] * short,
            ports=found.ports + [0] * (short * len(group.mesh_services)),
            reason=found.reason,
        )

    def _place_each(self, group: GroupEntry, indices: Ints) -> Placement:
        """Each on the node that its index names."""
        snapshot = self._nodes()
        none_yet = np.zeros(snapshot.size, np.int64)
        nodes: list[int] = []
        ports: list[int] = []
        reason = ""
        for index in indices.tolist():
            found = place(snapshot, group, 1, none_yet, seed=0, allowed=np.arange(snapshot.size) == index)
            nodes.extend(found.nodes or [-1])
            ports.extend(found.ports or [0] * len(group.mesh_services))
            reason = found.reason or reason
        return Placement(nodes=nodes, ports=ports, reason=reason)

    def _nodes(self) -> Snapshot:
        if self._snapshot is None:
            self._snapshot = Snapshot(self._state.nodes, self._state.ready_nodes)
        return self._snapshot

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

    def _add_runs(self, group: GroupEntry, missing: Ints, nodes: Shorts, ports: Shorts) -> None:
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
                    first_serial=self._state.next_serial + self._made(),
                    first_index=int(missing[first]),
                    nodes=nodes[first:end].tobytes(),
                    ports=ports[first:end].tobytes(),
                )
            )
        self.size += len(missing)

    def _made(self) -> int:
        return sum(len(run.nodes) // 4 for run in self._runs)
