"""How good each node is for the next copy of a group. Owns the formula; chooses nothing.

The score is a sum. With `placement: spread`: (room / 2 - copies) / count / 4, where `copies` is how many of the group
the node has already, and `room` what is left of its scarcer resource; so the fewest copies decide, then the load. With
`placement: pack`: what is used of the scarcer resource, / 4. The quarter lets wishes outweigh habit. To either:
weight / 100 of each affinity that holds, and for each spread weight / 100 * (1 - copies / share), of the copies on
nodes of the same value and the share wished for them. Higher is better.
"""

from collections.abc import Sequence

import numpy as np

from controller.core.groups import Distinct, GroupEntry
from controller.core.snapshot import Snapshot
from controller.core.table import Bools, Ints, Shorts, Times
from outrider.model.attributes import HOST
from outrider.model.job import Packing, Spread

_AVOIDED = 1000.0  # only where nothing else is left


class Near:
    """Where copies are already, that new ones keep away from: by node, of the group, and of the whole job."""

    def __init__(self, group: Ints, job: Ints | None = None, avoid: Sequence[int] = ()) -> None:
        self.group = group
        self.is_empty = not group.any()  # of the group
        self.job = group if job is None else job
        self.avoid = avoid  # nodes where a copy just failed

    def joined_by(self, refs: Ints) -> "Near":
        """With copies on these nodes too."""
        more = np.bincount(refs, minlength=len(self.group))
        return Near(self.group + more, self.job + more, self.avoid)


class Balance:
    """One wish to spread: how full each value of the attribute is."""

    def __init__(self, snapshot: Snapshot, group: GroupEntry, wish: Spread, near: Ints) -> None:
        column = snapshot.nodes.attributes.column(wish.attribute)
        self.codes: Shorts = column.codes
        self.counts: Times = _tally(column.codes, len(column.values), near)
        self._weight = wish.weight / 100
        count = max(1, group.group.count)
        there = snapshot.nodes.values_suited(wish.attribute, group.demand)
        wished = {target.value: target.percent / 100 * count for target in wish.targets}
        targets = {at: wished[value] for at, value in enumerate(column.values) if value in wished} if wished else {}
        others = max(1, int(there.sum()) - sum(bool(there[at]) for at in targets))
        self._shares: Times = np.full(len(column.values) + 1, max(0.0, count - sum(wished.values())) / others)
        for at, share in targets.items():
            self._shares[at] = share
        self._shares[-1] = 0.0
        self._wished = self._shares > 0

    def terms(self) -> Times:
        """By code; the last for nodes without the attribute."""
        terms = np.full(len(self._shares), -1.0)
        np.divide(self.counts, self._shares, out=terms, where=self._wished)
        np.subtract(1.0, terms, out=terms, where=self._wished)
        terms *= self._weight
        return terms


class Limit:
    """One distinct constraint: how many more each value of the attribute takes."""

    def __init__(self, snapshot: Snapshot, distinct: Distinct, near: Ints) -> None:
        column = snapshot.nodes.attributes.column(distinct.attribute)
        self.codes: Shorts = column.codes
        self.counts: Times = _tally(column.codes, len(column.values), near)
        self._most = distinct.most

    def open(self) -> Bools:
        """By code."""
        return np.asarray(self.counts < self._most)


class Scores:
    """Of one group, before anything of it is placed. The k-th copy put on a node counts those before it there."""

    def __init__(self, snapshot: Snapshot, group: GroupEntry, near: Near, allowed: Bools | None = None) -> None:
        self._snapshot = snapshot
        self._need = group.need
        self._have = near.group
        self._has_any = not near.is_empty
        self.packs = (group.packing or snapshot.packing) is Packing.PACK
        self._unit = 4 * max(1, group.group.count)
        self.eligible: Bools = snapshot.ready & snapshot.nodes.suited(group.demand)
        if allowed is not None:
            self.eligible = self.eligible & allowed
        self.most: Ints | None = None  # copies that each node takes because it must not have more
        self.limits: list[Limit] = []
        for distinct in group.distinct:
            there = near.job if distinct.whole_job else near.group
            if distinct.attribute == HOST:
                most = np.maximum(distinct.most - there, 0)
                self.most = most if self.most is None else np.minimum(self.most, most)
            else:
                self.limits.append(Limit(snapshot, distinct, there))
        self.balances = [Balance(snapshot, group, wish, near.group) for wish in group.spread]
        self.affinity: Times | None = None
        for one in group.affinities:
            held: Times = snapshot.nodes.attributes.passing(one.prefer).astype(np.float64) * (one.weight / 100)
            self.affinity = held if self.affinity is None else np.add(self.affinity, held)
        if near.avoid:
            avoided = np.zeros(snapshot.size)
            avoided[list(near.avoid)] = -_AVOIDED
            self.affinity = avoided if self.affinity is None else np.add(self.affinity, avoided)
        self.fits: Bools = self.eligible & snapshot.fits(group)
        if self.most is not None:
            self.fits &= self.most > 0
        self._static = bool(group.static_ports)
        self._counted = snapshot.counted(group)

    def first(self) -> Times:
        """Of each node's next copy, balances left out; -inf where it does not fit."""
        scores = self._base()
        if self.affinity is not None:
            scores += self.affinity
        np.putmask(scores, ~self.fits, -np.inf)
        return scores

    def room(self, group: GroupEntry) -> Ints:
        """How many copies each node takes."""
        room = np.where(self.fits, self._snapshot.room(group), 0)
        return room if self.most is None else np.minimum(room, self.most)

    def at(self, ref: int, k: int) -> float:
        """`first`, of the k-th copy on one node; -inf where that does not fit."""
        if (self._static and k > 1) or (self.most is not None and k > self.most[ref]):
            return -np.inf
        if any(wanted and free[ref] < k * wanted for free, wanted in self._counted):
            return -np.inf
        snapshot = self._snapshot
        left = min(
            float(snapshot.cpu_free[ref] - k * self._need.cpu_millis) / float(snapshot.cpu_scale[ref]),
            float(snapshot.memory_free[ref] - k * self._need.memory_bytes) / float(snapshot.memory_scale[ref]),
        )
        score = (1 - left) / 4 if self.packs else (0.5 * left - (int(self._have[ref]) + k - 1)) / self._unit
        return score if self.affinity is None else score + float(self.affinity[ref])

    def many(self, refs: Ints, k: Ints) -> Times:
        """`at` of many, where all fit."""
        left = self._left(refs, k)
        scores: Times = (1 - left) / 4 if self.packs else (0.5 * left - (self._have[refs] + k - 1)) / self._unit
        return scores if self.affinity is None else scores + self.affinity[refs]

    def above(self, refs: Ints, threshold: float) -> Ints:
        """How many copies on each node score `threshold` or more, as if there were room for any number; spread only."""
        snapshot, need = self._snapshot, self._need
        fixed = 0.0 if self.affinity is None else self.affinity[refs]
        spare = (fixed - threshold) * self._unit - self._have[refs] + 1
        found = np.full(len(refs), np.inf)
        for free, wanted, total in (
            (snapshot.cpu_free, need.cpu_millis, snapshot.cpu_scale),
            (snapshot.memory_free, need.memory_bytes, snapshot.memory_scale),
        ):
            slope = 0.5 * wanted / total[refs] + 1
            found = np.minimum(found, np.floor((0.5 * free[refs] / total[refs] + spare) / slope))
        counts: Ints = np.maximum(found, 0).astype(np.int64)
        return counts

    def parts(self) -> dict[str, Times]:
        """What the score of each node is made of, for people."""
        left = self._left(slice(None), 1)
        found = {"full": (1 - left) / 4} if self.packs else {
            "apart": -self._have / self._unit, "room": 0.5 * left / self._unit
        }  # fmt: skip
        if self.affinity is not None:
            found["affinity"] = self.affinity
        if self.balances:
            found["spread"] = sum((one.terms()[one.codes] for one in self.balances), np.zeros(self._snapshot.size))
        return found

    def _base(self) -> Times:
        """Of each node's next copy. New memory is what this costs most: as little as can be."""
        left = self._left(slice(None), 1)
        if self.packs:
            np.subtract(1, left, out=left)
            left /= 4
            return left
        left *= 0.5
        if self._has_any:
            left -= self._have
        left /= self._unit
        return left

    def _left(self, at: Ints | slice, k: Ints | int) -> Times:
        """What is left of the scarcer resource once the k-th copy is there."""
        snapshot, need = self._snapshot, self._need
        cpu: Times = np.subtract(snapshot.cpu_free[at], k * need.cpu_millis, dtype=np.float64)
        cpu /= snapshot.cpu_scale[at]
        memory: Times = np.subtract(snapshot.memory_free[at], k * need.memory_bytes, dtype=np.float64)
        memory /= snapshot.memory_scale[at]
        return np.minimum(cpu, memory, out=cpu)


def _tally(codes: Shorts, values: int, near: Ints) -> Times:
    """How many copies there are on nodes of each value; the last: on nodes without."""
    counts = np.zeros(values + 1)
    there = near.nonzero()[0]
    if len(there):
        np.add.at(counts, codes[there], near[there])
    return counts
