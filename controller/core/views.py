"""State -> what operators read. Signatures first; the bodies follow in the next commits."""
# mypy: disable-error-code="empty-body"

from controller.core.state import State
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.allocation import Allocation, Generation
from outrider.model.fleet import JobStatus, JobSummary, NodeState
from outrider.model.job import Value


class FleetSummary(Value, frozen=True, kw_only=True):
    generation: Generation
    nodes_ready: int
    nodes: int
    jobs: int
    allocations: int  # that have not ended
    braked: str = ""  # why nothing is ejected or replaced; "" where all is normal


class Ambiguous(Value, frozen=True, kw_only=True):
    """A prefix that more than one allocation's id begins with."""

    matches: tuple[AllocId, ...]  # the first few


def fleet_summary(state: State) -> FleetSummary: ...
def job_summaries(state: State) -> tuple[JobSummary, ...]: ...
def job_status(state: State, job: JobName) -> JobStatus | None: ...
def node_states(state: State) -> tuple[NodeState, ...]: ...
def node_state(state: State, node: NodeId) -> NodeState | None: ...
def allocations(
    state: State, *, job: JobName | None = None, node: NodeId | None = None, terminal: bool = False
) -> tuple[Allocation, ...]: ...
def allocation(state: State, alloc: AllocId) -> Allocation | None: ...
def allocation_by_prefix(state: State, prefix: str) -> Allocation | Ambiguous | None: ...
def allocations_of_service(state: State, service: ServiceName) -> tuple[Allocation, ...]: ...
