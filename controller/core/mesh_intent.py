"""What the journal's state wants of the mesh: registrations, intentions, interests. Values here; derived purely."""

from collections.abc import Mapping

from controller.core.state import State
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.job import Protocol, Value


class ServiceRegistration(Value, frozen=True, kw_only=True):
    """One service instance and the sidecar in front of it."""

    alloc: AllocId
    service: ServiceName
    protocol: Protocol
    job: JobName
    port: int  # the sidecar's, on the node's address; 0: the service only calls, no endpoint
    local_address: str = ""  # where sidecars of the same node dial; "" while the agent has not said
    local_port: int = 0
    upstreams: tuple[ServiceName, ...] = ()
    passing: bool = False
    output: str = ""


class NodeRegistration(Value, frozen=True, kw_only=True):
    """What a node should have in the catalog. Absent services are deregistered."""

    node: NodeId
    address: str
    passing: bool  # the node's one check: the switch for node loss
    output: str
    services: tuple[ServiceRegistration, ...] = ()


class OwnedIntention(Value, frozen=True, kw_only=True):
    """An `allow:` line of a job: the job owns the intention, and takes it along when it goes."""

    source: ServiceName
    destination: ServiceName
    job: JobName


class Interests(Value, frozen=True, kw_only=True):
    """What one node's sidecars need to know about."""

    called: frozenset[ServiceName]
    placed: frozenset[ServiceName]


def registration(state: State, node: NodeId) -> NodeRegistration: ...  # type: ignore[empty-body]
def owned_intentions(state: State) -> tuple[OwnedIntention, ...]: ...  # type: ignore[empty-body]
def virtual_indices(state: State) -> Mapping[ServiceName, int]: ...  # type: ignore[empty-body]
def virtual_services(state: State) -> Mapping[ServiceName, tuple[int, Protocol]]: ...  # type: ignore[empty-body]
def interests(state: State, node: NodeId) -> Interests: ...  # type: ignore[empty-body]
def may_hold_leaf(state: State, node: NodeId, service: ServiceName) -> bool: ...  # type: ignore[empty-body]
