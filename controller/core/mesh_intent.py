"""What the journal's state wants of the mesh: registrations, intentions, interests. Values here; derived purely."""

from collections.abc import Iterator, Mapping

from controller.core import table as columns
from controller.core.state import State
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.allocation import AllocStatus, CheckReport
from outrider.model.job import Protocol, Service, Value
from outrider.model.mesh import PUBLIC_PORT
from outrider.model.node import NodeStatus
from outrider.model.traffic import Traffic


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
    meta: Mapping[str, str] = {}
    passing: bool = False
    output: str = ""


class NodeRegistration(Value, frozen=True, kw_only=True):
    """What a node should have in the catalog. Absent services are deregistered."""

    node: NodeId
    address: str
    passing: bool  # the node's one check: the switch for node loss
    output: str
    # The agent was not heard since the controller started: that its services pass is assumed, and what the catalog
    # says of their health and local addresses is newer knowledge than this.
    assumed: bool = False
    services: tuple[ServiceRegistration, ...] = ()
    metrics_address: str = ""  # host:port, for whoever discovers by Consul; "" serves none


class OwnedIntention(Value, frozen=True, kw_only=True):
    """An `allow:` line of a job: the job owns the intention, and takes it along when it goes."""

    source: ServiceName
    destination: ServiceName
    job: JobName


class OwnedTraffic(Value, frozen=True, kw_only=True):
    """A service's `traffic:` in a job: the job owns the config entries that it comes to."""

    service: ServiceName
    protocol: Protocol
    job: JobName
    traffic: Traffic


class Interests(Value, frozen=True, kw_only=True):
    """What one node's sidecars need to know about."""

    called: frozenset[ServiceName] = frozenset()
    placed: frozenset[ServiceName] = frozenset()
    transparent: frozenset[ServiceName] = frozenset()  # of those placed: they call whoever lets them


def registration(state: State, node: NodeId) -> NodeRegistration:
    """Raises KeyError for a node that never joined."""
    ref = state.nodes.reference[node]
    link = state.live.links[ref]
    services: list[ServiceRegistration] = []
    for serial, row in _serving(state, ref):
        if (
            state.table.desired[row] == columns.RUN and serial not in state.live.leaving
        ):  # what is told to stop leaves first (DESIGN, decision 7)
            services.extend(_service_registrations(state, serial, row, seen=link.seen))
    return NodeRegistration(
        node=node,
        address=state.nodes.nodes[ref].address,
        # Gone is not suspect: with its agent gone a node keeps its endpoints (DESIGN, decision 5).
        passing=link.status in (NodeStatus.READY, NodeStatus.GONE)
        or (link.status is NodeStatus.SUSPECT and bool(state.live.braked)),
        output=link.reason or link.status.value,
        assumed=not link.seen,
        services=tuple(services),
        metrics_address=state.nodes.nodes[ref].metrics_address,
    )


def owned_intentions(state: State) -> tuple[OwnedIntention, ...]:
    """The `allow:` lines of all jobs that are not stopped, each once."""
    found: dict[OwnedIntention, None] = {}
    for name, service in _guiding(state):
        for source in service.allow:
            found[OwnedIntention(source=source, destination=service.name, job=name)] = None
    return tuple(found)


def owned_traffic(state: State) -> tuple[OwnedTraffic, ...]:
    """The `traffic:` of all jobs that are not stopped; of a service that several provide, the first job's by name."""
    found: dict[ServiceName, OwnedTraffic] = {}
    for name, service in _guiding(state):
        if service.traffic is not None and service.name not in found:
            found[service.name] = OwnedTraffic(
                service=service.name, protocol=service.protocol, job=name, traffic=service.traffic
            )
    return tuple(found.values())


def _guiding(state: State) -> Iterator[tuple[JobName, Service]]:
    """Services of the jobs that say anything about calls; a job that was launched from another says nothing."""
    for name in sorted(state.guiding):
        for group in state.jobs[name].job.groups:
            for service in group.services:
                yield name, service


def virtual_indices(state: State) -> Mapping[ServiceName, int]:
    """Of every name that a job ever provided or called."""
    return state.virtual


def virtual_services(state: State) -> Mapping[ServiceName, tuple[int, Protocol]]:
    """Index and protocol. A name that no job provides may be one from outside: TCP."""
    return {
        name: (index, next(iter(state.providers.get(name, {}).values()), Protocol.TCP))
        for name, index in state.virtual.items()
    }


def interests(state: State, node: NodeId) -> Interests:
    called: set[ServiceName] = set()
    placed: set[ServiceName] = set()
    transparent: set[ServiceName] = set()
    ref = state.nodes.reference.get(node)
    for _, row in _serving(state, ref) if ref is not None else ():
        for service in state.group_of(row).group.services:
            placed.add(service.name)
            if service.transparent:
                transparent.add(service.name)
            called.update(upstream.service for upstream in service.upstreams)
    return Interests(called=frozenset(called), placed=frozenset(placed), transparent=frozenset(transparent))


def may_hold_leaf(state: State, node: NodeId, service: ServiceName) -> bool:
    """The node authorizer: an allocation of the service, neither ended nor lost, is placed on the node."""
    ref = state.nodes.reference.get(node)
    return ref is not None and any(
        one.name == service for _, row in _serving(state, ref) for one in state.group_of(row).group.services
    )


def _serving(state: State, ref: int) -> Iterator[tuple[int, int]]:
    """Serial and row of the node's allocations with services, those included that are told to stop."""
    for serial in sorted(state.nodes.serving[ref]):
        row = state.table.row(serial)
        assert row is not None, "what serves has not ended"
        yield serial, row


def _service_registrations(state: State, serial: int, row: int, *, seen: bool) -> Iterator[ServiceRegistration]:
    group = state.group_of(row)
    report = state.live.reports.get(serial)
    ports = dict(zip(group.mesh_services, state.ports.get(serial, ()), strict=False))
    checks = {check.service: check for check in report.checks} if report is not None else {}
    running = report is not None and report.status is AllocStatus.RUNNING
    # The second set of a blue/green update gets no calls before it is promoted.
    held = group.group.update.blue_green and state.table.role[row] == columns.CANARY
    for position, service in enumerate(group.group.services):
        check = checks.get(service.name)
        passing = not held and (not seen or (running and (check is None or check.passing)))
        # The guest is about to be there: who calls it waits in its sidecar until it is.
        passing |= serial in state.moves and state.moves[serial] in state.live.leaving
        yield ServiceRegistration(
            alloc=state.alloc_id(serial),
            service=service.name,
            protocol=service.protocol,
            job=group.job,
            port=ports.get(service.name, 0),
            local_address=report.local_address if report is not None else "",
            local_port=PUBLIC_PORT + position if service.port is not None else 0,
            upstreams=tuple(upstream.service for upstream in service.upstreams),
            meta=service.meta,
            passing=passing,
            output="waits to be promoted" if held else _output(check, passing=passing),
        )


def _output(check: CheckReport | None, *, passing: bool) -> str:
    if check is not None:
        return check.output
    return "" if passing else "not running yet"
