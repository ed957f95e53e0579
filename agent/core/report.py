"""What the agent says of an allocation (`AllocReport`), what it writes down (`AllocRecord`), and in which words."""

from agent.core.events import AllocRecord, TaskExit, TaskRecord
from agent.core.lifecycle import Phase
from agent.core.state import AllocState, Stray, TaskState
from outrider.model.allocation import AllocReport, AllocStatus, CheckReport, TaskReport, TaskStatus
from outrider.model.job import MIB, Service, Task, TaskRole

_SIGNALS = {1: "HUP", 2: "INT", 3: "QUIT", 4: "ILL", 6: "ABRT", 7: "BUS", 8: "FPE", 9: "KILL", 11: "SEGV", 13: "PIPE"}
_SIGNALS |= {10: "USR1", 12: "USR2", 14: "ALRM", 15: "TERM"}
_STOPPING = frozenset({Phase.DRAINING, Phase.STOPPING, Phase.SIDECAR_STOPPING, Phase.CLEANING})


def alloc_report(alloc: AllocState) -> AllocReport:
    status = _status(alloc)
    return AllocReport(
        alloc=alloc.id,
        status=status,
        tasks=tuple(_task_report(task) for task in alloc.tasks.values()),
        checks=tuple(_check_report(alloc, service, status) for service in alloc.assignment.group.services),
        message=alloc.failure or alloc.images_message or alloc.message or _init_message(alloc),
        pulling=alloc.pulling,
        local_address=alloc.local_address,
        log_tail=alloc.log_tail,
        move=alloc.move,
    )


def stray_report(stray: Stray) -> AllocReport:
    message = "found running on this node, without a record of what it is; kept until the controller says"
    return AllocReport(
        alloc=stray.found.alloc,
        status=AllocStatus.STOPPING if stray.cleaning else AllocStatus.RUNNING,
        message=message,
        local_address=stray.found.local_address or "",
    )


def alloc_record(alloc: AllocState) -> AllocRecord:
    return AllocRecord(
        assignment=alloc.assignment,
        tasks={name: _task_record(task) for name, task in alloc.tasks.items()},
        passing=tuple(probe.service for probe in alloc.probes.values() if probe.passing),
        stopping=alloc.stopping,
        failure=alloc.failure,
        log_tail=alloc.log_tail,
        ended=alloc.phase is Phase.ENDED,
        restarts_done=alloc.restarts_done,
    )


def exit_message(task: Task, exit_: TaskExit) -> str:
    """How it ended, in words: "server exited with code 3"."""
    if exit_.reason:
        return f"{task.name}: {exit_.reason}"
    if exit_.oom_killed:
        return f"{task.name} was killed by the kernel: memory limit {task.resources.memory_bytes / MIB:.1f} MiB reached"
    if exit_.signal is not None:
        name = f"SIG{_SIGNALS[exit_.signal]}" if exit_.signal in _SIGNALS else f"signal {exit_.signal}"
        return f"{task.name} was killed by {name}"
    if exit_.code is not None:
        return f"{task.name} exited with code {exit_.code}"
    return f"{task.name} ended while no agent was there to see how"


def duration(seconds: float) -> str:
    """A length of time as people say it: "0.4 s", "12 s", "5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _status(alloc: AllocState) -> AllocStatus:
    if alloc.phase is Phase.ENDED and not alloc.end_durable:
        return AllocStatus.STOPPING  # an agent killed now would begin it again, beside what takes its place
    if alloc.phase is Phase.ENDED:
        return AllocStatus.FAILED if alloc.failure else AllocStatus.COMPLETE
    if alloc.phase is Phase.RUNNING:
        return AllocStatus.RUNNING
    began = (task.started_at_s for task in alloc.tasks.values() if task.role is not TaskRole.INIT)
    if alloc.phase is Phase.TASKS_STARTING and any(began):
        return AllocStatus.RUNNING  # it ran, and a task of it comes back; the task's own status says so
    return AllocStatus.STOPPING if alloc.phase in _STOPPING and alloc.stopping else AllocStatus.STARTING


def _init_message(alloc: AllocState) -> str:
    """What everything else waits for."""
    first = alloc.init_task
    runs = first is not None and first.status is TaskStatus.RUNNING and not alloc.stopping
    return f"init task {first.task.name} runs" if first is not None and runs else ""


def _task_report(task: TaskState) -> TaskReport:
    ended = task.exit
    return TaskReport(
        name=task.task.name,
        status=task.status,
        restarts=task.restarts,
        exit_code=ended.code if ended else None,
        signal=ended.signal if ended else None,
        oom_killed=ended.oom_killed if ended else False,
        started_at_s=task.started_at_s,
        finished_at_s=ended.finished_at_s if ended else None,
        message=task.message,
    )


def _check_report(alloc: AllocState, service: Service, status: AllocStatus) -> CheckReport:
    probe = alloc.probes.get(service.name)
    if status is not AllocStatus.RUNNING or not alloc.tasks_up:
        return CheckReport(service=service.name, output="its workload does not run")
    if not alloc.sidecar_ready:
        return CheckReport(service=service.name, output="its sidecar starts anew")
    if probe is None:
        return CheckReport(service=service.name, passing=True, output="no check: it passes while it runs")
    return CheckReport(service=service.name, passing=probe.passing, output=probe.output)


def _task_record(task: TaskState) -> TaskRecord:
    over = task.status in (TaskStatus.EXITED, TaskStatus.FAILED)
    return TaskRecord(
        restarts=task.restarts,
        tried_at_s=task.tried_at_s,
        started_at_s=task.started_at_s,
        ended=(task.exit or TaskExit()) if over else None,
        message=task.message,
    )
