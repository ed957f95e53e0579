"""Canaries: copies of a new version that prove themselves beside those of the last good one, until it is promoted.

Owns whether a group waits for that, and what becomes of its canaries; a blue/green update is one with a canary for
every copy. Calls go to canaries as to all others, and to a second set (blue/green) not before it is promoted: that is
`mesh_intent`'s.
"""

import msgspec
import numpy as np

from controller.core import table as columns
from controller.core.copies import key_in_version, made_like
from controller.core.groups import GroupEntry
from controller.core.progress import Turn
from controller.core.state import State
from controller.core.table import Bools, Ints, among
from outrider.model.fleet import RolloutState
from outrider.model.job import Group


def guard(state: State, newest: GroupEntry) -> int | None:
    """The key of the last good version's group, where that stands until `newest` is promoted; else None."""
    entry, update = state.jobs[newest.job], newest.group.update
    if entry.promoted or entry.rollout is RolloutState.SUCCESSFUL or not (update.canary or update.blue_green):
        return None
    key = key_in_version(state, newest, entry.base) if entry.base else None
    if key is None or not state.groups[key].group.count or _same_content(state.groups[key].spec, newest.spec):
        return None
    return key


def wanted(newest: GroupEntry) -> Bools:
    """The indices that have a canary: the first ones."""
    group = newest.group
    return np.ones(group.count if group.update.blue_green else min(group.update.canary, group.count), np.bool_)


def withdraw(turn: Turn, newest: GroupEntry, rows: Ints, *, guarded: bool) -> Ints:
    """`rows` without the canaries that have had their time: those that were promoted are copies like others now."""
    state, draft = turn.state, turn.draft
    table, entry = state.table, state.jobs[newest.job]
    is_canary = turn.draft.roles(rows) == columns.CANARY
    if not is_canary.any():
        return rows
    found, others = rows[is_canary], rows[~is_canary]
    fresh = made_like(state, found, newest)
    if entry.promoted:
        promoted, found = found[fresh], found[~fresh]
        twins = among(table.index[others], table.index[promoted])
        draft.settle(promoted)
        draft.stop(others[twins], f"replaced by version {entry.latest}")
        kept = np.concatenate([others[~twins], promoted])
    elif guarded and entry.rollout is RolloutState.RUNNING:
        stays = fresh & (table.index[found] < len(wanted(newest)))
        kept, found = np.concatenate([others, found[stays]]), found[~stays]
    else:
        kept = others
    draft.stop(found, "its version was not promoted")
    return kept


def _same_content(one: Group, other: Group) -> bool:
    """A restart that was asked for is nothing to prove."""
    return msgspec.structs.replace(one, restarts=0) == msgspec.structs.replace(other, restarts=0)
