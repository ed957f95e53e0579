"""What the controller's core is told. Every edge speaks to the core through these alone."""

from collections.abc import Mapping
from typing import NewType

from controller.core.access_records import AccessRecord
from outrider.ids import AllocId, GroupName, JobName, Namespace, NodeId, SecretName, VolumeName
from outrider.model.allocation import AllocAction, AllocFigures, AllocReport, Generation
from outrider.model.belongings import Volume
from outrider.model.fleet import RolloutAction
from outrider.model.job import Job, Value
from outrider.model.node import Fingerprint, Node

SessionId = NewType("SessionId", int)  # one per agent stream, never used again within a controller's life
RequestId = NewType("RequestId", int)  # one per operator call that waits for a Reply
Ticket = NewType("Ticket", int)  # one per Append


class AgentConnected(Value, frozen=True, kw_only=True):
    """A stream began. A newer session of the same node replaces the older."""

    session: SessionId
    node: Node
    acknowledged: Generation
    reports: tuple[AllocReport, ...] = ()


class AgentDisconnected(Value, frozen=True, kw_only=True):
    """The stream ended by FIN or RST: the agent is gone, which is no verdict on the node."""

    session: SessionId
    node: NodeId
    reason: str = ""


class HeartbeatReceived(Value, frozen=True, kw_only=True):
    session: SessionId
    node: NodeId


class AgentReported(Value, frozen=True, kw_only=True):
    session: SessionId
    node: NodeId
    reports: tuple[AllocReport, ...]


class AgentApplied(Value, frozen=True, kw_only=True):
    """The agent has taken up all assignments up to `generation`, durably."""

    session: SessionId
    node: NodeId
    generation: Generation


class FingerprintChanged(Value, frozen=True, kw_only=True):
    session: SessionId
    node: NodeId
    fingerprint: Fingerprint


class LastWillSeen(Value, frozen=True, kw_only=True):
    """The broker says that the node's client vanished: look at once, decide nothing."""

    node: NodeId


class EndpointsWithdrawn(Value, frozen=True, kw_only=True):
    """Every sidecar that called these has acknowledged that they are gone: they may be stopped now."""

    allocs: tuple[AllocId, ...]


class JobSubmitted(Value, frozen=True, kw_only=True):
    request: RequestId
    job: Job


class JobStopRequested(Value, frozen=True, kw_only=True):
    request: RequestId
    job: JobName


class StoreCall(Value, frozen=True, kw_only=True):
    """Base of operators' calls about what the fleet keeps apart from jobs."""

    request: RequestId


class SecretPutRequested(StoreCall, frozen=True, kw_only=True):
    namespace: Namespace
    name: SecretName
    sealed: bytes
    variable: bool = False


class SecretDeleteRequested(StoreCall, frozen=True, kw_only=True):
    namespace: Namespace
    name: SecretName


class SecretsResealed(StoreCall, frozen=True, kw_only=True):
    """The same values under another key: namespace, name, version, sealed."""

    sealed: tuple[tuple[Namespace, SecretName, int, bytes], ...]


class VolumeMade(StoreCall, frozen=True, kw_only=True):
    """Its node has it."""

    volume: Volume


class VolumeDeleteRequested(StoreCall, frozen=True, kw_only=True):
    namespace: Namespace
    name: VolumeName


class VolumeSnapshotMade(StoreCall, frozen=True, kw_only=True):
    """Or `removed`; on the volume's node."""

    namespace: Namespace
    name: VolumeName
    snapshot: str
    bytes: int = 0
    removed: bool = False


StoreCalls = (
    SecretPutRequested
    | SecretDeleteRequested
    | SecretsResealed
    | VolumeMade
    | VolumeDeleteRequested
    | VolumeSnapshotMade
)


class JobDispatchRequested(Value, frozen=True, kw_only=True):
    """Launch a job from one with parameters, or now from one with a schedule."""

    request: RequestId
    job: JobName
    parameters: Mapping[str, str] = {}
    payload: bytes | None = None


class JobRevertRequested(Value, frozen=True, kw_only=True):
    request: RequestId
    job: JobName
    version: int = 0  # 0: the last good one before the newest


class JobScaleRequested(Value, frozen=True, kw_only=True):
    request: RequestId
    job: JobName
    group: GroupName | None  # None: the only one
    count: int


class Launch(Value, frozen=True, kw_only=True):
    """One of the times at which a schedule fires."""

    at_s: float
    stamp: str  # in UTC, as a name has it: 20261126-053000


class LaunchPlanned(Value, frozen=True, kw_only=True):
    """The answer to `PlanLaunch`."""

    job: JobName
    version: int
    due: Launch | None = None  # the newest that has passed
    next: Launch | None = None  # None: the schedule never fires again


class ScaleDue(Value, frozen=True, kw_only=True):
    """From the core to itself: a group that the fleet scales should have another count."""

    job: JobName
    group: GroupName
    was: int
    count: int
    reason: str


class FiguresReported(Value, frozen=True, kw_only=True):
    """What copies of scaled groups have to do."""

    session: SessionId
    node: NodeId
    figures: tuple[AllocFigures, ...]


class LaunchDue(Value, frozen=True, kw_only=True):
    """From the core to itself: a schedule fired, and waits its turn among the operators' calls."""

    job: JobName
    launch: Launch


class AccessChangeRequested(Value, frozen=True, kw_only=True):
    """An operator changes who may do what. Of `NodeRevoked` the core adds the key."""

    request: RequestId
    change: AccessRecord


class NodeJoinRequested(Value, frozen=True, kw_only=True):
    """A node shows a join token, and the key that it wants a certificate for: hashes alone come here."""

    request: RequestId
    token_sha256: str
    node: NodeId
    key_sha256: str


class RolloutSteerRequested(Value, frozen=True, kw_only=True):
    request: RequestId
    job: JobName
    action: RolloutAction


class JobRestartRequested(Value, frozen=True, kw_only=True):
    """Replace all copies by equal ones, as a rollout does."""

    request: RequestId
    job: JobName


class AllocMoveRequested(Value, frozen=True, kw_only=True):
    """A guest shall go on on `node` (None: on any other). The reply's message is its new allocation."""

    request: RequestId
    job: JobName
    alloc: AllocId
    node: NodeId | None = None


class AllocSteerRequested(Value, frozen=True, kw_only=True):
    request: RequestId
    alloc: AllocId
    action: AllocAction


class NodeSteerRequested(Value, frozen=True, kw_only=True):
    """`drain`: its work leaves, within `deadline_s` (None: as long as it takes); it is not eligible then."""

    request: RequestId
    node: NodeId
    eligible: bool
    drain: bool = False
    deadline_s: float | None = None
    keep_system: bool = False


class Appended(Value, frozen=True, kw_only=True):
    """The journal has the records of this ticket on disk."""

    ticket: Ticket


class Tick(Value, frozen=True, kw_only=True):
    """Time passed: the edge sends one when `State.next_deadline_s` is reached."""


SteerCall = RolloutSteerRequested | AllocSteerRequested | NodeSteerRequested | AllocMoveRequested
OperatorJobCall = (
    JobSubmitted
    | JobStopRequested
    | JobDispatchRequested
    | JobRevertRequested
    | JobScaleRequested
    | JobRestartRequested
)
AccessCall = AccessChangeRequested | NodeJoinRequested
OperatorCall = OperatorJobCall | SteerCall | StoreCalls | AccessCall  # each is answered by a Reply
OwnCall = LaunchDue | ScaleDue  # the core's
JobCall = OperatorJobCall | OwnCall
Call = OperatorCall | OwnCall  # what waits for the journal to be free
Event = (
    AgentConnected
    | AgentDisconnected
    | HeartbeatReceived
    | AgentReported
    | AgentApplied
    | FingerprintChanged
    | LastWillSeen
    | EndpointsWithdrawn
    | OperatorCall
    | LaunchPlanned
    | FiguresReported
    | Appended
    | Tick
)
