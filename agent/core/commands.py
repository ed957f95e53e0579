"""What the agent's core asks of its edges. Each is executed at once, beside the others; what follows is named."""

from agent.core.events import AllocRecord
from outrider.ids import AllocId, ServiceName, TaskName
from outrider.model.allocation import AllocReport, Assignment, Generation
from outrider.model.job import Check, Task, Value


class Save(Value, frozen=True, kw_only=True):
    """Write to disk, in the order given. `announce`: tell `Saved` once it is there."""

    record: AllocRecord
    announce: bool = False


class Acknowledge(Value, frozen=True, kw_only=True):
    """Write to disk after every `Save` before it, then tell the controller."""

    generation: Generation


class Forget(Value, frozen=True, kw_only=True):
    """Record and logs go: the controller knows how it ended."""

    alloc: AllocId


class CreateNetwork(Value, frozen=True, kw_only=True):
    """Make the namespace: `NetworkReady` or `StepFailed`. Ask for its services' leaves meanwhile."""

    assignment: Assignment


class PullImages(Value, frozen=True, kw_only=True):
    """Have its tasks' images on the node: `ImagesReady` or `ImagesFailed`, and `ImagesOnTheirWay` before.

    They stay until `Clean`: from then on they may go, and an answer that is still due does not come.
    """

    assignment: Assignment


class StartSidecar(Value, frozen=True, kw_only=True):
    """Start Envoy: `SidecarReady` or `StepFailed`; `SidecarExited` if it ends later. An older one's rest goes first."""

    assignment: Assignment
    local_address: str


class AdoptSidecar(Value, frozen=True, kw_only=True):
    """Envoy runs already: serve and watch it again. `SidecarReady`, without a deadline; `SidecarExited`."""

    assignment: Assignment
    local_address: str


class CreateTask(Value, frozen=True, kw_only=True):
    """Make its sandbox while the sidecar starts, so that `StartTask` finds it. Nothing of it runs, nothing is told."""

    assignment: Assignment
    task: Task


class StartTask(Value, frozen=True, kw_only=True):
    """`TaskStarted` then, later, `TaskExited`; or `TaskStartFailed`. What an earlier run left is removed first."""

    assignment: Assignment
    task: Task
    local_address: str


class AdoptTask(Value, frozen=True, kw_only=True):
    """It runs already: watch it: `TaskExited`."""

    assignment: Assignment
    task: TaskName


class RenewBelongings(Value, frozen=True, kw_only=True):
    """What its tasks were given changed: renew it, and tell them as each wants to be. `RestartWanted` may follow."""

    assignment: Assignment


class RunCheck(Value, frozen=True, kw_only=True):
    """`CheckRan`, within the check's timeout."""

    alloc: AllocId
    service: ServiceName
    check: Check
    port: int | None
    task: TaskName  # in which a command runs


class DrainSidecar(Value, frozen=True, kw_only=True):
    """Fail inbound health, let requests finish: `SidecarDrained`, within the edge's deadline."""

    alloc: AllocId


class MoveGuest(Value, frozen=True, kw_only=True):
    """What the assignment says of a move to another node: begin, let go or give up. `GuestMoved`, again and again."""

    assignment: Assignment


class StopTask(Value, frozen=True, kw_only=True):
    """The task's signal; after its timeout SIGKILL. `TaskExited` comes from whoever watches it."""

    alloc: AllocId
    task: Task


class StopSidecar(Value, frozen=True, kw_only=True):
    """`SidecarStopped`; no `SidecarExited` follows."""

    alloc: AllocId


class Clean(Value, frozen=True, kw_only=True):
    """Sandboxes, namespace, claims: whatever there is. `Cleaned` or `StepFailed`. Logs stay."""

    alloc: AllocId


class Report(Value, frozen=True, kw_only=True):
    """The newest truth of one allocation, for the controller and for events."""

    report: AllocReport
    job: str


class Note(Value, frozen=True, kw_only=True):
    """Worth a line in the log."""

    event: str
    alloc: AllocId | None = None
    message: str = ""


Command = (
    Save
    | Acknowledge
    | Forget
    | CreateNetwork
    | PullImages
    | StartSidecar
    | AdoptSidecar
    | CreateTask
    | StartTask
    | AdoptTask
    | RenewBelongings
    | RunCheck
    | DrainSidecar
    | MoveGuest
    | StopTask
    | StopSidecar
    | Clean
    | Report
    | Note
)
