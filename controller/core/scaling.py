"""How many copies a group with `scaling:` should have: figures in, a wish out, with its reason. Owns that decision.

The figures are the agents', and volatile: after a restart nothing is changed before they have been there for a while.
The change itself waits among the operators' calls, as `ScaleDue`.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from controller.core import quota
from controller.core import table as columns
from controller.core.events import ScaleDue
from controller.core.groups import FamilyKey, GroupEntry
from controller.core.records import GroupScaled, Record
from controller.core.state import State
from controller.core.volatile import Scaler
from outrider.ids import JobName
from outrider.model.allocation import AllocFigures
from outrider.model.fleet import RolloutState, ScalingStatus
from outrider.model.job import ScalingMetric, ScalingPolicy

SCALE: Final = "scale"  # the timer of a job with groups that are scaled

TOLERANCE = 0.1  # of the target, either way: within it nothing changes
_MEASURED_SHARE = 0.5  # of the copies, at least
_UNITS = {
    ScalingMetric.REQUESTS: "requests/s",
    ScalingMetric.CONCURRENCY: "requests at a time",
    ScalingMetric.CPU: "% of its cpu",
}


def begin(state: State) -> None:
    for job in state.jobs:
        watch(state, job, state.live.now_s)


def watch(state: State, job: JobName, now_s: float) -> None:
    """From here on, if it has groups that are scaled."""
    entry = state.jobs[job]
    scaled = {(job, group.name) for group in entry.job.groups if group.scaling is not None and not entry.stopped}
    for family in [family for family in state.live.scalers if family[0] == job and family not in scaled]:
        del state.live.scalers[family]
    for family in scaled:
        state.live.scalers.setdefault(family, Scaler(began_s=now_s, changed_s=now_s))
    if scaled:
        state.live.timers.set((SCALE, job), now_s + state.policy.scaling_interval_s)
    else:
        state.live.timers.cancel((SCALE, job))


def take_figures(state: State, ref: int, figures: Sequence[AllocFigures], now_s: float) -> None:
    """An agent's, of its own allocations; of others its word is worth nothing."""
    table = state.table
    for one in figures:
        serial = state.serial(one.alloc)
        row = table.row(serial) if serial is not None else None
        if serial is None or row is None or table.node[row] != ref or table.status[row] != columns.LIVE:
            continue
        if state.group_of(row).group.scaling is not None and math.isfinite(one.load) and one.load >= 0:
            samples = state.live.loads.setdefault(serial, deque(maxlen=state.policy.scaling_samples_max))
            samples.append((now_s, one.load))


def fired(state: State, job: JobName, now_s: float) -> None:
    """The timer of `job`: look at each of its groups that are scaled."""
    entry = state.jobs.get(job)
    if entry is None or entry.stopped:
        return
    for key in state.current_groups(job):
        group = state.groups[key]
        scaler = state.live.scalers.get(group.family)
        if scaler is not None:
            _look(state, group, scaler, now_s)
    watch(state, job, now_s)


def changed(state: State, record: GroupScaled, now_s: float) -> None:
    """By whomever."""
    scaler = state.live.scalers.get((record.job, record.group))
    if scaler is not None:
        scaler.changed_s = now_s


def change(state: State, call: ScaleDue) -> tuple[Record, ...]:
    """The record of a change that was due; () where the group is another by now."""
    entry = state.jobs.get(call.job)
    group = next((one for one in entry.job.groups if one.name == call.group), None) if entry is not None else None
    if entry is None or entry.stopped or group is None or group.scaling is None or group.count != call.was:
        return ()
    groups = tuple(msgspec.structs.replace(one, count=call.count) if one is group else one for one in entry.job.groups)
    if too_much := quota.excess(state, msgspec.structs.replace(entry.job, groups=groups)):
        state.live.scalers[call.job, call.group].note = f"{call.count} would do, but {too_much}"
        return ()
    return (GroupScaled(job=call.job, group=call.group, count=call.count, reason=call.reason),)


def wish(policy: ScalingPolicy, count: int, mean: float) -> int:
    """How many copies would each have about the target to do, where `count` have `mean` each."""
    ratio = mean / policy.target
    wanted = count if abs(ratio - 1) <= TOLERANCE else math.ceil(count * ratio - 1e-9)
    return min(max(wanted, policy.count_min), policy.count_max)


def chosen(policy: ScalingPolicy, scaler: Scaler, count: int, now_s: float) -> int:
    """What to do about the newest wish: more at once, fewer only where fewer would have done for a whole cooldown.

    Nothing follows another change within the cooldown.
    """
    wanted = scaler.wishes[-1][1]
    if wanted == count or now_s - scaler.changed_s < policy.cooldown_s:
        return count
    if wanted > count:
        return wanted
    if now_s - scaler.began_s < policy.cooldown_s:
        return count
    return min(count, max(one for _, one in scaler.wishes))


def statuses(state: State, job: JobName) -> tuple[ScalingStatus, ...]:
    """For operators: what was measured last, and why nothing changes."""
    found = []
    for group in state.jobs[job].job.groups:
        scaler = state.live.scalers.get((job, group.name))
        if group.scaling is not None and scaler is not None:
            found.append(
                ScalingStatus(
                    group=group.name,
                    count=group.count,
                    policy=group.scaling,
                    measured=scaler.measured,
                    note=scaler.note,
                )
            )
    return tuple(found)


def _look(state: State, group: GroupEntry, scaler: Scaler, now_s: float) -> None:
    policy, count = group.group.scaling, group.group.count
    assert policy is not None, "asked of those that have one"
    # What was measured before a change says nothing about the copies that there are now.
    loads = _loads(state, group.family, max(now_s - state.policy.scaling_window_s, scaler.changed_s))
    scaler.measured = sum(loads) / len(loads) if loads else None
    scaler.note = _hold(state, group, len(loads))
    if scaler.note or scaler.measured is None:
        # What was wished before says nothing about what comes after.
        scaler.wishes.clear()
        scaler.began_s = now_s
        return
    wanted = wish(policy, count, scaler.measured)
    if count == policy.count_max and scaler.measured > policy.target * (1 + TOLERANCE):
        scaler.note = "more would do, and it has the most already"
    scaler.wishes.append((now_s, wanted))
    while scaler.wishes[0][0] < now_s - policy.cooldown_s:
        scaler.wishes.popleft()
    target = chosen(policy, scaler, count, now_s)
    if target == count:
        if wanted != count:
            scaler.note = f"{wanted} would do; waits for its cooldown, {policy.cooldown_s:g} s"
        return
    scaler.changed_s = now_s
    reason = f"{count} -> {target}: {_shown(policy, scaler.measured)} each, wanted {_shown(policy, policy.target)}"
    if target < count:
        reason += f", for {policy.cooldown_s:g} s"
    state.live.calls.append(ScaleDue(job=group.job, group=group.group.name, was=count, count=target, reason=reason))


def _hold(state: State, group: GroupEntry, measured: int) -> str:
    """Why nothing is decided now; "" where something can be."""
    if state.jobs[group.job].rollout is RolloutState.RUNNING:
        return "a rollout runs"
    if measured < max(1, group.group.count * _MEASURED_SHARE):
        return f"{measured} of {group.group.count} copies are measured"
    return ""


def _loads(state: State, family: FamilyKey, since_s: float) -> list[float]:
    """The mean of each healthy copy that was measured since then."""
    table = state.table
    rows = state.family_rows(family)
    rows = rows[(table.status[rows] == columns.LIVE) & (table.desired[rows] == columns.RUN) & table.healthy[rows]]
    found = []
    for serial in table.serial[rows].tolist():
        samples = state.live.loads.get(serial, ())
        recent = [load for at_s, load in samples if at_s > since_s]
        if recent:
            found.append(sum(recent) / len(recent))
    return found


def _shown(policy: ScalingPolicy, value: float) -> str:
    unit = _UNITS[policy.metric]
    return f"{value:.3g}{'' if unit.startswith('%') else ' '}{unit}"
