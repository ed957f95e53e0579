"""Copies that leave their nodes: drained ones with care, those of silent nodes by their group's disconnect policy.

Owns successors: copies that begin beside the one that leaves, and take its place once they are well. What leaves a
node whose deadline has passed is stopped at once, and its copy is made anew like one that is missing.
"""

import numpy as np

from controller.core import retry
from controller.core import table as columns
from controller.core.groups import GroupEntry
from controller.core.progress import Turn
from controller.core.table import Bools, Ints, Shorts, among
from outrider.model.job import JobType, Survivor

DRAINED = "its node is drained"


def force_out(turn: Turn, newest: GroupEntry, rows: Ints) -> Ints:
    """`rows` without those that must leave their nodes at once."""
    state, view = turn.state, turn.view
    leaves = view.emptied if newest.type is JobType.SYSTEM else view.forced
    if not leaves.any():
        return rows
    out = view.on(leaves, state.table.node[rows])
    turn.draft.stop(rows[out], DRAINED)
    return rows[~out]


def settle(turn: Turn, newest: GroupEntry, rows: Ints, well: Bools) -> Ints:
    """`rows`, of which `well` are, without those that the meeting of a copy and its successor makes needless."""
    table = turn.state.table
    at = np.flatnonzero(turn.draft.roles(rows) == columns.SUCCESSOR)
    if not len(at):
        return rows
    ordinary = np.flatnonzero(turn.draft.roles(rows) == columns.ORDINARY)
    first = {int(table.index[rows[place]]): place for place in ordinary.tolist()}
    settled: list[int] = []
    gone: dict[int, str] = {}
    for place in at.tolist():
        before = first.get(int(table.index[rows[place]]))
        if before is None:
            settled.append(place)
            continue
        leaves, why = _who_leaves(turn, newest, rows, well, before, place)
        if leaves is not None:
            gone[leaves] = why
        if leaves == before:
            settled.append(place)
    turn.draft.settle(rows[settled])
    for why in sorted(set(gone.values())):
        turn.draft.stop(rows[[place for place, reason in gone.items() if reason == why]], why)
    kept = np.ones(len(rows), np.bool_)
    kept[list(gone)] = False
    return rows[kept]


def _who_leaves(  # noqa: PLR0917  two rows and what is known of them
    turn: Turn, newest: GroupEntry, rows: Ints, well: Bools, before: int, after: int
) -> tuple[int | None, str]:
    """Of a copy and its successor: the place of the one that is not needed any more, if it can be told yet."""
    state = turn.state
    ref = int(state.table.node[rows[before]])
    if ref < 0 or turn.view.draining[ref]:
        return (before, DRAINED) if well[after] else (None, "")
    if not state.ready_nodes[ref]:
        return None, ""
    survivor = newest.group.disconnect.survivor
    if survivor is Survivor.REPLACEMENT:
        return (before, "its replacement stays") if well[after] else (None, "")
    if well[before]:
        return after, "the copy that it stood in for is back"
    if survivor is Survivor.HEALTHY and well[after]:
        return before, "its replacement is healthy before it"
    return None, ""


def leaving(turn: Turn, newest: GroupEntry, rows: Ints) -> Ints:
    """Ordinary copies of `rows` that want a successor and have none: of silent nodes first, then of drained ones.

    How many of the latter are allowed to move at a time is for the caller to say.
    """
    table, view = turn.state.table, turn.view
    if newest.type is not JobType.SERVICE or newest.volumes:  # batch work may end there; a volume stays on its node
        return np.zeros(0, np.int64)
    nodes = table.node[rows]
    drained = view.on(view.draining, nodes)
    silent = _stood_in_for(turn, newest, nodes)
    if not (drained.any() or silent.any()):
        return np.zeros(0, np.int64)
    turn.progress.moving = True
    has_one = among(table.index[rows], table.index[rows[turn.draft.roles(rows) == columns.SUCCESSOR]])
    has_one |= among(table.serial[rows], np.array(list(turn.state.moves.values()), np.int64))  # its guest is on its way
    free = (turn.draft.roles(rows) == columns.ORDINARY) & ~has_one
    return np.concatenate([rows[free & silent], rows[free & drained & ~silent]])


def stop_first(turn: Turn, newest: GroupEntry, leaving: Ints) -> Ints:
    """`leaving` without copies of a group that must never run twice: those begin elsewhere once they have ended."""
    if newest.group.disconnect.stop_after_s is None:
        return leaving
    turn.draft.stop(leaving, DRAINED)
    return leaving[:0]


def _stood_in_for(turn: Turn, newest: GroupEntry, nodes: Shorts) -> Bools:
    """Which copies' nodes are away for long enough; none while so many are that the brake is on."""
    policy, view = newest.group.disconnect, turn.view
    if policy.replace_after_s is None or turn.state.live.braked or not np.isfinite(view.away_s).any():
        return np.zeros(len(nodes), np.bool_)
    away = view.on(np.isfinite(view.away_s), nodes)
    due_s = np.where(away, view.away_s[nodes] + policy.replace_after_s, np.inf)
    turn.progress.wake(float(due_s[due_s > turn.now_s].min(initial=np.inf)))
    due: Bools = due_s <= turn.now_s
    return due


def admit(turn: Turn, rows: Ints, budget: int) -> Ints:
    """Those of `leaving` that may begin now: silent ones at the fleet's pace, drained ones within `budget`."""
    state, view = turn.state, turn.view
    silent = ~view.on(view.draining, state.table.node[rows])
    stand_ins = rows[silent]
    admitted, until_s = retry.admit(state, len(stand_ins), turn.now_s) if len(stand_ins) else (0, np.inf)
    turn.progress.wake(until_s)
    drained = rows[~silent]
    sick_first = np.argsort(state.table.healthy[drained], kind="stable")
    return np.concatenate([stand_ins[:admitted], drained[sick_first[: max(0, budget)]]])
