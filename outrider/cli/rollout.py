"""Waits for a job and shows how it gets on: a live table on a terminal, a line for each change elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from outrider import codec
from outrider.cli import output
from outrider.cli.client import STREAM_TIMEOUT_S, Fleet
from outrider.errors import PeerError, RefusedError
from outrider.model.allocation import TERMINAL, Allocation, AllocStatus, CopyRole, TaskReport
from outrider.model.fleet import JobState, JobStatus, RolloutState, VersionStatus
from outrider.model.job import Job
from outrider.v1 import operator_pb2

_FAILURES_SHOWN_MAX = 5
_SUCCESS = {JobState.COMPLETE: "is complete", JobState.WAITING: "waits to be launched"}


def wait(fleet: Fleet, job: str, version: int) -> JobStatus:
    """Until the rollout of `version` has ended. Raises RefusedError where it failed, with who and why."""
    with _progress() as show:
        for status in _statuses(fleet, job):
            if status.job.version < version:
                continue
            show(status)
            if status.job.version > version:
                raise _superseded(fleet, job, version, by=status.job.version)
            if status.rollout not in (RolloutState.RUNNING, RolloutState.PAUSED):
                break
    match status.rollout:
        case RolloutState.SUCCESSFUL:
            output.say(f"job {job}, version {version}: {_SUCCESS.get(status.state, 'runs as it should')}")
            return status
        case RolloutState.PROVEN:
            output.say(
                f"job {job}, version {version}: its canaries are healthy and wait: `outrider deployment promote {job}` "
                f"lets the rest follow, `outrider deployment fail {job}` takes them back"
            )
            return status
        case RolloutState.STOPPED:
            raise RefusedError("stopped", f"job {job}: was stopped meanwhile")
        case _:
            raise RefusedError("rollout-failed", _failure(status))


def _superseded(fleet: Fleet, job: str, version: int, *, by: int) -> RefusedError:
    """Another version came meanwhile: by somebody else, or because this one failed."""
    history = fleet.call(fleet.stub.GetJobHistory, operator_pb2.GetJobRequest(job=job)).versions
    versions = (codec.from_wire(one, VersionStatus) for one in history)
    ended = next((one for one in versions if one.version.version == version), None)
    if ended is not None and ended.rollout is RolloutState.FAILED:
        return RefusedError("rollout-failed", f"job {job}, version {version}: {ended.reason}")
    return RefusedError("superseded", f"job {job}: version {by} has taken over")


def wait_stopped(fleet: Fleet, job: str) -> None:
    """Until nothing of `job` runs."""
    with _progress() as show:
        for status in _statuses(fleet, job):
            show(status)
            if all(allocation.status in TERMINAL for allocation in status.allocations):
                return


def wait_scaled(fleet: Fleet, job: str, group: str, count: int) -> None:
    """Until the group has `count` healthy copies and no other.

    Raises RefusedError where that is not so within the time that the group gives each copy to become healthy.
    """
    request = operator_pb2.GetJobRequest(job=job)
    groups = codec.from_wire(fleet.call(fleet.stub.GetJob, request), JobStatus).job.job.groups
    deadline_s = max((one.update.healthy_deadline_s for one in groups if group in ("", one.name)), default=120.0)
    began_s = time.monotonic()
    missing: list[Allocation] = []
    with _progress() as show:
        try:
            for status in _statuses(fleet, job, timeout_s=deadline_s):
                show(status)
                copies = [each for each in status.allocations if group in ("", each.group)]
                live = [each for each in copies if each.status not in TERMINAL]
                missing = [each for each in live if not each.healthy]
                if len(live) == count and not missing:
                    return
        except PeerError:
            if time.monotonic() - began_s < deadline_s:
                raise
    shown = "".join(f"\n  {_line(each)}" for each in missing[:_FAILURES_SHOWN_MAX])
    raise RefusedError("not-scaled", f"job {job}: not {count} healthy copies within {deadline_s:g} s{shown}")


def next_launch(fleet: Fleet, job: Job) -> str:
    """When the schedule fires next."""
    for status in _statuses(fleet, job.name):
        if status.next_launch_s is not None:
            return output.when(status.next_launch_s, job.schedule)
        if status.job.stopped:
            break
    return "never: it was stopped meanwhile"


def _statuses(fleet: Fleet, job: str, timeout_s: float = STREAM_TIMEOUT_S) -> Iterator[JobStatus]:
    for message in fleet.stream(fleet.stub.WatchJob, operator_pb2.GetJobRequest(job=job), timeout_s):
        yield codec.from_wire(message, JobStatus)
    raise PeerError(f"job {job}: the fleet stopped telling of it; `outrider job status {job}` shows how it is")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[JobStatus], None]]:
    if sys.stderr.isatty():
        with _live() as show:
            yield show
        return
    told: dict[str, str] = {}

    def show_changes(status: JobStatus) -> None:
        for allocation in status.allocations:
            line = _line(allocation)
            if told.get(allocation.id) != line:
                told[allocation.id] = line
                output.say(line)

    yield show_changes


@contextlib.contextmanager
def _live() -> Iterator[Callable[[JobStatus], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    with Live(console=Console(stderr=True), refresh_per_second=10) as live:

        def show(status: JobStatus) -> None:
            table = Table(box=None, pad_edge=False)
            for header in ("ALLOCATION", "NODE", "ID", "STATUS", "HEALTHY", "WHY"):
                table.add_column(header)
            for allocation in status.allocations:
                colour = "red" if allocation.status in {AllocStatus.FAILED, AllocStatus.LOST} else "green"
                healthy = "yes" if allocation.healthy else "no"
                table.add_row(
                    copy_name(allocation),
                    allocation.node or "-",
                    allocation.id,
                    allocation.status,
                    healthy,
                    reason(allocation),
                    style=colour if allocation.healthy or colour == "red" else "yellow",
                )
            live.update(table)

        yield show


def reason(allocation: Allocation) -> str:
    """Why it is as it is, in one line; "" where all is well."""
    report = allocation.report
    words = [allocation.reason]
    if report is not None:
        words.append(report.message)
        words.extend(_of_task(task) for task in report.tasks)
        if allocation.status is AllocStatus.RUNNING and not allocation.healthy:
            words.extend(f"check of {check.service}: {check.output}" for check in report.checks if not check.passing)
    return " ".join("; ".join(dict.fromkeys(word for word in words if word)).split())


def _of_task(task: TaskReport) -> str:
    """Most of what is said of a task begins with its name."""
    return f"{task.name}: {task.message}" if task.message and not task.message.startswith(task.name) else task.message


def _failure(status: JobStatus) -> str:
    job = status.job.job.name
    lines = [f"job {job}, version {status.job.version}: {status.rollout_reason or 'the rollout failed'}"]
    bad = [each for each in status.allocations if each.job_version == status.job.version and not _well(each)]
    for allocation in bad[:_FAILURES_SHOWN_MAX]:
        lines.append(f"  {_line(allocation)}")
        tail = allocation.report.log_tail if allocation.report else ""
        lines.extend(f"    | {line}" for line in tail.splitlines())
    if len(bad) > _FAILURES_SHOWN_MAX:
        lines.append(f"  and {len(bad) - _FAILURES_SHOWN_MAX} more; `outrider job status {job}` shows all")
    elif bad:
        lines.append(f"  `outrider alloc logs {bad[0].id}` shows all that it said")
    return "\n".join(lines)


def _well(allocation: Allocation) -> bool:
    return allocation.healthy or allocation.status is AllocStatus.COMPLETE


def _line(allocation: Allocation) -> str:
    where = f"on {allocation.node}" if allocation.node else "nowhere yet"
    state = f"{allocation.status}, healthy" if allocation.healthy else str(allocation.status)
    why = reason(allocation)
    return f"{copy_name(allocation)} {allocation.id} {where}: {state}{why and f' ({why})'}"


def copy_name(allocation: Allocation) -> str:
    """web[0], and what it is beside others of its index."""
    role = "" if allocation.role is CopyRole.ORDINARY else f" ({allocation.role})"
    return f"{allocation.group}[{allocation.index}]{role}"
