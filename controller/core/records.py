"""The journal's records: the durable part of the state changes by these alone. Replay of all equals the state.

Owns their shapes, never their meaning: that is `State.apply`. Times are wall-clock seconds. Many allocations in one
record are packed little-endian integers, because an object for each would decide the scheduler's speed.
"""

from controller.core.access_records import AccessRecord
from outrider.ids import GroupName, JobName, Namespace, NodeId, SecretName, ServiceName, VolumeName
from outrider.model.allocation import AllocAction, AllocReport, AllocStatus, Generation
from outrider.model.belongings import Volume, VolumeSnapshot
from outrider.model.fleet import RolloutAction, RolloutState
from outrider.model.job import Job, Value
from outrider.model.node import Drain, Node


class EpochBegun(Value, frozen=True, kw_only=True, tag=True):
    """A leader's term, or a restore, begins: generations compare higher than any before."""

    epoch: int
    salt: int = 0  # of allocation ids; drawn with the first epoch and kept


class SerialsSkipped(Value, frozen=True, kw_only=True, tag=True):
    """A snapshot was restored: what was given these serials since then is unclaimed, and none is given out again."""

    first: int
    past: int


class NodeRegistered(Value, frozen=True, kw_only=True, tag=True):
    """The node is known from here on, as it describes itself; it is up, whatever was said before."""

    node: Node


class NodeDowned(Value, frozen=True, kw_only=True, tag=True):
    """The disconnect policy ran out: its allocations are lost in the same batch."""

    node: NodeId


class JobVersionAdded(Value, frozen=True, kw_only=True, tag=True):
    job: Job
    version: int
    submitted_at_s: float
    base: int = 0  # the good version that it follows, and that stands until it has proven itself; 0: none


class JobVersionsDropped(Value, frozen=True, kw_only=True, tag=True):
    """Old versions that no allocation is made from any more."""

    job: JobName
    versions: tuple[int, ...]


class JobStopped(Value, frozen=True, kw_only=True, tag=True):
    job: JobName


class JobLaunched(Value, frozen=True, kw_only=True, tag=True):
    """A job was launched from this one, or its schedule fired in vain. The launched job's version follows."""

    job: JobName
    number: int  # of launches by hand so far: names are never given twice
    fired_s: float = 0.0  # the schedule's time that is dealt with; 0: launched by hand
    child: JobName | None = None  # None: left out
    reason: str = ""  # why it was left out


class JobForgotten(Value, frozen=True, kw_only=True, tag=True):
    """A launched job that is over, and all that is known of it, goes."""

    job: JobName


class GroupScaled(Value, frozen=True, kw_only=True, tag=True):
    """The newest version's group has another count from here on."""

    job: JobName
    group: GroupName
    count: int
    reason: str


class RolloutEnded(Value, frozen=True, kw_only=True, tag=True):
    """What became of the rollout of the job's newest version."""

    job: JobName
    version: int
    state: RolloutState
    reason: str = ""
    final: bool = False  # by an operator: it does not come good by itself any more


class RolloutSteered(Value, frozen=True, kw_only=True, tag=True):
    """Promoted, paused or resumed. That it failed is an end."""

    job: JobName
    version: int
    action: RolloutAction


class NodeSteered(Value, frozen=True, kw_only=True, tag=True):
    """Whether the node gets new work, and whether what it has leaves."""

    node: NodeId
    eligible: bool
    drain: Drain | None = None


class AllocSteered(Value, frozen=True, kw_only=True, tag=True):
    """One allocation, by an operator."""

    serial: int
    action: AllocAction
    at_s: float


class VirtualAddressAssigned(Value, frozen=True, kw_only=True, tag=True):
    service: ServiceName
    index: int  # for outrider.model.mesh.virtual_address


class SecretPut(Value, frozen=True, kw_only=True, tag=True):
    """A version of a secret or a variable, sealed under a key that the journal does not have."""

    namespace: Namespace
    name: SecretName
    version: int
    sealed: bytes
    at_s: float
    variable: bool = False
    dropped: tuple[int, ...] = ()  # older versions that are not kept any more


class SecretDeleted(Value, frozen=True, kw_only=True, tag=True):
    namespace: Namespace
    name: SecretName


class VolumeCreated(Value, frozen=True, kw_only=True, tag=True):
    """Its node has made it."""

    volume: Volume
    at_s: float


class VolumeDeleted(Value, frozen=True, kw_only=True, tag=True):
    namespace: Namespace
    name: VolumeName


class VolumeSnapshotted(Value, frozen=True, kw_only=True, tag=True):
    """Its node has made a snapshot of it; or, without one, removed that of this name."""

    namespace: Namespace
    name: VolumeName
    snapshot: VolumeSnapshot
    removed: bool = False


class Run(Value, frozen=True, kw_only=True):
    """New allocations of one group with neighbouring serials and indices."""

    job: JobName
    version: int
    group: int  # the position in the version's groups
    first_serial: int
    first_index: int
    nodes: bytes  # int32 references of nodes, one for each; -1: nowhere for now
    ports: bytes = b""  # int32 mesh ports, one for each of the group's services with a port, then the next allocation's
    role: int = 0  # of all of them: the table's code


class LatePlacement(Value, frozen=True, kw_only=True):
    """Allocations that had no node and get one; of one group."""

    serials: bytes  # int64
    nodes: bytes
    ports: bytes = b""


class Stop(Value, frozen=True, kw_only=True):
    serials: bytes  # int64
    reason: str
    by: JobName | None = None  # the job of higher priority that takes their place


class Update(Value, frozen=True, kw_only=True):
    """Running allocations that are told of a newer version in place: nothing that makes the process differs."""

    job: JobName
    version: int
    group: int
    serials: bytes  # int64


class Plan(Value, frozen=True, kw_only=True, tag=True):
    """One decision of the scheduler: immutable, checked against the state that `parent` names."""

    generation: Generation
    parent: Generation
    at_s: float
    runs: tuple[Run, ...] = ()
    late: tuple[LatePlacement, ...] = ()
    stops: tuple[Stop, ...] = ()
    updates: tuple[Update, ...] = ()
    moves: tuple[tuple[int, int], ...] = ()  # serials: the guest of the first goes on as the second, which is new
    settled: bytes = b""  # int64 serials of canaries and successors that are ordinary copies from here on


class AllocTransitions(Value, frozen=True, kw_only=True, tag=True):
    """These allocations ended. `reports` are kept for the failed ones: the last lines of their logs are in them."""

    status: AllocStatus
    at_s: float
    serials: bytes  # int64
    reason: str = ""
    reports: tuple[AllocReport, ...] = ()


class AllocationsSnapshot(Value, frozen=True, kw_only=True, tag=True):
    """All allocations at once, column by column: only the first part of a compacted journal has it."""

    next_serial: int
    generation: Generation
    columns: dict[str, bytes]
    groups: tuple[tuple[JobName, int, int], ...]  # job, version, position: what the column of groups points to
    ports: dict[int, tuple[int, ...]]
    reasons: dict[int, str]
    reports: tuple[AllocReport, ...]
    restarts: dict[int, int]
    moves: dict[int, int]


StoreRecord = SecretPut | SecretDeleted | VolumeCreated | VolumeDeleted | VolumeSnapshotted
Record = (
    EpochBegun
    | SerialsSkipped
    | NodeRegistered
    | NodeDowned
    | JobVersionAdded
    | JobVersionsDropped
    | JobStopped
    | JobLaunched
    | JobForgotten
    | GroupScaled
    | RolloutEnded
    | RolloutSteered
    | NodeSteered
    | AllocSteered
    | VirtualAddressAssigned
    | Plan
    | AllocTransitions
    | AllocationsSnapshot
    | SecretPut
    | SecretDeleted
    | AccessRecord
    | VolumeCreated
    | VolumeDeleted
    | VolumeSnapshotted
)
