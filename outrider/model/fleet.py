"""The fleet as its operators see it: summaries, statuses, events."""

from enum import StrEnum

from outrider.ids import DEFAULT_NAMESPACE, JobName, Namespace
from outrider.model.allocation import Allocation, Generation
from outrider.model.job import JobType, JobVersion, Value
from outrider.model.node import Node, NodeStatus


class RolloutState(StrEnum):
    RUNNING = "running"
    SUCCESSFUL = "successful"
    FAILED = "failed"
    STOPPED = "stopped"


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
    namespace: Namespace = DEFAULT_NAMESPACE


class JobStatus(Value, frozen=True, kw_only=True):
    job: JobVersion
    allocations: tuple[Allocation, ...] = ()
    warnings: tuple[str, ...] = ()  # an upstream that nobody provides ...
    rollout: RolloutState = RolloutState.RUNNING  # of the newest version
    rollout_reason: str = ""


class NodeState(Value, frozen=True, kw_only=True):
    node: Node
    status: NodeStatus
    reason: str = ""  # why it is not ready
    status_since_s: float = 0.0
    cpu_millis_used: int = 0
    memory_bytes_used: int = 0
    allocations: int = 0
    acknowledged: Generation = Generation()


class FleetEvent(Value, frozen=True, kw_only=True):
    """Something changed. `kind` is noun.verb, from a fixed list in docs/EVENTS.md."""

    sequence: int = 0
    at_s: float = 0.0
    kind: str
    node: str = ""
    job: str = ""
    alloc: str = ""
    message: str = ""
