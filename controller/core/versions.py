"""Going back to an older version of a job, and changing how many copies a group has. Owns answers; writes nothing."""

import msgspec

from controller.core import quota
from controller.core.commands import Reply
from controller.core.entries import JobEntry
from controller.core.events import JobRevertRequested, JobScaleRequested, JobSubmitted
from controller.core.records import GroupScaled
from controller.core.state import State
from controller.core.submit import Answer, submit
from outrider.model.fleet import RolloutState
from outrider.model.job import Group, JobType

COUNT_MAX = 1_000_000


def revert(state: State, call: JobRevertRequested, now_s: float, addresses: int) -> Answer:
    """As a submission of what the version held: it becomes a new one."""
    entry = state.jobs.get(call.job)
    if entry is None:
        return _refused(call, "not-found", f"no job {call.job!r}; `outrider job ls` lists them")
    version = call.version or _last_good(entry)
    if not version:
        message = f"job {call.job}: no version before {entry.latest} was good; name one of `outrider job history`"
        return _refused(call, "conflict", message)
    if version not in entry.versions:
        message = f"job {call.job}: version {version} is not there; `outrider job history {call.job}` lists them"
        return _refused(call, "not-found", message)
    if version == entry.latest and not entry.stopped:
        return _refused(call, "conflict", f"job {call.job}: version {version} is the newest already")
    return submit(state, JobSubmitted(request=call.request, job=entry.versions[version].job), now_s, addresses)


def scale(state: State, call: JobScaleRequested) -> Answer:
    entry = state.jobs.get(call.job)
    if entry is None:
        return _refused(call, "not-found", f"no job {call.job!r}; `outrider job ls` lists them")
    names = [group.name for group in entry.job.groups]
    wanted = call.group or (names[0] if len(names) == 1 else None)
    group = next((one for one in entry.job.groups if one.name == wanted), None)
    if group is None:
        what = f"has no group {wanted!r}" if wanted else "has several groups"
        return _refused(call, "not-found", f"job {call.job} {what}; it has {', '.join(names)}")
    if why := _unscalable(entry, group, call.count):
        return _refused(call, "conflict", f"job {call.job}: {why}")
    if group.count == call.count:
        return (), Reply(request=call.request, version=entry.latest)
    scaled = [msgspec.structs.replace(one, count=call.count) if one is group else one for one in entry.job.groups]
    if too_much := quota.excess(state, msgspec.structs.replace(entry.job, groups=tuple(scaled))):
        return _refused(call, "quota", too_much)
    reason = f"{group.count} -> {call.count} by hand"
    record = GroupScaled(job=call.job, group=group.name, count=call.count, reason=reason)
    return (record,), Reply(request=call.request, version=entry.latest, changed=True)


def _last_good(entry: JobEntry) -> int:
    """Before the newest; 0 where there is none."""
    good = (v for v, end in entry.outcomes.items() if end.state is RolloutState.SUCCESSFUL and v < entry.latest)
    return max(good, default=0)


def _unscalable(entry: JobEntry, group: Group, count: int) -> str:
    if entry.stopped:
        return "it is stopped; `outrider job run` its file first"
    if entry.job.type is not JobType.SERVICE:
        return f"only the groups of a service are scaled; this is a {entry.job.type} job"
    if not 0 <= count <= COUNT_MAX:
        return f"count {count} is not within 0 and {COUNT_MAX}"
    bounds = group.scaling
    if bounds is not None and not bounds.count_min <= count <= bounds.count_max:
        return f"its scaling keeps group {group.name} within {bounds.count_min} and {bounds.count_max} copies"
    return ""


def _refused(call: JobRevertRequested | JobScaleRequested, code: str, message: str) -> Answer:
    return (), Reply(request=call.request, code=code, message=message)
