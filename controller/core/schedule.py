"""Where copies of a group go: filter, score, take the best, over a snapshot of the nodes' columns. Owns the choice.

Never changes the state; what it gives away it subtracts from its own snapshot. The choice is always that of placing
one copy after the other, each on the node with the highest score that it has then (`scores`); ties fall by `seed`.
Few copies are placed just so; many at once, which comes to the same.
"""

import contextlib
import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from controller.core.groups import GroupEntry
from controller.core.nodes import NodeTable
from controller.core.reasons import explain
from controller.core.scores import Balance, Limit, Near, Scores
from controller.core.snapshot import Snapshot
from controller.core.table import Bools, Ints, Times
from outrider.model.job import Value

_TIE_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying is a bijection
_ONE_BY_ONE_MAX = 32
_BISECTIONS = 64


class Placement(Value, frozen=True, kw_only=True):
    nodes: list[int]  # fewer than asked for where they did not fit
    ports: list[int]  # of the nodes' ranges, group by group
    reason: str = ""  # why the rest did not fit


def place(
    snapshot: Snapshot, group: GroupEntry, count: int, near: Near, *, seed: int, allowed: Bools | None = None
) -> Placement:
    """At most `count` more copies; only on `allowed` nodes."""
    with held_back(snapshot, group):
        refs = _choose(Scores(snapshot, group, near, allowed), group, count, seed)
        ports = snapshot.take(refs, group)
        reason = ""
        if len(refs) < count:
            reason = explain(snapshot, group, near.joined_by(refs), allowed)
    return Placement(nodes=refs.tolist(), ports=ports, reason=reason)


def place_on(snapshot: Snapshot, group: GroupEntry, refs: Ints, near: Near) -> Placement:
    """A copy on each of these nodes, where it fits: of a job that has one on every node."""
    allowed = np.zeros(snapshot.size, np.bool_)
    allowed[refs] = True
    with held_back(snapshot, group):
        fits = Scores(snapshot, group, near, allowed).fits[refs]
        reason = "" if fits.all() else explain(snapshot, group, near, allowed)
        ports = snapshot.take(refs[fits], group)
    return Placement(nodes=refs[fits].tolist(), ports=ports, reason=reason)


@contextlib.contextmanager
def held_back(snapshot: Snapshot, group: GroupEntry) -> Iterator[None]:
    """Room that is held for others is not there."""
    if not snapshot.holds:
        yield
        return
    snapshot.keep_held(group, 1)
    try:
        yield
    finally:
        snapshot.keep_held(group, -1)


def suits(nodes: NodeTable, group: GroupEntry) -> Bools:
    """Which nodes could ever run it: what a system job counts as its own."""
    return nodes.suited(group.demand)


def _choose(scores: Scores, group: GroupEntry, count: int, seed: int) -> Ints:
    first = scores.first()
    if count <= _ONE_BY_ONE_MAX:
        return _one_by_one(scores, first, count, seed)
    if scores.balances or scores.limits:
        return _merged_by_class(scores, first, count, seed)
    if scores.packs:
        return _filled(first, scores.room(group), count, seed)
    return _merged(scores, first, scores.room(group), count, seed)


def _one_by_one(scores: Scores, first: Times, count: int, seed: int) -> Ints:
    chosen: list[int] = []
    placed: dict[int, int] = {}
    while len(chosen) < count:
        total = first
        for at, balance in enumerate(scores.balances):
            term = balance.terms().take(balance.codes, mode="wrap")
            total = np.add(total if at else first, term, out=term)
        for limit in scores.limits:
            total = np.where(limit.open()[limit.codes], total, -np.inf)
        best = total.max(initial=-np.inf)
        if best == -np.inf:
            break
        candidates = (total == best).nonzero()[0]
        ref = int(candidates[_ties(candidates, seed).argmin()]) if len(candidates) > 1 else int(candidates[0])
        chosen.append(ref)
        _count(scores.balances, scores.limits, ref)
        placed[ref] = placed.get(ref, 0) + 1
        if len(chosen) < count:
            first[ref] = scores.at(ref, placed[ref] + 1)
    return np.array(chosen, np.int64)


def _count(balances: Sequence[Balance], limits: Sequence[Limit], ref: int) -> None:
    tallies: list[Balance | Limit] = [*balances, *limits]
    for tally in tallies:
        tally.counts[tally.codes[ref]] += 1


def _filled(first: Times, room: Ints, count: int, seed: int) -> Ints:
    """Packing: whoever is best stays so, for it gets fuller, until there is no room left."""
    refs = np.flatnonzero(first > -np.inf)
    refs = refs[np.lexsort((_ties(refs, seed), -first[refs]))]
    until = np.cumsum(np.minimum(room[refs], count))
    refs = refs[: int(np.searchsorted(until, count)) + 1]
    filled: Ints = np.repeat(refs, np.minimum(room[refs], count))[:count]
    return filled


def _merged(scores: Scores, first: Times, room: Ints, count: int, seed: int) -> Ints:
    """Each node's copies score less and less: the best `count` of all of them together."""
    refs = np.flatnonzero(first > -np.inf)
    if len(refs) > count:  # who is not among the first so many with its first copy never is
        refs = refs[np.argpartition(-first[refs], count)[: count + 1]]
    counts = np.minimum(room[refs], count)
    if int(counts.sum()) > count:
        counts = np.minimum(counts, _level(scores, refs, counts, count))
    owners = np.repeat(refs, counts)
    k = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    ranked = scores.many(owners, k)
    order = np.lexsort((_ties(owners, seed), -ranked))[:count]
    merged: Ints = owners[order]
    return merged


def _level(scores: Scores, refs: Ints, room: Ints, count: int) -> Ints:
    """How many copies of each node may be among the best `count`: a few too many, never one too few."""
    high = float(scores.many(refs, np.ones(len(refs), np.int64)).max())
    low = float(scores.many(refs, np.maximum(room, 1)).min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        total = int(np.minimum(scores.above(refs, middle), room).sum())
        if total >= count:
            low = middle
            if total <= count + len(refs):
                break
        else:
            high = middle
    return scores.above(refs, low) + 1  # one more: a rounding error must not lose what lies on the level


def _merged_by_class(scores: Scores, first: Times, count: int, seed: int) -> Ints:
    """Nodes of a class have the same values of what is balanced or limited: within it, the best goes first."""
    tallies: list[Balance | Limit] = [*scores.balances, *scores.limits]
    members = np.flatnonzero(first > -np.inf)
    if not len(members):
        return members
    rows, owner = np.unique(np.stack([tally.codes[members] for tally in tallies]), axis=1, return_inverse=True)
    values = rows.tolist()
    heaps: list[list[tuple[float, int, int, int]]] = [[] for _ in range(rows.shape[1])]
    ties = _ties(members, seed).tolist()
    for ref, tie, which in zip(members.tolist(), ties, owner.reshape(-1).tolist(), strict=True):
        heaps[which].append((-float(first[ref]), tie, ref, 1))
    for heap in heaps:
        heapq.heapify(heap)
    heads = np.array([-heap[0][0] for heap in heaps])
    chosen: list[int] = []
    while len(chosen) < count:
        total = heads
        for at, balance in enumerate(scores.balances):
            total = total + balance.terms()[values[at]]
        for at, limit in enumerate(scores.limits, len(scores.balances)):
            total = np.where(limit.open()[values[at]], total, -np.inf)
        which = int(np.argmax(total))
        if total[which] == -np.inf:
            break
        heap = heaps[which]
        _, tie, ref, k = heap[0]
        chosen.append(ref)
        _count(scores.balances, scores.limits, ref)
        following = scores.at(ref, k + 1)
        if following == -np.inf:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-following, tie, ref, k + 1))
        heads[which] = -heap[0][0] if heap else -np.inf
    return np.array(chosen, np.int64)


def _ties(refs: Ints, seed: int) -> npt.NDArray[np.uint64]:
    spread: npt.NDArray[np.uint64] = (refs.astype(np.uint64) ^ np.uint64(seed)) * _TIE_SPREAD
    return spread
