"""What the agent wants of one sidecar. Values only; peers and intentions come with the mesh view."""

from outrider.ids import AllocId, NodeId, SecretName, ServiceName
from outrider.model.external import External
from outrider.model.gateway import GatewayRoute
from outrider.model.job import Protocol, Value
from outrider.model.mesh import listener_address
from sidecar.core.scope import scope_of


class SidecarUpstream(Value, frozen=True, kw_only=True):
    """A service that the allocation calls: by its virtual address, and on 127.0.0.1 where the job asks."""

    service: ServiceName
    local_port: int | None = None


class SidecarGateway(Value, frozen=True, kw_only=True):
    """A port where callers outside of the mesh come in."""

    port: int
    to: ServiceName | None = None
    routes: tuple[GatewayRoute, ...] = ()
    secret: SecretName | None = None


class SidecarService(Value, frozen=True, kw_only=True):
    """A service of the allocation, and the identity under which it calls its upstreams."""

    service: ServiceName
    public_port: int
    workload_address: str = "127.0.0.1"
    workload_port: int | None = None  # None: it only calls, nothing listens
    protocol: Protocol = Protocol.TCP
    upstreams: tuple[SidecarUpstream, ...] = ()
    gateway: tuple[SidecarGateway, ...] = ()


class Traces(Value, frozen=True, kw_only=True):
    """Where spans go, by OTLP over gRPC, and of how many requests that nobody decided about before."""

    address: str
    port: int
    percent: float = 1.0


class SidecarSpec(Value, frozen=True, kw_only=True):
    """One allocation's sidecar. Never changes for the sidecar's life."""

    alloc: AllocId
    node: NodeId  # as Consul names it: endpoints of the same node are dialled at their local address
    uid: int  # the host's uid that Envoy runs as: only it (and root) may enter the sidecar's directory
    local_address: str  # the veth's address inside the allocation's namespace; public listeners bind here only
    services: tuple[SidecarService, ...] = ()
    external: tuple[External, ...] = ()  # outside of the mesh; in the first service's name
    traces: Traces | None = None  # None: trace contexts pass through, and nobody adds to them
    shared: bool = False  # it is a part of the node's shared one

    @property
    def scope(self) -> str:
        return scope_of(self.alloc) if self.shared else ""

    def listens_at(self, virtual: str | None = None) -> str:
        """For what is called at a virtual address, or (None) for what is sent to the allocation."""
        if self.shared:
            return listener_address(self.local_address, virtual)
        return virtual if virtual is not None else self.local_address


class PairStats(Value, frozen=True, kw_only=True):
    """Traffic between two services, counted by one sidecar since it started.

    Outbound: `source` is ours. Inbound: `destination` is ours, and `source` is "": callers' own sidecars know better.
    """

    source: str
    destination: str
    requests: tuple[tuple[str, int], ...] = ()  # (class, count): "2xx" ...; empty for tcp
    errors: int = 0  # failures to connect, resets, and no healthy endpoint
    latency_ms: tuple[tuple[float, int], ...] = ()  # (upper bound, cumulative count), over LATENCY_BUCKETS_MS
    latency_count: int = 0
    latency_sum_ms: float = 0.0
    bytes_sent: int = 0  # towards the destination
    bytes_received: int = 0
    connections: int = 0
    connections_active: int = 0
    requests_active: int = 0
    refused: int = 0  # inbound: by an intention


class SidecarStats(Value, frozen=True, kw_only=True):
    alloc: AllocId
    inbound: tuple[PairStats, ...] = ()
    outbound: tuple[PairStats, ...] = ()
