"""What the mesh does, as its sidecars see it: figures of pairs, certificates, calls looked at, calls explained."""

from enum import StrEnum

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol, Value


class LatencyBucket(Value, frozen=True, kw_only=True):
    below_ms: float
    count: int  # of all below, not only of this bucket's


class PairFigures(Value, frozen=True, kw_only=True):
    """What one caller's sidecar counted of one pair in `seconds`."""

    source: ServiceName
    destination: ServiceName
    alloc: AllocId
    seconds: float
    requests: int = 0  # that were answered; of tcp, 0
    failed: int = 0  # answers 5xx; of tcp, connections that did not come about
    connections: int = 0
    connections_active: int = 0
    bytes: int = 0  # both ways
    latency: tuple[LatencyBucket, ...] = ()


class MeshEdge(Value, frozen=True, kw_only=True):
    """One service's calls of another, all its sidecars together."""

    source: ServiceName
    destination: ServiceName
    protocol: Protocol = Protocol.TCP
    sidecars: int = 0  # of the caller, that answered
    calls_per_s: float = 0.0  # requests; of tcp, connections
    failed_share: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    connections_active: int = 0
    bytes_per_s: float = 0.0


class MeshGraph(Value, frozen=True, kw_only=True):
    seconds: float
    edges: tuple[MeshEdge, ...] = ()
    silent: tuple[NodeId, ...] = ()  # nodes that did not answer: what they know is missing


class LeafState(Value, frozen=True, kw_only=True):
    """The certificate that a node's sidecars use for a service."""

    service: ServiceName
    node: NodeId
    serial: str
    expires_at_s: float


class RootState(Value, frozen=True, kw_only=True):
    name: str
    serial: str
    expires_at_s: float
    active: bool = False  # signs; the others are only trusted


class MeshCertificates(Value, frozen=True, kw_only=True):
    trust_domain: str
    datacenter: str
    roots: tuple[RootState, ...] = ()
    leaves: tuple[LeafState, ...] = ()
    silent: tuple[NodeId, ...] = ()


class ProbeOutcome(Value, frozen=True, kw_only=True):
    """A real call from inside a caller's namespace, through both sidecars."""

    reached: bool  # the workload answered, whatever it said
    text: str
    duration_ms: float = 0.0


class CallPart(StrEnum):
    """What must be right for a call, in this order."""

    CALLER = "caller"
    NAME = "name"
    ROUTES = "routes"
    ENDPOINTS = "endpoints"
    INTENTION = "intention"
    CERTIFICATE = "certificate"
    PROBE = "probe"


class Finding(Value, frozen=True, kw_only=True):
    part: CallPart
    good: bool
    text: str


class CallExplanation(Value, frozen=True, kw_only=True):
    """The first finding that is not good is what is wrong."""

    source: ServiceName
    destination: ServiceName
    findings: tuple[Finding, ...] = ()


class TappedHeader(Value, frozen=True, kw_only=True):
    name: str
    value: str = ""
    redacted: bool = False


class TappedCall(Value, frozen=True, kw_only=True):
    """One request and its answer, as the caller's sidecar passed them on; never their bodies."""

    at_s: float
    alloc: AllocId
    source: ServiceName
    destination: ServiceName
    method: str
    path: str
    status: int
    duration_ms: float  # until the answer's headers
    request: tuple[TappedHeader, ...] = ()
    response: tuple[TappedHeader, ...] = ()
