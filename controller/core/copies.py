"""The copies of one group: which there should be, which there are, and of what content. Owns the reading of rows.

Decides nothing: `rollout`, `canaries` and `moving` do.
"""

import numpy as np

from controller.core import retry
from controller.core import table as columns
from controller.core.groups import GroupEntry
from controller.core.schedule import suits
from controller.core.state import State
from controller.core.table import Bools, Ints, among
from outrider.model.job import JobType


def running(state: State, rows: Ints) -> Ints:
    """Those that live and are to run."""
    table = state.table
    found: Ints = rows[(table.status[rows] == columns.LIVE) & (table.desired[rows] == columns.RUN)]
    return found


def wanted(state: State, group: GroupEntry) -> Bools:
    """Which indices there should be a copy for. A system job's index is the reference of its node."""
    if group.type is JobType.SYSTEM:
        return state.open_nodes & suits(state.nodes, group)
    asked = np.ones(group.group.count, np.bool_)
    if group.type is JobType.BATCH:
        # What ended by itself is done; what was lost with its node, or told to leave it, is wanted again.
        table = state.table
        over = ended(state, group, (columns.COMPLETE, columns.FAILED))
        over = over[table.desired[over] == columns.RUN]
        if retry.attempts_of(retry.policy_of(state, group), group) != 0:
            complete = table.status[over] == columns.COMPLETE
            over = over[complete | among(table.index[over], list(retry.given_up(state, group)))]
        done = table.index[over]
        asked[done[done < len(asked)]] = False
    return asked


def made_like(state: State, rows: Ints, group: GroupEntry) -> Bools:
    """Whose content is that of `group`: a count or a manner of updating that changed restarts nothing."""
    if not len(rows):
        return np.zeros(0, np.bool_)
    same = [key for key in _keys(state, group) if state.groups[key].spec == group.spec]
    return among(state.table.group[rows], same)


def told_like(state: State, rows: Ints, group: GroupEntry) -> Bools:
    """Whose agent knows all of `group` that agents need to know."""
    if not len(rows):
        return np.zeros(0, np.bool_)
    same = [key for key in _keys(state, group) if state.groups[key].told == group.told]
    return among(state.table.group[rows], same)


def ended(state: State, group: GroupEntry, how: tuple[int, ...]) -> Ints:
    """Allocations of this content that ended so since the newest version was submitted."""
    table, entry = state.table, state.jobs[group.job]
    rows = state.family_rows(group.family)
    rows = rows[among(table.status[rows], how)]
    if not len(rows):
        return rows
    rows = rows[table.changed_s[rows] >= entry.versions[entry.latest].submitted_at_s]
    found: Ints = rows[made_like(state, rows, group)]
    return found


def key_in_version(state: State, group: GroupEntry, version: int) -> int | None:
    """The key of the same group in another version of its job; None where that has no such group."""
    added = state.jobs[group.job].versions.get(version)
    for position, one in enumerate(added.job.groups if added is not None else ()):
        if one.name == group.group.name:
            return state.group_keys[group.job, version, position]
    return None


def _keys(state: State, group: GroupEntry) -> list[int]:
    """Of the same group in all versions that are kept."""
    found = (key_in_version(state, group, version) for version in state.jobs[group.job].versions)
    return [key for key in found if key is not None]
