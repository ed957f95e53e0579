"""What the controller's core asks of its edges. An edge executes and, where it says so, reports back as an event."""

from controller.core.events import RequestId, SessionId, Ticket
from controller.core.records import Record
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.allocation import Assignment, Generation
from outrider.model.fleet import FleetEvent
from outrider.model.job import Schedule, Value


class Append(Value, frozen=True, kw_only=True):
    """Write to the journal and report `Appended`. Tickets are appended in order."""

    ticket: Ticket
    records: tuple[Record, ...]


class SendAssignments(Value, frozen=True, kw_only=True):
    session: SessionId
    node: NodeId
    generation: Generation
    full: bool
    assignments: tuple[Assignment, ...]
    removed: tuple[AllocId, ...] = ()


class CloseSession(Value, frozen=True, kw_only=True):
    session: SessionId
    node: NodeId
    reason: str


class ProbeNode(Value, frozen=True, kw_only=True):
    """Ask the agent for a heartbeat now; its answer, or its silence, is an event as always."""

    session: SessionId
    node: NodeId


class Reply(Value, frozen=True, kw_only=True):
    """The answer to an operator's call. `code` is "" where it was done, else RefusedError's code."""

    request: RequestId
    job: JobName | None = None  # that was launched
    version: int = 0
    changed: bool = False
    warnings: tuple[str, ...] = ()
    code: str = ""
    message: str = ""


class PlanLaunch(Value, frozen=True, kw_only=True):
    """Say when the schedule fires: `LaunchPlanned`, with the newest time after `after_s` that has passed by `now_s`,
    and the next one. Calendars and time zones are the edge's.
    """

    job: JobName
    version: int
    schedule: Schedule
    after_s: float
    now_s: float


class SyncMesh(Value, frozen=True, kw_only=True):
    """What these nodes should have in the catalog changed: read `mesh_intent.registration(state, node)` again.

    `intentions`: the jobs' `allow:` lines or the set of service names changed too.
    """

    nodes: tuple[NodeId, ...]
    intentions: bool = False


class WithdrawEndpoints(Value, frozen=True, kw_only=True):
    """These are about to stop: report `EndpointsWithdrawn` when no sidecar calls them any more (DESIGN, decision 7).

    `SyncMesh` of their node is in the same batch, and their registrations are gone from it.
    """

    allocs: tuple[AllocId, ...]
    services: tuple[ServiceName, ...]


class Publish(Value, frozen=True, kw_only=True):
    """A change that people may want to know of. Sequence and wall-clock time are the edge's to add."""

    event: FleetEvent


Command = (
    Append | SendAssignments | CloseSession | ProbeNode | Reply | PlanLaunch | SyncMesh | WithdrawEndpoints | Publish
)
