"""Wanted against placed: what the next plan holds, and how each job's rollout stands. Owns both decisions.

Never places by itself (`schedule` does) and never writes (`commit` does). One pass looks at jobs that something
happened to; a job that only waits for time sets a timer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from controller.core import table as columns
from controller.core.check import check
from controller.core.draft import Draft
from controller.core.groups import FamilyKey, GroupEntry
from controller.core.records import Record, RolloutEnded
from controller.core.schedule import suits
from controller.core.state import State
from controller.core.submit import added
from controller.core.table import Bools, Ints, Times
from controller.core.volatile import Backoff
from outrider.ids import JobName
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType

JOB: Final = "job"  # the timer of a job that waits for time

# A failed rollout may still come good: what did not fit fits later, what was sick recovers.
TRANSITIONS: Mapping[RolloutState, frozenset[RolloutState]] = {
    RolloutState.RUNNING: frozenset({RolloutState.SUCCESSFUL, RolloutState.FAILED, RolloutState.STOPPED}),
    RolloutState.FAILED: frozenset({RolloutState.SUCCESSFUL}),
    RolloutState.SUCCESSFUL: frozenset(),
    RolloutState.STOPPED: frozenset(),
}


@dataclass(slots=True)
class Progress:
    """How a job's newest version stands, gathered over its groups."""

    done: bool = True  # everything wanted is there, of this version, and well
    failure: str = ""
    auto_revert: bool = False  # of the group that failed
    wake_s: float = field(default=np.inf)  # when time alone changes the answer


def decide(state: State, now_s: float, seed: int) -> tuple[Record, ...]:
    """The records of the next decision; () where nothing is to be done."""
    draft = Draft(state, seed)
    records: list[Record] = []
    # The important first: what is short is theirs.
    for job in sorted(state.live.dirty_jobs, key=lambda job: -_priority(state, job)):
        if draft.size >= state.policy.plan_placements_max:
            break
        del state.live.dirty_jobs[job]
        if job not in state.jobs:
            continue  # it was over, and is forgotten
        progress = _decide_job(state, job, draft, now_s)
        if draft.cut:
            state.live.dirty_jobs[job] = None  # the rest with the next plan
        records.extend(_judge(state, job, progress, now_s))
        if progress.wake_s < np.inf:
            state.live.timers.set((JOB, job), progress.wake_s)
    plan = draft.plan(now_s)
    if plan is not None:
        check(state, plan)
        return (plan, *records)
    return tuple(records)


def _priority(state: State, job: JobName) -> int:
    entry = state.jobs.get(job)
    return entry.job.priority if entry is not None else 0


def note_failure(state: State, family: FamilyKey, now_s: float) -> None:
    """An allocation ended that should run: its replacement waits, longer each time."""
    policy = state.policy
    before = state.live.backoff.get(family)
    failures = before.failures if before is not None and now_s - before.last_s < policy.replace_reset_s else 0
    delay_s = min(policy.replace_delay_s * 2.0**failures, policy.replace_delay_max_s)
    state.live.backoff[family] = Backoff(failures + 1, now_s, now_s + delay_s)


def _decide_job(state: State, job: JobName, draft: Draft, now_s: float) -> Progress:
    entry = state.jobs[job]
    progress = Progress()
    current = () if entry.stopped else state.current_groups(job)
    kept = {state.groups[key].family for key in current}
    families = {(job, group.name) for version in entry.versions.values() for group in version.job.groups}
    for family in sorted(families - kept):
        rows = _running(state, state.family_rows(family))
        draft.stop(rows, "the job was stopped" if entry.stopped else "its group left the job")
        state.live.unplaced.pop(family, None)
    for key in current:
        _decide_group(state, key, draft, progress, now_s)
    return progress


def _decide_group(state: State, key: int, draft: Draft, progress: Progress, now_s: float) -> None:
    group, table = state.groups[key], state.table
    entry = state.jobs[group.job]
    rows = _running(state, state.family_rows(group.family))
    wanted = _wanted(state, group)
    if group.type is not JobType.SYSTEM:  # whose copies stay on a node that is away
        over = table.index[rows] >= len(wanted)
        draft.stop(rows[over], "scaled down")
        rows = rows[~over]
    fresh = _made_like(state, rows, group)
    nowhere = table.node[rows] < 0
    draft.stop(rows[~fresh & nowhere], f"replaced by version {entry.latest}")
    stale, rows = rows[~fresh & ~nowhere], rows[fresh]
    wanted[table.index[stale]] = False
    wanted[table.index[rows]] = False
    missing = _not_held_back(state, group, np.flatnonzero(wanted), progress, now_s)
    well = _well(state, group, rows, progress, now_s)
    _note_failure(state, group, rows[~well], progress, now_s)
    if entry.rollout is not RolloutState.FAILED and not progress.failure and len(stale):
        budget = group.group.update.max_parallel - int((~well).sum()) - len(missing)
        if group.type is JobType.BATCH:
            budget = len(stale)  # nobody waits for its health
        order = np.lexsort((table.index[stale], table.healthy[stale]))  # the sick first
        replaced, stale = stale[order[: max(0, budget)]], stale[order[max(0, budget) :]]
        draft.stop(replaced, f"replaced by version {entry.latest}")
        missing = np.union1d(missing, table.index[replaced])
    draft.place(key, missing, rows[table.node[rows] < 0], np.concatenate([stale, rows]))
    well_or_over = not len(rows) if group.type is JobType.BATCH else bool(well.all())
    progress.done &= not len(missing) and not len(stale) and well_or_over


def _running(state: State, rows: Ints) -> Ints:
    """Those that live and are to run."""
    table = state.table
    running: Ints = rows[(table.status[rows] == columns.LIVE) & (table.desired[rows] == columns.RUN)]
    return running


def _wanted(state: State, group: GroupEntry) -> Bools:
    """Which indices there should be an allocation for. A system job's index is the reference of its node."""
    if group.type is JobType.SYSTEM:
        return state.ready_nodes & suits(state.nodes, group)
    wanted = np.ones(group.group.count, np.bool_)
    if group.type is JobType.BATCH:
        # What ended by itself is done; what was lost with its node is wanted again.
        ended = _ended(state, group, (columns.COMPLETE, columns.FAILED))
        done = state.table.index[ended[state.table.desired[ended] == columns.RUN]]
        wanted[done[done < len(wanted)]] = False
    return wanted


def _made_like(state: State, rows: Ints, group: GroupEntry) -> Bools:
    """Whose content is that of `group`: a count or a manner of updating that changed restarts nothing."""
    keys = (
        state.group_keys[group.job, version, at]
        for version, added_then in state.jobs[group.job].versions.items()
        for at in range(len(added_then.job.groups))
    )
    same = [key for key in keys if state.groups[key].family == group.family and state.groups[key].spec == group.spec]
    made: Bools = np.isin(state.table.group[rows], same)
    return made


def _ended(state: State, group: GroupEntry, how: tuple[int, ...]) -> Ints:
    """Allocations of this content that ended so since the newest version was submitted."""
    table, entry = state.table, state.jobs[group.job]
    rows = state.family_rows(group.family)
    rows = rows[np.isin(table.status[rows], how)]
    rows = rows[table.changed_s[rows] >= entry.versions[entry.latest].submitted_at_s]
    ended: Ints = rows[_made_like(state, rows, group)]
    return ended


def _not_held_back(state: State, group: GroupEntry, missing: Ints, progress: Progress, now_s: float) -> Ints:
    """`missing` without the copies that failed and whose replacement waits."""
    backoff = state.live.backoff.get(group.family)
    if backoff is None or backoff.until_s <= now_s or not len(missing):
        return missing
    table = state.table
    ended = _ended(state, group, (columns.FAILED, columns.COMPLETE))
    failed = ended[table.desired[ended] == columns.RUN]
    held = np.isin(missing, table.index[failed])
    if held.any():
        progress.wake_s = min(progress.wake_s, backoff.until_s)
        progress.done = False
    return missing[~held]


def _well(state: State, group: GroupEntry, rows: Ints, progress: Progress, now_s: float) -> Bools:
    """Which of them are healthy, and have been for long enough."""
    if group.type is JobType.BATCH:
        return np.zeros(len(rows), np.bool_)
    table = state.table
    since_s = table.healthy_since_s[rows] + group.group.update.min_healthy_s
    well: Bools = table.healthy[rows] & (since_s <= now_s)
    ripening = since_s[~well & table.healthy[rows]]
    progress.wake_s = min(progress.wake_s, float(ripening.min(initial=np.inf)))
    return well


def _note_failure(state: State, group: GroupEntry, sick: Ints, progress: Progress, now_s: float) -> None:
    """Whether the group makes the running rollout fail: one of its allocations failed, or is not healthy in time."""
    entry = state.jobs[group.job]
    if entry.rollout is not RolloutState.RUNNING:
        return
    table, update = state.table, group.group.update
    failed = _ended(state, group, (columns.FAILED,))
    reason = ""
    if len(failed):
        serial = int(table.serial[failed[-1]])
        why = state.reasons.get(serial, "")
        reason = f"allocation {state.alloc_id(serial)} of group {group.group.name} failed" + (f": {why}" if why else "")
    elif len(sick) and group.type is not JobType.BATCH:
        started_s = max(state.live.started_at_s or 0.0, entry.versions[entry.latest].submitted_at_s)
        deadlines = np.maximum(table.changed_s[sick], started_s) + update.healthy_deadline_s + _pulled_s(state, sick)
        first = int(np.argmin(deadlines))
        if deadlines[first] <= now_s:
            reason = _sick_text(state, group, int(sick[first]))
        else:
            progress.wake_s = min(progress.wake_s, float(deadlines[first]))
    if reason and not progress.failure:
        progress.failure, progress.auto_revert = reason, update.auto_revert


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


def _judge(state: State, job: JobName, progress: Progress, now_s: float) -> list[Record]:
    """The rollout's end, where it came; and the way back, where the job asks for one."""
    entry = state.jobs[job]
    if entry.stopped:
        return []
    if progress.failure:
        end, reason = RolloutState.FAILED, progress.failure
    elif progress.done:
        end, reason = RolloutState.SUCCESSFUL, ""
    else:
        return []
    if end not in TRANSITIONS[entry.rollout]:
        return []
    way_back: tuple[Record, ...] = ()
    if end is RolloutState.FAILED and progress.auto_revert and entry.good_version:
        good = entry.versions[entry.good_version].job
        if good != entry.job:
            way_back = added(state, good, entry.latest + 1, now_s)
            reason += f"; version {entry.latest + 1} is version {entry.good_version} again"
    return [RolloutEnded(job=job, version=entry.latest, state=end, reason=reason), *way_back]
