"""The fleet as its operators see it: summaries, statuses, events."""

from enum import StrEnum

from outrider.ids import DEFAULT_NAMESPACE, JobName, Namespace
from outrider.model.allocation import Allocation, Generation
from outrider.model.job import JobType, JobVersion, Value
from outrider.model.node import Drain, Node, NodeStatus


class RolloutState(StrEnum):
    RUNNING = "running"
    SUCCESSFUL = "successful"
    FAILED = "failed"
    STOPPED = "stopped"
    PAUSED = "paused"  # by an operator, until it is resumed
    PROVEN = "proven"  # its canaries are well, and wait to be promoted


class RolloutAction(StrEnum):
    """What an operator does with a rollout."""

    PROMOTE = "promote"
    FAIL = "fail"
    PAUSE = "pause"
    RESUME = "resume"


class JobState(StrEnum):
    """How a job is, in one word."""

    PENDING = "pending"  # nothing of it runs yet
    RUNNING = "running"
    COMPLETE = "complete"  # a batch job whose work ended well
    FAILED = "failed"  # its rollout failed, or a batch job's work did
    STOPPED = "stopped"
    WAITING = "waiting"  # for its schedule, or for somebody to dispatch it


class JobSummary(Value, frozen=True, kw_only=True):
    name: JobName
    type: JobType
    version: int
    stopped: bool = False
    wanted: int = 0
    running: int = 0
    healthy: int = 0
    pending: int = 0
    failed: int = 0
    submitted_at_s: float = 0.0
    state: JobState = JobState.PENDING
    parent: JobName | None = None  # the job that it was launched from
    next_launch_s: float | None = None
    namespace: Namespace = DEFAULT_NAMESPACE


class JobStatus(Value, frozen=True, kw_only=True):
    job: JobVersion
    allocations: tuple[Allocation, ...] = ()
    warnings: tuple[str, ...] = ()  # an upstream that nobody provides ...
    rollout: RolloutState = RolloutState.RUNNING  # of the newest version
    rollout_reason: str = ""
    state: JobState = JobState.PENDING
    next_launch_s: float | None = None  # of one with a schedule
    children: tuple[JobSummary, ...] = ()  # the jobs launched from it, the newest last


class VersionStatus(Value, frozen=True, kw_only=True):
    """A version of a job that is kept, and what became of it."""

    version: JobVersion
    rollout: RolloutState = RolloutState.RUNNING  # of an older one: it was superseded before its rollout ended
    reason: str = ""


class NodeState(Value, frozen=True, kw_only=True):
    node: Node
    status: NodeStatus
    reason: str = ""  # why it is not ready
    status_since_s: float = 0.0
    cpu_millis_used: int = 0
    memory_bytes_used: int = 0
    allocations: int = 0
    acknowledged: Generation = Generation()
    eligible: bool = True  # for new work
    drain: Drain | None = None


class FleetEvent(Value, frozen=True, kw_only=True):
    """Something changed. `kind` is noun.verb, from a fixed list in docs/EVENTS.md."""

    sequence: int = 0
    at_s: float = 0.0
    kind: str
    node: str = ""
    job: str = ""
    alloc: str = ""
    message: str = ""
