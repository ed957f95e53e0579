"""The agent's state: volatile, rebuilt at its start from records and from what runs on the host.

Owns the shapes, and what follows from a value alone. Changed in place by `allocation`, `recovery` and `step` only.
"""

import random

import msgspec

from agent.core.commands import Command
from agent.core.events import AllocRecord, Found, TaskExit
from agent.core.health import Probe
from agent.core.lifecycle import Phase, check_transition
from outrider.ids import AllocId, ServiceName, TaskName
from outrider.model.allocation import AllocReport, Assignment, Desired, Generation, MoveReport, TaskStatus
from outrider.model.job import PULLED, Task, TaskRole, inner_ports

NEVER_S = float("inf")


class TaskState(msgspec.Struct, kw_only=True):
    task: Task
    status: TaskStatus = TaskStatus.PENDING
    created: bool = False  # CreateTask was asked for, in this try of the allocation
    starting: bool = False  # StartTask is under way
    stop_asked: bool = False  # StopTask is under way
    restart_reason: str = ""  # it was told to end only to start again
    restarts: int = 0
    tried_at_s: tuple[float, ...] = ()
    retry_at_s: float | None = None  # in BACKOFF
    started_at_s: float | None = None
    exit: TaskExit | None = None  # of the last run
    message: str = ""

    @property
    def live(self) -> bool:
        """Something of it runs, or is about to."""
        return self.starting or self.status is TaskStatus.RUNNING

    @property
    def role(self) -> TaskRole:
        return self.task.role


class AllocState(msgspec.Struct, kw_only=True):
    assignment: Assignment
    phase: Phase = Phase.PREPARING
    tasks: dict[TaskName, TaskState]
    probes: dict[ServiceName, Probe]
    durable: bool = False  # its first record is on disk
    end_durable: bool = False  # and one that says that it ended
    local_address: str = ""
    images_ready: bool  # nothing has to be fetched before a task can start
    images_asked: bool = False  # PullImages is under way
    pulling: bool = False
    images_message: str = ""
    images_tried_at_s: tuple[float, ...] = ()
    images_retry_at_s: float | None = None
    sidecar_ready: bool = False
    sidecar_tried_at_s: tuple[float, ...] = ()
    sidecar_retry_at_s: float | None = None
    setup_tried_at_s: tuple[float, ...] = ()
    retry_at_s: float | None = None  # when to prepare again
    clean_retry_at_s: float | None = None
    restarts_done: int = 0  # of those that operators asked for
    move: MoveReport | None = None  # of its guest, to another node
    stopping: bool = False  # on the way out: nothing is started any more
    forget: bool = False  # the controller does not want to hear of it again
    failure: str = ""
    log_tail: str = ""
    message: str = ""
    saved: AllocRecord | None = None
    reported: AllocReport | None = None
    deadline_s: float = NEVER_S

    @property
    def id(self) -> AllocId:
        return self.assignment.alloc

    @property
    def has_sidecar(self) -> bool:
        return bool(self.assignment.group.services)

    @property
    def tasks_up(self) -> bool:
        """Every task runs, or ended as it should; the init tasks have ended."""
        return all(
            task.status is TaskStatus.EXITED or (task.status is TaskStatus.RUNNING and task.role is not TaskRole.INIT)
            for task in self.tasks.values()
        )

    @property
    def init_task(self) -> TaskState | None:
        """The one whose turn it is; None where the others may run."""
        waiting = (task for task in self.tasks.values() if task.role is TaskRole.INIT)
        return next((task for task in waiting if task.status is not TaskStatus.EXITED), None)

    @property
    def work_done(self) -> bool:
        """Of a batch job: its main tasks have ended. Helpers do not keep it."""
        if not self.assignment.batch:
            return False
        return all(task.status is TaskStatus.EXITED for task in self.tasks.values() if task.role is TaskRole.MAIN)

    @property
    def any_live(self) -> bool:
        return any(task.live for task in self.tasks.values())

    def become(self, phase: Phase) -> None:
        check_transition(self.phase, phase)
        self.phase = phase


class Stray(msgspec.Struct, kw_only=True):
    """Found on the host without a record: kept until a full set of assignments tells."""

    found: Found
    cleaning: bool = False
    retry_at_s: float | None = None


class State(msgspec.Struct, kw_only=True):
    acknowledged: Generation = Generation()
    allocs: dict[AllocId, AllocState] = {}
    strays: dict[AllocId, Stray] = {}
    heard_s: float = NEVER_S  # when a controller was heard last; NEVER_S: nobody counts yet; -NEVER_S: not yet


class Turn(msgspec.Struct, kw_only=True):
    """One call of `step`: its time, its dice, and the commands so far."""

    now_s: float
    rng: random.Random
    commands: list[Command] = []

    def emit(self, *commands: Command) -> None:
        self.commands.extend(commands)


def new_alloc(assignment: Assignment) -> AllocState:
    group = assignment.group
    ports = inner_ports(group.network)
    return AllocState(
        assignment=assignment,
        restarts_done=assignment.restarts,
        tasks={task.name: TaskState(task=task) for task in group.tasks},
        probes={
            service.name: Probe(
                service=service.name, check=service.check, port=ports.get(service.port) if service.port else None
            )
            for service in group.services
            if service.check is not None
        },
        images_ready=not needs_images(assignment),
        stopping=assignment.desired is Desired.STOP,
    )


def needs_images(assignment: Assignment) -> bool:
    """Or artifacts, which are fetched likewise."""
    return any(task.image.kind in PULLED or task.artifacts for task in assignment.group.tasks)


def deadline_s(alloc: AllocState) -> float:
    """When the allocation needs a Tick, on the core's clock; `NEVER_S` where only events move it."""
    times = [alloc.clean_retry_at_s, alloc.sidecar_retry_at_s, alloc.images_retry_at_s]
    if alloc.phase is Phase.BACKOFF:
        times.append(alloc.retry_at_s)
    if alloc.images_ready and (not alloc.has_sidecar or alloc.sidecar_ready):
        times += [task.retry_at_s for task in alloc.tasks.values()]
    times += [probe.due_s for probe in alloc.probes.values()]
    return min((time for time in times if time is not None), default=NEVER_S)


def alone_too_long_s(state: State, alloc: AllocState) -> float:
    """When the allocation has to stop unless a controller is heard; NEVER_S for one that may run on, or is stopping."""
    stop_after_s = alloc.assignment.group.disconnect.stop_after_s
    if stop_after_s is None or alloc.stopping:
        return NEVER_S
    return state.heard_s + stop_after_s


def next_deadline_s(state: State) -> float:
    """When `step` wants a Tick at the latest, on its own clock."""
    allocs = min((alloc.deadline_s for alloc in state.allocs.values()), default=NEVER_S)
    alone = min((alone_too_long_s(state, alloc) for alloc in state.allocs.values()), default=NEVER_S)
    strays = min((s.retry_at_s for s in state.strays.values() if s.retry_at_s is not None), default=NEVER_S)
    return min(allocs, strays, alone)
