"""Wanted against placed: what the next plan holds, and how each job's rollout stands. Owns both decisions, job by job.

Never places by itself (`schedule` does) and never writes (`commit` does); `rollout` decides group by group. One pass
looks at jobs that something happened to; a job that only waits for time sets a timer.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from controller.core import copies, notices, rollout
from controller.core.check import check
from controller.core.draft import Draft
from controller.core.kinds import Kind
from controller.core.outlook import Outlook, outlook
from controller.core.progress import Progress, Turn
from controller.core.records import Record, RolloutEnded, RolloutSteered
from controller.core.state import State
from controller.core.submit import added
from outrider.ids import JobName
from outrider.model.fleet import RolloutAction, RolloutState

JOB: Final = "job"  # the timer of a job that waits for time

# A failed rollout may still come good, unless an operator made it fail: what did not fit fits later, what was sick
# recovers. Paused and proven are running ones that wait.
TRANSITIONS: Mapping[RolloutState, frozenset[RolloutState]] = {
    RolloutState.RUNNING: frozenset({RolloutState.SUCCESSFUL, RolloutState.FAILED, RolloutState.STOPPED}),
    RolloutState.FAILED: frozenset({RolloutState.SUCCESSFUL}),
    RolloutState.SUCCESSFUL: frozenset(),
    RolloutState.STOPPED: frozenset(),
}


def decide(state: State, now_s: float, seed: int) -> tuple[Record, ...]:
    """The records of the next decision; () where nothing is to be done."""
    _look_at_stirred(state)
    if not state.live.dirty_jobs:
        return ()
    draft = Draft(state, seed)
    view = outlook(state, now_s)
    records: list[Record] = []
    # The important first: what is short is theirs.
    first = sorted(state.live.dirty_jobs, key=lambda job: -_priority(state, job))[: state.policy.plan_jobs_max]
    for job in first:
        if draft.size >= state.policy.plan_placements_max:
            break
        del state.live.dirty_jobs[job]
        if job not in state.jobs:
            continue  # it was over, and is forgotten
        progress = _decide_job(state, job, draft, view, now_s)
        if draft.cut:
            state.live.dirty_jobs[job] = None  # the rest with the next plan
        records.extend(_judge(state, job, progress, now_s))
        if progress.wake_s < np.inf:
            state.live.timers.set((JOB, job), progress.wake_s)
    plan = draft.plan(now_s)
    if plan is not None:
        check(state, plan)
        return (plan, *records)
    if state.live.dirty_jobs and not records:
        # Nothing is written that would bring the next step about: time does.
        state.live.timers.set((JOB, next(iter(state.live.dirty_jobs))), now_s)
    return tuple(records)


def _priority(state: State, job: JobName) -> int:
    return state.jobs[job].job.priority if job in state.jobs else 0


def way_back(state: State, job: JobName, now_s: float) -> tuple[tuple[Record, ...], str]:
    """The records that make the last good version the newest again, and the words for it; nothing where it is."""
    entry = state.jobs[job]
    good = entry.versions.get(entry.good_version)
    if good is None or good.job == entry.job:
        return (), ""
    version = entry.latest + 1
    return added(state, good.job, version, now_s), f"; version {version} is version {entry.good_version} again"


def _look_at_stirred(state: State) -> None:
    """Jobs with allocations on nodes to which something happened."""
    if not state.live.stirred:
        return
    stirred, state.live.stirred = state.live.stirred, {}
    keys = {key for ref in stirred for key in state.table.group[state.node_rows(ref)].tolist()}
    jobs = sorted({state.groups[key].job for key in keys})
    state.live.dirty_jobs.update(dict.fromkeys(jobs))


def _decide_job(state: State, job: JobName, draft: Draft, view: Outlook, now_s: float) -> Progress:
    entry = state.jobs[job]
    turn = Turn(state=state, draft=draft, view=view, now_s=now_s)
    progress = turn.progress
    current = () if entry.stopped else state.current_groups(job)
    kept = {state.groups[key].family for key in current}
    families = {(job, group.name) for version in entry.versions.values() for group in version.job.groups}
    for family in sorted(families - kept):
        rows = copies.running(state, state.family_rows(family))
        draft.stop(rows, "the job was stopped" if entry.stopped else "its group left the job")
        state.live.unplaced.pop(family, None)
    for key in current:
        rollout.decide_group(turn, key)
    if progress.moving:
        state.live.moving[job] = None
    else:
        state.live.moving.pop(job, None)
    return progress


def _judge(state: State, job: JobName, progress: Progress, now_s: float) -> list[Record]:
    """The rollout's end, where it came; the way back, where the job asks for one; and whether canaries are proven."""
    entry = state.jobs[job]
    was_proven = state.live.proven.pop(job, 0) is None
    if entry.stopped or entry.paused:
        return []
    if progress.failure:
        return _fail(state, job, progress, now_s)
    if progress.done and RolloutState.SUCCESSFUL in TRANSITIONS[entry.rollout] and not entry.final:
        return [RolloutEnded(job=job, version=entry.latest, state=RolloutState.SUCCESSFUL)]
    if progress.canaries and progress.proven:
        if progress.auto_promote:
            return [RolloutSteered(job=job, version=entry.latest, action=RolloutAction.PROMOTE)]
        state.live.proven[job] = None
        if not was_proven:
            notices.of_job(state, Kind.ROLLOUT_PROVEN, job, f"`outrider deployment promote {job}` lets the rest follow")
    return []


def _fail(state: State, job: JobName, progress: Progress, now_s: float) -> list[Record]:
    entry = state.jobs[job]
    if RolloutState.FAILED not in TRANSITIONS[entry.rollout]:
        return []
    records, words = way_back(state, job, now_s) if progress.auto_revert else ((), "")
    reason = progress.failure + words
    return [RolloutEnded(job=job, version=entry.latest, state=RolloutState.FAILED, reason=reason), *records]
