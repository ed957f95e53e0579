"""What moves one allocation through its phases: entered first, what each event does; then the phases, in order.

Two rules hold throughout: no task starts before its sidecar serves, and the sidecar ends after the last task.
"""

from typing import assert_never

from agent.core import exposed, health, images
from agent.core.commands import (
    Clean,
    CreateNetwork,
    CreateTask,
    DrainSidecar,
    MoveGuest,
    RunCheck,
    StartSidecar,
    StartTask,
    StopSidecar,
    StopTask,
)
from agent.core.events import (
    AllocEvent,
    BelongingsTold,
    CheckRan,
    Cleaned,
    GuestMoved,
    ImagesFailed,
    ImagesOnTheirWay,
    ImagesReady,
    NetworkReady,
    RestartWanted,
    Saved,
    SidecarDrained,
    SidecarExited,
    SidecarReady,
    SidecarStopped,
    StepFailed,
    TaskExit,
    TaskExited,
    TaskStarted,
    TaskStartFailed,
)
from agent.core.lifecycle import Phase
from agent.core.report import duration, exit_message
from agent.core.restart import PERSISTENT, next_try
from agent.core.state import AllocState, TaskState, Turn
from outrider.model.allocation import MoveStage, TaskStatus
from outrider.model.job import RestartPolicy, TaskRole, is_guest, main_task

_UP = frozenset({Phase.TASKS_STARTING, Phase.RUNNING})


def handle(alloc: AllocState, event: AllocEvent, turn: Turn) -> None:
    """What `event` means for the allocation. One that came too late for its phase means nothing."""
    match event:
        case Saved():
            alloc.durable, alloc.end_durable = True, alloc.end_durable or event.ended
            _start_tasks(alloc, turn)
        case NetworkReady():
            _network_ready(alloc, event, turn)
        case ImagesOnTheirWay() | ImagesReady() | ImagesFailed():
            _images_event(alloc, event, turn)
        case StepFailed():
            _step_failed(alloc, event, turn)
        case Cleaned():
            _cleaned(alloc, turn)
        case SidecarReady() | SidecarExited() | SidecarDrained() | SidecarStopped():
            _sidecar_event(alloc, event, turn)
        case TaskStarted() | TaskStartFailed() | TaskExited() | RestartWanted() | BelongingsTold():
            _task_event(alloc, event, turn)
        case GuestMoved():
            alloc.move = event.report
        case CheckRan():
            probe = alloc.probes.get(event.service)
            running = alloc.phase in _UP and alloc.tasks_up
            if probe is not None:  # else the service has no check any more
                health.outcome(probe, turn.now_s, passing=event.passing, output=event.output, running=running)
        case _:
            assert_never(event)


def _images_event(alloc: AllocState, event: ImagesOnTheirWay | ImagesReady | ImagesFailed, turn: Turn) -> None:
    waited = exposed.is_open(alloc.assignment)
    if images.handle(alloc, event, turn):
        stop(alloc, turn)
    elif waited and not exposed.is_open(alloc.assignment):
        turn.emit(CreateNetwork(assignment=alloc.assignment))
    _start_tasks(alloc, turn)


def _sidecar_event(
    alloc: AllocState, event: SidecarReady | SidecarExited | SidecarDrained | SidecarStopped, turn: Turn
) -> None:
    match event:
        case SidecarReady():
            _sidecar_ready(alloc, turn)
        case SidecarExited():
            _sidecar_exited(alloc, event.message, turn)
        case SidecarDrained():
            if alloc.phase is Phase.DRAINING:
                _stop_tasks(alloc, turn)
        case SidecarStopped():
            if alloc.phase is Phase.SIDECAR_STOPPING:
                clean(alloc, turn)
        case _:
            assert_never(event)


def _task_event(
    alloc: AllocState, event: TaskStarted | TaskStartFailed | TaskExited | RestartWanted | BelongingsTold, turn: Turn
) -> None:
    match event:
        case TaskStarted():
            _task_started(alloc, event, turn)
        case TaskStartFailed():
            _task_start_failed(alloc, event, turn)
        case TaskExited():
            _task_exited(alloc, alloc.tasks[event.task], event.exit, turn)
        case RestartWanted():
            restart_task(alloc, alloc.tasks[event.task], event.reason, turn)
        case BelongingsTold():
            if alloc.tasks[event.task].status is TaskStatus.RUNNING:
                alloc.tasks[event.task].message = event.message
        case _:
            assert_never(event)


def tick(alloc: AllocState, turn: Turn) -> None:
    """Time passed: whatever is due."""
    now_s = turn.now_s
    if alloc.phase is Phase.BACKOFF and alloc.retry_at_s is not None and alloc.retry_at_s <= now_s:
        prepare(alloc, turn)
    if alloc.clean_retry_at_s is not None and alloc.clean_retry_at_s <= now_s:
        alloc.clean_retry_at_s = None
        turn.emit(Clean(alloc=alloc.id))
    if alloc.sidecar_retry_at_s is not None and alloc.sidecar_retry_at_s <= now_s:
        alloc.sidecar_retry_at_s = None
        _start_sidecar(alloc, turn)
    images.tick(alloc, turn)
    _start_tasks(alloc, turn)
    for probe in alloc.probes.values():
        if probe.due_s is not None and probe.due_s <= now_s:
            health.launched(probe)
            turn.emit(
                RunCheck(
                    alloc=alloc.id,
                    service=probe.service,
                    check=probe.check,
                    port=probe.port,
                    task=main_task(alloc.assignment.group).name,
                )
            )


def prepare(alloc: AllocState, turn: Turn) -> None:
    """From nothing: new, or after a failed try was cleaned."""
    if alloc.phase is not Phase.PREPARING:
        alloc.become(Phase.PREPARING)
    alloc.retry_at_s = None
    for task in alloc.tasks.values():
        task.created = False
    if not exposed.is_open(alloc.assignment):  # else network and sidecar wait for what the image says
        turn.emit(CreateNetwork(assignment=alloc.assignment))
    images.want(alloc, turn)


def stop(alloc: AllocState, turn: Turn) -> None:
    """On the way out, by request or by failure. From then on nothing of it is started."""
    alloc.stopping = True
    alloc.sidecar_retry_at_s = None
    images.abandon(alloc)
    for task in alloc.tasks.values():
        task.retry_at_s = None
    if alloc.phase in _UP:
        for probe in alloc.probes.values():
            health.pause(probe, "stopping")
        if alloc.sidecar_ready and (alloc.any_live or not alloc.tasks):  # a gateway is its sidecar alone
            alloc.become(Phase.DRAINING)
            turn.emit(DrainSidecar(alloc=alloc.id))
        else:
            _stop_tasks(alloc, turn)
    elif alloc.phase is Phase.SIDECAR_STARTING:
        _stop_sidecar(alloc, turn)
    elif alloc.phase is Phase.BACKOFF:
        alloc.become(Phase.ENDED)
    elif alloc.phase is Phase.PREPARING and exposed.is_open(alloc.assignment):
        clean(alloc, turn)
    # Elsewhere a step is under way whose end looks at `stopping`.


def move(alloc: AllocState, turn: Turn) -> None:
    """Its assignment speaks of a move: to begin, to let go, or that it is off."""
    wanted = alloc.assignment.move_to
    if alloc.move is not None and (wanted is None or wanted.alloc != alloc.move.to):
        alloc.move = None
    if alloc.phase is Phase.RUNNING or wanted is None:
        turn.emit(MoveGuest(assignment=alloc.assignment))


def run(alloc: AllocState, turn: Turn) -> None:
    """Sidecar there, or none wanted: start what must run, see whether all does."""
    alloc.message = ""  # of tries that are over
    _start_tasks(alloc, turn)
    _settle_running(alloc, turn)


def start_sidecar_phase(alloc: AllocState, turn: Turn) -> None:
    """The namespace is there."""
    if alloc.has_sidecar:
        alloc.become(Phase.SIDECAR_STARTING)
        _start_sidecar(alloc, turn)
        _start_tasks(alloc, turn)
    else:
        alloc.become(Phase.TASKS_STARTING)
        run(alloc, turn)


def clean(alloc: AllocState, turn: Turn) -> None:
    alloc.become(Phase.CLEANING)
    images.let_go(alloc)
    turn.emit(Clean(alloc=alloc.id))


def sidecar_lost(alloc: AllocState, turn: Turn) -> None:
    """Envoy died, the workload runs on: at once another, unless it dies again and again."""
    alloc.sidecar_ready = False
    retry = next_try(PERSISTENT, alloc.sidecar_tried_at_s, turn.now_s, turn.rng)
    first = not alloc.sidecar_tried_at_s
    if retry is not None:
        alloc.sidecar_tried_at_s = retry.tried_at_s
        alloc.sidecar_retry_at_s = None if first else retry.at_s
    if first:
        _start_sidecar(alloc, turn)


def task_ended(alloc: AllocState, task: TaskState, exit_: TaskExit, turn: Turn) -> None:
    """A run of the task is over: whether another follows is the policy's to say. Does not change the phase."""
    task.exit, task.starting, task.stop_asked = exit_, False, False
    task.message = exit_message(task.task, exit_)
    reason, task.restart_reason = task.restart_reason, ""
    if reason and not alloc.stopping:
        task.status, task.restarts, task.message = TaskStatus.PENDING, task.restarts + 1, f"started again: {reason}"
    elif not alloc.stopping and exit_.code == 0 and task.role is TaskRole.INIT:
        task.status, task.message = TaskStatus.EXITED, ""  # as it should, long before the others: no news
    elif alloc.stopping or _has_moved(alloc) or (exit_.code == 0 and alloc.assignment.batch):
        task.status = TaskStatus.EXITED
    elif exit_.again:
        task.status, task.retry_at_s = TaskStatus.BACKOFF, turn.now_s
    else:
        _retry_task(alloc, task, task.message, exit_.log_tail, turn)


def _has_moved(alloc: AllocState) -> bool:
    """Its guest runs on another node: what ends here is what was left behind."""
    return alloc.move is not None and alloc.move.stage is MoveStage.DONE


def _network_ready(alloc: AllocState, event: NetworkReady, turn: Turn) -> None:
    if alloc.phase is not Phase.PREPARING:
        return
    alloc.local_address = event.local_address
    if alloc.stopping:
        clean(alloc, turn)
    else:
        start_sidecar_phase(alloc, turn)


def _start_sidecar(alloc: AllocState, turn: Turn) -> None:
    turn.emit(StartSidecar(assignment=alloc.assignment, local_address=alloc.local_address))


def _sidecar_ready(alloc: AllocState, turn: Turn) -> None:
    if alloc.phase is Phase.SIDECAR_STARTING:
        alloc.sidecar_ready = True
        alloc.become(Phase.TASKS_STARTING)
        run(alloc, turn)
    elif alloc.phase in _UP:
        alloc.sidecar_ready = True
        alloc.message = ""
        _start_tasks(alloc, turn)


def _sidecar_exited(alloc: AllocState, message: str, turn: Turn) -> None:
    if alloc.phase is Phase.SIDECAR_STARTING:
        _setup_failed(alloc, message, turn, retry=True)
    elif alloc.phase in _UP:
        alloc.message = message
        sidecar_lost(alloc, turn)
    elif alloc.phase is Phase.DRAINING:
        alloc.sidecar_ready = False
        _stop_tasks(alloc, turn)  # nothing is left to drain


def _step_failed(alloc: AllocState, event: StepFailed, turn: Turn) -> None:
    if alloc.phase in (Phase.PREPARING, Phase.SIDECAR_STARTING):
        _setup_failed(alloc, event.message, turn, retry=event.retry)
    elif alloc.phase in _UP:
        alloc.message = event.message
        sidecar_lost(alloc, turn)
    elif alloc.phase is Phase.CLEANING:
        # Tried until it works: what is left on the host would be in the next one's way.
        alloc.message = event.message
        retry = next_try(PERSISTENT, alloc.setup_tried_at_s, turn.now_s, turn.rng)
        if retry is not None:
            alloc.setup_tried_at_s, alloc.clean_retry_at_s = retry.tried_at_s, retry.at_s


def _setup_failed(alloc: AllocState, message: str, turn: Turn, *, retry: bool) -> None:
    policy = alloc.assignment.group.restart
    again = next_try(policy, alloc.setup_tried_at_s, turn.now_s, turn.rng) if retry and not alloc.stopping else None
    if again is not None:
        alloc.setup_tried_at_s, alloc.retry_at_s = again.tried_at_s, again.at_s
        alloc.message = f"{message}; trying again in {duration(again.at_s - turn.now_s)}"
    elif not alloc.stopping:
        alloc.stopping, alloc.failure = True, _given_up(message, policy) if retry else message
    if alloc.phase is Phase.SIDECAR_STARTING:
        _stop_sidecar(alloc, turn)
    else:
        clean(alloc, turn)


def _given_up(message: str, policy: RestartPolicy) -> str:
    if policy.attempts == 0:
        return f"{message}; its restart policy allows no other try"
    times = "once" if policy.attempts == 1 else f"{policy.attempts} times"
    return f"{message}; tried again {times} within {duration(policy.interval_s)}: its restart policy allows no more"


def _start_tasks(alloc: AllocState, turn: Turn) -> None:
    """Every task that is due, once record, images and sidecar are there: the init tasks first, one after the other.

    While the sidecar starts, what they will run in is made.
    """
    serves = alloc.phase in _UP and (alloc.sidecar_ready or not alloc.has_sidecar)
    if not alloc.durable or not (serves or alloc.phase is Phase.SIDECAR_STARTING):
        return
    first = alloc.init_task
    for task in alloc.tasks.values() if first is None else (first,):
        waits = task.retry_at_s is not None and task.retry_at_s > turn.now_s
        if task.status not in (TaskStatus.PENDING, TaskStatus.BACKOFF) or task.starting or waits:
            continue
        images.want(alloc, turn)
        if alloc.images_ready and serves:
            task.starting, task.retry_at_s = True, None
            turn.emit(StartTask(assignment=alloc.assignment, task=task.task, local_address=alloc.local_address))
        elif alloc.images_ready and not task.created and not is_guest(task.task):
            task.created = True
            turn.emit(CreateTask(assignment=alloc.assignment, task=task.task))


def _task_started(alloc: AllocState, event: TaskStarted, turn: Turn) -> None:
    task = alloc.tasks[event.task]
    task.starting, task.status, task.message = False, TaskStatus.RUNNING, ""
    task.started_at_s = event.started_at_s
    if alloc.phase is Phase.STOPPING:
        ask_to_stop(alloc, turn)
    elif alloc.phase in _UP:
        _settle_running(alloc, turn)


def _task_start_failed(alloc: AllocState, event: TaskStartFailed, turn: Turn) -> None:
    task = alloc.tasks[event.task]
    task.starting, task.message = False, event.message
    if alloc.stopping:
        task.status = TaskStatus.EXITED
    elif event.retry:
        _retry_task(alloc, task, event.message, "", turn)
    else:
        _fail_task(alloc, task, event.message, "")
    _after_task_ended(alloc, turn)


def _task_exited(alloc: AllocState, task: TaskState, exit_: TaskExit, turn: Turn) -> None:
    task_ended(alloc, task, exit_, turn)
    _after_task_ended(alloc, turn)


def restart_task(alloc: AllocState, task: TaskState, reason: str, turn: Turn) -> None:
    """It ends only to start again, which its restart policy does not count."""
    if alloc.phase in _UP and task.status is TaskStatus.RUNNING and not task.restart_reason:
        task.restart_reason = reason
        turn.emit(StopTask(alloc=alloc.id, task=task.task))


def _retry_task(alloc: AllocState, task: TaskState, message: str, log_tail: str, turn: Turn) -> None:
    policy = alloc.assignment.group.restart
    again = next_try(policy, task.tried_at_s, turn.now_s, turn.rng)
    if again is None:
        _fail_task(alloc, task, _given_up(message, policy), log_tail)
        return
    task.status, task.restarts = TaskStatus.BACKOFF, task.restarts + 1
    task.tried_at_s, task.retry_at_s = again.tried_at_s, again.at_s
    task.message = f"{message}; starting again in {duration(again.at_s - turn.now_s)}"


def _fail_task(alloc: AllocState, task: TaskState, message: str, log_tail: str) -> None:
    task.status, task.message = TaskStatus.FAILED, message
    alloc.failure = alloc.failure or message
    alloc.log_tail = alloc.log_tail or log_tail


def note_restarted(alloc: AllocState) -> None:
    """All that was to end for operators' restarts has ended: what starts now is what they wanted."""
    if not any(task.restart_reason for task in alloc.tasks.values()):
        alloc.restarts_done = alloc.assignment.restarts


def _after_task_ended(alloc: AllocState, turn: Turn) -> None:
    note_restarted(alloc)
    if alloc.phase in _UP:
        _settle_running(alloc, turn)
        _start_tasks(alloc, turn)
    elif alloc.phase is Phase.STOPPING:
        ask_to_stop(alloc, turn)


def _settle_running(alloc: AllocState, turn: Turn) -> None:
    """The phase and the checks that fit what the tasks do now."""
    if alloc.failure:
        stop(alloc, turn)
    elif alloc.work_done:
        alloc.stopping = True
        if alloc.any_live:
            _stop_tasks(alloc, turn)  # the helpers
        else:
            tasks_ended(alloc, turn)
    elif not alloc.tasks_up:
        if alloc.phase is Phase.RUNNING:
            alloc.become(Phase.TASKS_STARTING)
        for probe in alloc.probes.values():
            health.pause(probe, "its workload does not run")
    elif alloc.phase is Phase.TASKS_STARTING:
        alloc.become(Phase.RUNNING)
        for probe in alloc.probes.values():
            health.begin(probe, turn.now_s)


def _stop_tasks(alloc: AllocState, turn: Turn) -> None:
    alloc.become(Phase.STOPPING)
    ask_to_stop(alloc, turn)


def ask_to_stop(alloc: AllocState, turn: Turn) -> None:
    """Of those that live the helpers are asked last, once all others have ended."""
    live = [task for task in alloc.tasks.values() if task.live]
    if not live:
        tasks_ended(alloc, turn)
    for task in [task for task in live if task.role is not TaskRole.HELPER] or live:
        if task.status is TaskStatus.RUNNING and not task.stop_asked:
            task.stop_asked = True
            turn.emit(StopTask(alloc=alloc.id, task=task.task))


def tasks_ended(alloc: AllocState, turn: Turn) -> None:
    for probe in alloc.probes.values():
        health.pause(probe, "ended")
    if alloc.has_sidecar:
        _stop_sidecar(alloc, turn)
    else:
        clean(alloc, turn)


def _stop_sidecar(alloc: AllocState, turn: Turn) -> None:
    alloc.sidecar_ready, alloc.sidecar_retry_at_s = False, None
    alloc.become(Phase.SIDECAR_STOPPING)
    turn.emit(StopSidecar(alloc=alloc.id))


def _cleaned(alloc: AllocState, turn: Turn) -> None:
    if alloc.phase is not Phase.CLEANING:
        return
    alloc.local_address = ""
    alloc.sidecar_tried_at_s = ()
    if alloc.stopping:
        alloc.become(Phase.ENDED)
        return
    alloc.become(Phase.BACKOFF)
    if alloc.retry_at_s is None or alloc.retry_at_s <= turn.now_s:
        prepare(alloc, turn)
