"""The fleet as its operators see it: summaries, statuses, events."""

from collections.abc import Mapping
from enum import StrEnum

from outrider.ids import DEFAULT_NAMESPACE, GroupName, JobName, Namespace, NodeId
from outrider.model.allocation import Allocation, Generation
from outrider.model.job import Job, JobType, JobVersion, ScalingPolicy, Value
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


class ScalingStatus(Value, frozen=True, kw_only=True):
    """How a group that the fleet scales stands."""

    group: GroupName
    count: int
    policy: ScalingPolicy
    measured: float | None = None  # the mean of its copies, in the unit of the metric; None: not known
    note: str = ""  # why nothing changes


class JobStatus(Value, frozen=True, kw_only=True):
    job: JobVersion
    allocations: tuple[Allocation, ...] = ()
    warnings: tuple[str, ...] = ()  # an upstream that nobody provides ...
    rollout: RolloutState = RolloutState.RUNNING  # of the newest version
    rollout_reason: str = ""
    state: JobState = JobState.PENDING
    next_launch_s: float | None = None  # of one with a schedule
    scaling: tuple[ScalingStatus, ...] = ()
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


class FilteredNodes(Value, frozen=True, kw_only=True):
    reason: str
    nodes: int


class NodeScore(Value, frozen=True, kw_only=True):
    node: NodeId
    score: float
    parts: Mapping[str, float] = {}  # what it is the sum of


class Explanation(Value, frozen=True, kw_only=True):
    """Why an allocation is where it is, or is nowhere, as the scheduler would judge now."""

    allocation: Allocation
    nodes: int
    filtered: tuple[FilteredNodes, ...] = ()  # each node counted once, by the first that it fails
    best: tuple[NodeScore, ...] = ()
    remedies: tuple[str, ...] = ()  # single changes that would make it fit


class PlannedAction(StrEnum):
    PLACE = "place"
    REPLACE = "replace"  # a new copy instead of an old one, on the same node or another
    STOP = "stop"
    PREEMPT = "preempt"  # makes room for one of higher priority
    WAIT = "wait"  # wanted, and fits nowhere


class PlannedStep(Value, frozen=True, kw_only=True):
    action: PlannedAction
    job: JobName
    group: GroupName
    index: int
    node_before: NodeId | None = None
    node_after: NodeId | None = None
    reason: str = ""


class JobPlan(Value, frozen=True, kw_only=True):
    """What a submission would lead to."""

    job: JobName
    version: int  # that it would become
    changed: bool = False
    current: Job | None = None  # what the fleet has now; None: nothing that runs
    refusal: str = ""  # why it would not be taken
    steps: tuple[PlannedStep, ...] = ()  # the first of them
    counts: Mapping[str, int] = {}  # of all, by action
    kept: int = 0  # copies that stay as they are
    warnings: tuple[str, ...] = ()
    rollout: RolloutState = RolloutState.RUNNING  # as it would end; running: it waits for a person
    rollout_reason: str = ""


class FleetEvent(Value, frozen=True, kw_only=True):
    """Something changed. `kind` is noun.verb, from a fixed list in docs/EVENTS.md."""

    sequence: int = 0
    at_s: float = 0.0
    kind: str
    node: str = ""
    job: str = ""
    alloc: str = ""
    message: str = ""


def answer_interval_s(heartbeat_interval_s: float) -> float:
    """How often a controller answers an agent's heartbeats: writing costs more than reading."""
    return max(1.0, 2 * heartbeat_interval_s)
