"""What the agent's core is told. Edges speak to the core through these alone."""

from collections.abc import Mapping

from outrider.ids import AllocId, ServiceName, TaskName
from outrider.model.allocation import Assignment, Generation, MoveReport
from outrider.model.job import Value


class Assigned(Value, frozen=True, kw_only=True):
    """The controller's wish for this node. `full`: these are all; else a change to the generation before."""

    generation: Generation
    full: bool
    assignments: tuple[Assignment, ...] = ()
    removed: tuple[AllocId, ...] = ()


class TaskExit(Value, frozen=True, kw_only=True):
    """How a task ended. Neither code nor signal: nobody was there to see it."""

    code: int | None = None
    signal: int | None = None
    oom_killed: bool = False
    finished_at_s: float = 0.0  # wall clock
    log_tail: str = ""
    again: bool = False  # ended so as to start again at once, which is no failure
    reason: str = ""  # where its code does not say it: "the guest did not boot within 2 min"


class TaskRecord(Value, frozen=True, kw_only=True):
    """What must outlive the agent of one task."""

    restarts: int = 0
    tried_at_s: tuple[float, ...] = ()  # starts within the policy's interval, on the core's clock
    started_at_s: float | None = None  # wall clock
    ended: TaskExit | None = None  # for good: not to be started again
    message: str = ""


class AllocRecord(Value, frozen=True, kw_only=True):
    """What must outlive the agent of one allocation."""

    assignment: Assignment
    tasks: Mapping[TaskName, TaskRecord] = {}
    passing: tuple[ServiceName, ...] = ()
    stopping: bool = False  # told to stop, or failed: tasks are not to be started again
    failure: str = ""  # why it is FAILED; "" where it is not
    log_tail: str = ""
    ended: bool = False  # nothing is left of it on the host
    restarts_done: int = 0  # of those that operators asked for


class FoundTask(Value, frozen=True, kw_only=True):
    """A task's sandbox as the agent's start finds it on the host; `exit` where it is over."""

    exit: TaskExit | None = None
    started_at_s: float | None = None


class Found(Value, frozen=True, kw_only=True):
    """All that is left of one allocation, on disk and on the host, when the agent starts."""

    alloc: AllocId
    record: AllocRecord | None = None  # None: lost, or it belongs to nobody
    local_address: str | None = None  # None: it has no namespace
    sidecar: bool = False  # its Envoy runs
    tasks: Mapping[TaskName, FoundTask] = {}


class Recovered(Value, frozen=True, kw_only=True):
    """The first event: what the agent acknowledged before, and what it found."""

    acknowledged: Generation = Generation()
    found: tuple[Found, ...] = ()
    heard_s: float | None = None  # when a controller was heard last, on the core's clock; None: not since the boot


class ControllerHeard(Value, frozen=True, kw_only=True):
    """A controller that leads has answered what was sent to it at `at_s`, on the core's clock."""

    at_s: float


class Saved(Value, frozen=True, kw_only=True):
    """The allocation's first record is on disk: tasks may run, for a restarted agent will know them.

    `ended`: so is its end: the controller may be told of it, for no restarted agent will start it again.
    """

    alloc: AllocId
    ended: bool = False


class NetworkReady(Value, frozen=True, kw_only=True):
    alloc: AllocId
    local_address: str


class ImagesOnTheirWay(Value, frozen=True, kw_only=True):
    """They are being fetched: "pulling REFERENCE, 12 MiB so far"."""

    alloc: AllocId
    message: str


class ImagesReady(Value, frozen=True, kw_only=True):
    alloc: AllocId
    exposed: Mapping[TaskName, tuple[int, ...]] = {}  # the ports that the image of each task speaks of


class ImagesFailed(Value, frozen=True, kw_only=True):
    """Not `retry`: it would fail again just the same."""

    alloc: AllocId
    message: str
    retry: bool


class SidecarReady(Value, frozen=True, kw_only=True):
    """It serves its first configuration."""

    alloc: AllocId


class SidecarExited(Value, frozen=True, kw_only=True):
    """Envoy ended by itself."""

    alloc: AllocId
    message: str


class StepFailed(Value, frozen=True, kw_only=True):
    """Preparing, the sidecar's start or cleaning failed. Not `retry`: it would fail again just the same."""

    alloc: AllocId
    message: str
    retry: bool = True


class TaskStarted(Value, frozen=True, kw_only=True):
    alloc: AllocId
    task: TaskName
    started_at_s: float  # wall clock


class TaskStartFailed(Value, frozen=True, kw_only=True):
    alloc: AllocId
    task: TaskName
    message: str
    retry: bool = True


class TaskExited(Value, frozen=True, kw_only=True):
    alloc: AllocId
    task: TaskName
    exit: TaskExit


class RestartWanted(Value, frozen=True, kw_only=True):
    """The task is to end and start again, which is no failure of it."""

    alloc: AllocId
    task: TaskName
    reason: str


class BelongingsTold(Value, frozen=True, kw_only=True):
    """What is wrong with what a running task was given; "" where nothing is any more."""

    alloc: AllocId
    task: TaskName
    message: str = ""


class GuestMoved(Value, frozen=True, kw_only=True):
    """How its move to another node stands."""

    alloc: AllocId
    report: MoveReport


class SidecarDrained(Value, frozen=True, kw_only=True):
    alloc: AllocId


class SidecarStopped(Value, frozen=True, kw_only=True):
    alloc: AllocId


class Cleaned(Value, frozen=True, kw_only=True):
    alloc: AllocId


class CheckRan(Value, frozen=True, kw_only=True):
    alloc: AllocId
    service: ServiceName
    passing: bool
    output: str = ""


class Tick(Value, frozen=True, kw_only=True):
    """Time passed: the edge sends one when `next_deadline_s(state)` is reached."""


AllocEvent = (
    Saved
    | NetworkReady
    | ImagesOnTheirWay
    | ImagesReady
    | ImagesFailed
    | SidecarReady
    | SidecarExited
    | StepFailed
    | TaskStarted
    | TaskStartFailed
    | TaskExited
    | RestartWanted
    | BelongingsTold
    | GuestMoved
    | SidecarDrained
    | SidecarStopped
    | Cleaned
    | CheckRan
)
Event = Recovered | Assigned | ControllerHeard | Tick | AllocEvent
