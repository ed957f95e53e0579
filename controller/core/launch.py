"""Jobs that are launched from others: by a schedule, or by hand. Owns when, under which name, how long they are kept.

Calendars are the edge's: the core asks `PlanLaunch`, and sets a timer on what it is told. A launch that fell due while
the controller was away is made up for once.
"""

from typing import Final

from controller.core import notices, quota
from controller.core import table as columns
from controller.core.child import child
from controller.core.commands import PlanLaunch, Reply
from controller.core.entries import JobEntry
from controller.core.events import JobDispatchRequested, LaunchDue, LaunchPlanned
from controller.core.kinds import Kind
from controller.core.records import JobForgotten, JobLaunched, Record
from controller.core.state import State
from controller.core.submit import added
from outrider.ids import JobName
from outrider.model.fleet import RolloutState
from outrider.model.job import Job, Payload

LAUNCH: Final = "launch"  # the timer of a job whose schedule fires


def begin(state: State) -> None:
    """After replay: what each schedule missed, and what is over already."""
    for name, entry in state.jobs.items():
        plan_next(state, name)
        for one in entry.children:
            note_over(state, one)


def plan_next(state: State, job: JobName) -> None:
    entry = state.jobs[job]
    if entry.stopped or entry.job.schedule is None:
        return
    since_s = max(entry.fired_s, entry.versions[entry.latest].submitted_at_s)
    state.live.out.append(
        PlanLaunch(job=job, version=entry.latest, schedule=entry.job.schedule, after_s=since_s, now_s=state.live.now_s)
    )


def planned(state: State, event: LaunchPlanned) -> None:
    entry = state.jobs.get(event.job)
    if entry is None or entry.stopped or entry.latest != event.version:
        return  # another version has asked for itself
    if event.due is not None:
        state.live.calls.append(LaunchDue(job=event.job, launch=event.due))
    if event.next is not None:
        state.live.launches[event.job] = event.next
        state.live.timers.set((LAUNCH, event.job), event.next.at_s)
    else:
        notices.of_job(state, Kind.JOB_SKIPPED, event.job, "its schedule never fires again")


def fired(state: State, job: JobName) -> None:
    """Its timer."""
    launch = state.live.launches.pop(job, None)
    if launch is not None:
        state.live.calls.append(LaunchDue(job=job, launch=launch))


def forget_plan(state: State, job: JobName) -> None:
    state.live.launches.pop(job, None)
    state.live.timers.cancel((LAUNCH, job))


def by_schedule(state: State, call: LaunchDue, now_s: float) -> tuple[Record, ...]:
    """What the schedule asks for. () where it is dealt with, or the job has another schedule by now."""
    entry, at_s = state.jobs.get(call.job), call.launch.at_s
    if entry is None or entry.stopped or entry.job.schedule is None or at_s <= entry.fired_s:
        return ()
    name = JobName(f"{call.job}-{call.launch.stamp}")
    job = child(entry.job, name, {}, None)
    reason = _obstacle(state, entry) or (f"there is a job {name} already" if name in state.jobs else "")
    if reason := reason or quota.excess(state, job):
        return (JobLaunched(job=call.job, number=entry.launches, fired_s=at_s, reason=reason),)
    launched = JobLaunched(job=call.job, number=entry.launches, fired_s=at_s, child=name)
    return launched, *added(state, job, 1, now_s)


def by_hand(state: State, call: JobDispatchRequested, now_s: float) -> tuple[tuple[Record, ...], Reply]:
    entry = state.jobs.get(call.job)
    code, message = _refusal(state, call, entry)
    if code or entry is None:
        return (), Reply(request=call.request, code=code, message=message)
    number = entry.launches + 1
    while (name := JobName(f"{call.job}-{number}")) in state.jobs:
        number += 1
    launched = child(entry.job, name, call.parameters, call.payload)
    if too_much := quota.excess(state, launched):
        return (), Reply(request=call.request, code="quota", message=too_much)
    records = added(state, launched, 1, now_s)
    reply = Reply(request=call.request, job=name, version=1, changed=True)
    return (JobLaunched(job=call.job, number=number, child=name), *records), reply


def tell(state: State, record: JobLaunched) -> None:
    """`record` is applied."""
    if record.child is not None:
        notices.of_job(state, Kind.JOB_LAUNCHED, record.job, record.child)
    elif record.reason:
        notices.of_job(state, Kind.JOB_SKIPPED, record.job, record.reason)
    if record.fired_s:
        plan_next(state, record.job)


def note_over(state: State, job: JobName) -> None:
    """Remember it where it was launched from another and is over: the oldest are forgotten."""
    entry = state.jobs.get(job)
    if entry is not None and entry.job.parent in state.jobs and is_over(state, job):
        state.live.children_over.setdefault(entry.job.parent, {}).setdefault(job)


def retired(state: State) -> tuple[Record, ...]:
    """Of each parent's children that are over, the oldest beyond those that are kept."""
    records: list[Record] = []
    for over in state.live.children_over.values():
        while len(over) > state.policy.children_kept:
            oldest = next(iter(over))
            del over[oldest]
            if is_over(state, oldest):  # and was not made to run again
                records.append(JobForgotten(job=oldest))
    return tuple(records)


def is_over(state: State, job: JobName) -> bool:
    """Its work is done, or given up, and nothing of it runs any more."""
    entry = state.jobs[job]
    if not entry.stopped and entry.rollout is RolloutState.RUNNING:
        return False
    table = state.table
    families = {(job, group.name) for version in entry.versions.values() for group in version.job.groups}
    return not any((table.status[state.family_rows(family)] == columns.LIVE).any() for family in families)


def _obstacle(state: State, entry: JobEntry) -> str:
    """What keeps a job with a schedule from another launch now."""
    if entry.job.schedule is None or entry.job.schedule.overlap:
        return ""
    over = state.live.children_over.get(entry.job.name, {})
    running = next((one for one in reversed(entry.children) if one not in over and not is_over(state, one)), None)
    return f"{running} still runs, and overlap is forbidden" if running is not None else ""


def _refusal(state: State, call: JobDispatchRequested, entry: JobEntry | None) -> tuple[str, str]:
    """Code and text; two empty ones where nothing is wrong."""
    if entry is None:
        return "not-found", f"no job {call.job!r}; `outrider job ls` lists them"
    if not entry.job.is_template:
        return "conflict", f"job {call.job} has neither parameters nor a schedule: it runs by itself"
    if entry.stopped:
        return "conflict", f"job {call.job} is stopped; `outrider job run` its file first"
    if obstacle := _obstacle(state, entry):
        return "conflict", obstacle
    wrong = _wrong_arguments(entry.job, call)
    return ("bad-input", f"job {call.job}: {wrong}") if wrong else ("", "")


def _wrong_arguments(job: Job, call: JobDispatchRequested) -> str:
    if job.parameters is None:
        return "it is launched by a schedule and takes no parameters" if call.parameters or call.payload else ""
    known = (*job.parameters.required, *job.parameters.optional)
    if missing := [name for name in job.parameters.required if name not in call.parameters]:
        return f"parameter {missing[0]!r} is required; --param {missing[0]}=VALUE"
    if unknown := [name for name in call.parameters if name not in known]:
        return f"no parameter {unknown[0]!r}; known: {', '.join(known) or 'none'}"
    if job.parameters.payload is Payload.REQUIRED and call.payload is None:
        return "a payload is required; --payload FILE"
    if job.parameters.payload is Payload.FORBIDDEN and call.payload is not None:
        return "it takes no payload"
    return ""
