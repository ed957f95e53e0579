"""One group, wanted against placed: what of it starts, what stops, and how far its newest version has come.

A new version replaces the old one copy by copy: never more than `max_parallel` of a group are missing or not well on
purpose, be it for a new version or for a drained node. Nothing is touched twice: what agents can be told in place is.
"""

import numpy as np

from controller.core import canaries, copies, dependencies, migration, moving, retry
from controller.core import table as columns
from controller.core.copies import made_like
from controller.core.groups import GroupEntry
from controller.core.outlook import Outlook
from controller.core.progress import Turn
from controller.core.state import State
from controller.core.table import Bools, Ints, Times, among
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType

_NONE: Ints = np.zeros(0, np.int64)  # rows, or indices


def decide_group(turn: Turn, key: int) -> None:
    """What the next plan holds of the group with `key`, of its job's newest version."""
    state, draft = turn.state, turn.draft
    newest = state.groups[key]
    entry = state.jobs[newest.job]
    guard = canaries.guard(state, newest)
    rows = copies.running(state, state.family_rows(newest.family))
    state.live.unplaced.pop(newest.family, None)  # told anew by what is not placed now
    if guard is None and not state.moves:
        if not len(rows):
            _begin(turn, key)
            return
        if _is_complete(turn, key, rows):
            well = _well(turn, newest, rows)
            _note_failure(turn, newest, rows[~well], _NONE)
            turn.progress.done &= bool(well.all())
            return
    rows = migration.settle(state, draft, rows)
    rows = moving.force_out(turn, newest, rows)
    rows = canaries.withdraw(turn, newest, rows, guarded=guard is not None)
    if entry.rollout is RolloutState.RUNNING and not entry.paused:
        behind = made_like(state, rows, newest) & ~copies.told_like(state, rows, newest)
        draft.update(key, rows[behind])
        rows = _replace_sick(turn, newest, rows)
    well = _well(turn, newest, rows)
    rows = moving.settle(turn, newest, rows, well)
    is_canary = turn.draft.roles(rows) == columns.CANARY
    if guard is not None:
        turn.progress.done = False
        if entry.rollout is RolloutState.RUNNING:
            _place_canaries(turn, key, rows)
    _decide_ordinary(turn, key, guard, rows[~is_canary])
    migration.follow(state, draft, newest)
    turn.progress.moving |= migration.is_under_way(state, newest)


def _begin(turn: Turn, key: int) -> None:
    """As `_decide_ordinary`, of a group of which nothing is to run so far: most jobs are decided once, here."""
    state, newest = turn.state, turn.state.groups[key]
    missing = np.flatnonzero(copies.wanted(state, newest))
    ready = _not_held_back(turn, newest, missing)
    _note_failure(turn, newest, _NONE, missing)
    turn.draft.place(_home(state, key, None), ready, _NONE, _NONE, now_s=turn.now_s)
    failed = newest.type is JobType.BATCH and len(_failed_for_good(state, newest))
    turn.progress.done &= not len(missing) and not failed


def _is_complete(turn: Turn, key: int, rows: Ints) -> bool:
    """All copies are there, each of the newest version and on a node that nothing happens to: only their health can
    change what is decided. So it is of most groups most of the time."""
    table, group = turn.state.table, turn.state.groups[key]
    return (
        group.type is JobType.SERVICE
        and group.group.update.progress_deadline_s is None
        and len(rows) == group.group.count
        and bool((table.group[rows] == key).all())
        and int(table.index[rows].max()) < len(rows)
        and int(table.node[rows].min()) >= 0
        and not table.role[rows].any()
        and not turn.view.troubled[table.node[rows]].any()
    )


def _place_canaries(turn: Turn, key: int, rows: Ints) -> None:
    state, progress = turn.state, turn.progress
    newest, table = state.groups[key], state.table
    found = rows[turn.draft.roles(rows) == columns.CANARY]
    progress.canaries = True
    progress.auto_promote &= newest.group.update.auto_promote
    missing = _missing(state, found, canaries.wanted(newest))
    ready = _not_held_back(turn, newest, missing)
    if not state.jobs[newest.job].paused:
        turn.draft.place(key, ready, found[table.node[found] < 0], rows, role=columns.CANARY, now_s=turn.now_s)
    well = _well(turn, newest, found)
    progress.proven &= not len(missing) and bool(well.all())
    _note_failure(turn, newest, found[~well], missing)


def _decide_ordinary(turn: Turn, key: int, guard: int | None, rows: Ints) -> None:
    state, draft, view, progress = turn.state, turn.draft, turn.view, turn.progress
    newest, table = state.groups[key], state.table
    entry = state.jobs[newest.job]
    home_key = _home(state, key, guard)
    home = state.groups[home_key]
    wanted = copies.wanted(state, _counted(state, newest, guard))
    if newest.type is not JobType.SYSTEM:  # whose copies stay on a node that is away
        over = table.index[rows] >= len(wanted)
        draft.stop(rows[over], "scaled down")
        rows = rows[~over]
    lost_cause = ~made_like(state, rows, home) & (table.node[rows] < 0)
    draft.stop(rows[lost_cause], f"replaced by version {home.version}")
    rows = rows[~lost_cause]
    is_successor = turn.draft.roles(rows) == columns.SUCCESSOR
    ordinary, successors = rows[~is_successor], rows[is_successor]
    missing = _missing(state, ordinary, wanted)
    ready = _not_held_back(turn, newest, missing)
    well = _well(turn, newest, rows)
    out = (~well | view.on(view.silent, table.node[rows])) & ~view.on(view.draining, table.node[rows])
    fresh = made_like(state, rows, newest)
    if guard is None:
        _note_failure(turn, newest, rows[fresh & ~well], missing)
    budget = newest.group.update.max_parallel - int((out & fresh).sum()) - len(missing)
    stale = rows[~fresh & ~is_successor]
    rolls = guard is None and entry.rollout is RolloutState.RUNNING and not entry.paused and not progress.failure
    if rolls and not dependencies.unmet(state, newest):
        replaced = _next_to_roll(state, newest, stale, budget, view)
        ready = np.union1d(ready, table.index[replaced]) if len(replaced) else ready
        budget -= len(replaced)
        replaced = np.concatenate([replaced, rows[~fresh & is_successor]])
        draft.stop(replaced, f"replaced by version {entry.latest}")
        successors = successors[~among(successors, replaced)]
        rows = rows[~among(rows, replaced)]
    draft.place(home_key, ready, ordinary[table.node[ordinary] < 0], rows, now_s=turn.now_s)
    leaving = moving.leaving(turn, newest, rows)
    if len(leaving):
        leaving = moving.admit(turn, leaving, budget - int((out & ~fresh).sum()))
        leaving = migration.take_along(state, draft, newest, leaving)
        leaving = moving.stop_first(turn, newest, leaving)
    waiting = successors[table.node[successors] < 0]
    progress.moving |= bool(len(successors))
    draft.place(home_key, np.sort(table.index[leaving]), waiting, rows, role=columns.SUCCESSOR, now_s=turn.now_s)
    calm = bool(well[fresh].all())
    if newest.type is JobType.BATCH:
        calm = not len(rows) and not len(_failed_for_good(state, newest))
    progress.done &= not len(missing) and not len(stale) and calm


def _home(state: State, key: int, guard: int | None) -> int:
    """What missing copies are made from: the last good version while the newest has not proven itself, or failed."""
    newest = state.groups[key]
    entry = state.jobs[newest.job]
    if guard is not None:
        return guard
    if newest.type is JobType.BATCH or not entry.base or not (entry.paused or entry.rollout is RolloutState.FAILED):
        return key
    base = copies.key_in_version(state, newest, entry.base)
    return key if base is None else base


def _counted(state: State, newest: GroupEntry, guard: int | None) -> GroupEntry:
    """Whose count holds: one that is not promoted changes nothing of the copies there are."""
    return newest if guard is None else state.groups[guard]


def _missing(state: State, rows: Ints, wanted: Bools) -> Ints:
    """Wanted indices that none of `rows` has."""
    wanted = wanted.copy()
    indices = state.table.index[rows]
    wanted[indices[indices < len(wanted)]] = False
    return np.flatnonzero(wanted)


def _next_to_roll(state: State, newest: GroupEntry, stale: Ints, budget: int, view: Outlook) -> Ints:
    """Which of the old copies go now: those on drained nodes first, then the sick."""
    if newest.type is JobType.BATCH:
        return stale  # nobody waits for its health
    table = state.table
    stays = ~view.on(view.draining, table.node[stale])
    order = np.lexsort((table.index[stale], table.healthy[stale], stays))
    chosen: Ints = stale[order[: max(0, budget)]]
    return chosen


def _not_held_back(turn: Turn, group: GroupEntry, missing: Ints) -> Ints:
    """Those of `missing` that may be made now: not what failed lately, and what was lost at the fleet's pace."""
    state, progress, now_s = turn.state, turn.progress, turn.now_s
    held, until_s = retry.held_back(state, group, missing, now_s)
    progress.wake(until_s)
    ready = missing[~held]
    lost = among(ready, list(state.live.lost.get(group.family, ())))
    count = int(lost.sum())
    if count:
        admitted, until_s = retry.admit(state, count, now_s)
        progress.wake(until_s)
        replaced = ready[lost][:admitted]
        state.live.lost[group.family].difference_update(replaced.tolist())
        ready = np.sort(np.concatenate([ready[~lost], replaced]))
    return ready


def _well(turn: Turn, group: GroupEntry, rows: Ints) -> Bools:
    """Which of them are healthy, and have been for long enough."""
    if group.type is JobType.BATCH:
        return np.zeros(len(rows), np.bool_)
    table = turn.state.table
    since_s = table.healthy_since_s[rows] + group.group.update.min_healthy_s
    well: Bools = table.healthy[rows] & (since_s <= turn.now_s)
    ripening = since_s[~well & table.healthy[rows]]
    turn.progress.wake(float(ripening.min(initial=np.inf)))
    return well


def _replace_sick(turn: Turn, newest: GroupEntry, rows: Ints) -> Ints:
    """With a progress deadline, a new copy that is not healthy in time is tried elsewhere."""
    if newest.group.update.progress_deadline_s is None or newest.type is JobType.BATCH:
        return rows
    state, now_s = turn.state, turn.now_s
    table = state.table
    judged = made_like(state, rows, newest) & ~table.healthy[rows] & (table.node[rows] >= 0)
    judged &= table.healthy_since_s[rows] == np.inf
    sick = rows[judged]
    late = sick[_deadlines(state, newest, sick) <= now_s]
    for row in late.tolist():
        retry.note_failure(state, row, now_s)
    turn.draft.stop(late, f"not healthy within {newest.group.update.healthy_deadline_s:g} s")
    return rows[~among(rows, late)]


def _note_failure(turn: Turn, group: GroupEntry, sick: Ints, missing: Ints) -> None:
    """Whether the group makes the running rollout fail: one of its copies failed, or is not healthy in time."""
    state, progress, now_s = turn.state, turn.progress, turn.now_s
    entry, update = state.jobs[group.job], group.group.update
    if entry.rollout is not RolloutState.RUNNING or entry.paused:
        return
    failed = _failed_for_good(state, group)
    patient = update.progress_deadline_s is not None
    if len(failed):
        serial = int(state.table.serial[failed[-1]])
        why = state.reasons.get(serial, "")
        what = f"allocation {state.alloc_id(serial)} of group {group.group.name} failed"
        progress.fail(what + (f": {why}" if why else ""), auto_revert=update.auto_revert)
    elif len(sick) and group.type is not JobType.BATCH:
        deadlines = _deadlines(state, group, sick)
        first = int(np.argmin(deadlines))
        if deadlines[first] > now_s:
            progress.wake(float(deadlines[first]))
        elif not patient:
            progress.fail(_sick_text(state, group, int(sick[first])), auto_revert=update.auto_revert)
    judged = update.progress_deadline_s is not None and group.type is not JobType.BATCH and (len(sick) or len(missing))
    if judged and not dependencies.unmet(state, group):
        _note_standstill(turn, group, sick)


def _failed_for_good(state: State, group: GroupEntry) -> Ints:
    """Copies whose failure is the rollout's: any, or, where others may be tried in their place, those given up."""
    failed = copies.ended(state, group, (columns.FAILED,))
    patient = group.group.update.progress_deadline_s is not None or group.type is JobType.BATCH
    if patient and len(failed) and retry.attempts_of(retry.policy_of(state, group), group) != 0:
        failed = failed[among(state.table.index[failed], list(retry.given_up(state, group)))]
    return failed


def _note_standstill(turn: Turn, group: GroupEntry, sick: Ints) -> None:
    """No further copy became healthy for as long as the progress deadline allows."""
    state, progress, now_s = turn.state, turn.progress, turn.now_s
    update, table = group.group.update, state.table
    rows = copies.running(state, state.family_rows(group.family))
    rows = rows[made_like(state, rows, group)]
    well_since = table.healthy_since_s[rows]
    last_s = max(_started_s(state, group), float(well_since[well_since < np.inf].max(initial=0.0)))
    pulled_s = float(_pulled_s(state, sick).max(initial=0.0))
    assert update.progress_deadline_s is not None, "checked by the caller"
    due_s = last_s + update.progress_deadline_s + pulled_s
    if due_s > now_s:
        progress.wake(due_s)
        return
    why = f": {_sick_text(state, group, int(sick[0]))}" if len(sick) else ""
    reason = f"group {group.group.name} made no progress within {update.progress_deadline_s:g} s{why}"
    progress.fail(reason, auto_revert=update.auto_revert)


def _started_s(state: State, group: GroupEntry) -> float:
    """From when on the newest version is judged: what was before a restart or a word of an operator does not count."""
    entry, live = state.jobs[group.job], state.live
    return max(
        live.started_at_s or 0.0, entry.versions[entry.latest].submitted_at_s, live.steered_s.get(group.job, 0.0)
    )


def _deadlines(state: State, group: GroupEntry, sick: Ints) -> Times:
    since_s = np.maximum(state.table.changed_s[sick], _started_s(state, group))
    placed = state.table.node[sick] >= 0
    since_s = np.where(placed, since_s, np.maximum(since_s, dependencies.met_s(state, group)))
    deadlines: Times = since_s + group.group.update.healthy_deadline_s + _pulled_s(state, sick)
    return deadlines


def _pulled_s(state: State, rows: Ints) -> Times:
    """How long each waited for its images; for ever where they are on their way."""
    waited = np.zeros(len(rows))
    if state.live.pulling:
        for at, serial in enumerate(state.table.serial[rows].tolist()):
            pulling = state.live.pulling.get(serial)
            if pulling is not None:
                waited[at] = pulling.total_s if pulling.since_s == np.inf else np.inf
    return waited


def _sick_text(state: State, group: GroupEntry, row: int) -> str:
    serial, deadline_s = int(state.table.serial[row]), group.group.update.healthy_deadline_s
    what = f"allocation {state.alloc_id(serial)} of group {group.group.name}"
    if state.table.node[row] < 0:
        return f"{what} found no node within {deadline_s:g} s: {state.live.unplaced.get(group.family, '')}"
    report = state.live.reports.get(serial)
    output = next((check.output for check in report.checks if not check.passing), report.message) if report else ""
    return f"{what} was not healthy within {deadline_s:g} s" + (f": {output}" if output else "")
