"""What one sidecar's Envoy should have, as plain values, derived from its spec and its node's mesh view.

Owns names and contents of resources; never their encoding, versions or delivery.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from outrider.ids import SecretName, ServiceName
from outrider.model.job import Protocol, Value
from outrider.model.mesh import VIRTUAL_PORT, Leaf, MeshService, MeshView, spiffe_id
from outrider.model.traffic import HttpFault, RateLimit
from sidecar.core.access import AccessHistory, AccessRule
from sidecar.core.external import Addresses, ExternalResource, external_parts
from sidecar.core.gateway import GatewayResource, gateway_parts
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from sidecar.core.traffic import Backend, Backends, LegKey, PairRoute, Shadow, leg_name, pair_routes

ROOTS = "roots"
TRACES = "traces"
LOOPBACK = "127.0.0.1"
Pair = tuple[ServiceName, ServiceName]  # who calls, who is called


class Kind(StrEnum):
    """Kinds of resources, in the order in which they are pushed: what is referred to goes first."""

    CLUSTER = "cluster"
    ENDPOINTS = "endpoints"
    SECRET = "secret"  # noqa: S105  # a kind, not one
    LISTENER = "listener"
    ROUTES = "routes"
    RULES = "rules"


class LocalCluster(Value, frozen=True, kw_only=True):
    """The workload behind a public listener."""

    name: str
    address: str
    port: int
    protocol: Protocol
    patient: bool = False  # it may be on its way to this node


class UpstreamCluster(Value, frozen=True, kw_only=True):
    """The way from one of our services to another: its own certificate out, the peer's exact name expected."""

    name: str
    source: ServiceName
    destination: ServiceName
    protocol: Protocol
    sni: str
    backend: Backend
    peers: tuple[str, ...]  # SPIFFE ids: one of them is expected
    scope: str = ""


class EndpointSet(Value, frozen=True, kw_only=True):
    """Healthy endpoints of a service as this node dials them. The same value for all sidecars of the node."""

    name: str
    # In order: the next ones are for when those before are gone.
    tiers: tuple[tuple[tuple[str, int], ...], ...] = ()


class LeafSecret(Value, frozen=True, kw_only=True):
    name: str
    certificate_pem: str
    key_pem: str


class RootsSecret(Value, frozen=True, kw_only=True):
    name: str
    certificates_pem: tuple[str, ...]


class TraceCluster(Value, frozen=True, kw_only=True):
    """Who collects spans."""

    name: str
    address: str
    port: int


class InboundListener(Value, frozen=True, kw_only=True):
    """A service's public mTLS listener. Only `revision` ever changes, to cut what a revocation forbids."""

    name: str
    service: ServiceName
    address: str
    port: int
    protocol: Protocol
    revision: int
    traced_percent: float | None = None  # None: no spans
    scope: str = ""


class OutboundListener(Value, frozen=True, kw_only=True):
    name: str
    source: ServiceName
    destination: ServiceName
    address: str
    port: int
    protocol: Protocol
    traced_percent: float | None = None
    scope: str = ""


class UpstreamRoutes(Value, frozen=True, kw_only=True):
    name: str
    source: ServiceName
    destination: ServiceName
    routes: tuple[PairRoute, ...]
    mirror: Shadow | None = None
    fault: HttpFault | None = None
    tapped: bool = False  # somebody looks at its requests
    scope: str = ""


class InboundRoutes(Value, frozen=True, kw_only=True):
    """The one way from a public HTTP listener to its workload, and how much may take it."""

    name: str
    service: ServiceName
    rate: RateLimit | None = None
    scope: str = ""


class AccessRules(Value, frozen=True, kw_only=True):
    """Who may call a service, as Envoy's RBAC evaluates it."""

    name: str
    service: ServiceName
    protocol: Protocol
    trust_domain: str
    datacenter: str
    rules: tuple[AccessRule, ...]
    scope: str = ""


Resource = (
    LocalCluster
    | TraceCluster
    | UpstreamCluster
    | EndpointSet
    | LeafSecret
    | RootsSecret
    | InboundListener
    | OutboundListener
    | UpstreamRoutes
    | InboundRoutes
    | AccessRules
    | GatewayResource
    | ExternalResource
)


class ResourceSet(Value, frozen=True, kw_only=True):
    """All of one sidecar's resources by kind and name. `missing` says what must come before Envoy can serve."""

    resources: Mapping[Kind, Mapping[str, Resource]]
    missing: tuple[str, ...] = ()


def resources(
    spec: SidecarSpec,
    view: MeshView,
    leaves: Mapping[ServiceName, Leaf],
    history: Mapping[ServiceName, AccessHistory],
    *,
    tapped: Pair | None = None,
    pems: Mapping[SecretName, str] = {},
    addresses: Mapping[str, tuple[str, ...]] = {},
) -> ResourceSet:
    """What `spec` needs under `view`. `leaves` have their keys; `history` has each service's rules as of now; of
    `tapped` somebody looks at the requests; `pems` are the gateways' certificates and keys; `addresses` are those of
    hosts outside."""
    if not (view.roots.trust_domain and view.roots.datacenter and view.roots.certificates_pem):
        return ResourceSet(resources={}, missing=("the mesh's trust roots",))
    found: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
    missing: list[str] = []
    roots = RootsSecret(name=spec.scope + ROOTS, certificates_pem=view.roots.certificates_pem)
    found[Kind.SECRET][roots.name] = roots
    if spec.traces is not None:
        collector = TraceCluster(name=spec.scope + TRACES, address=spec.traces.address, port=spec.traces.port)
        found[Kind.CLUSTER][collector.name] = collector
    virtual_taken: set[ServiceName] = set()
    for service in spec.services:
        upstreams = _upstreams(service, view)
        if service.workload_port is None and not upstreams:
            continue
        leaf = leaves.get(service.service)
        if leaf is None:
            missing.append(f"the certificate of service {service.service}")
        else:
            secret = LeafSecret(
                name=leaf_name(service.service, spec.scope),
                certificate_pem=leaf.certificate_pem,
                key_pem=leaf.key_pem,
            )
            found[Kind.SECRET][secret.name] = secret
        if service.workload_port is not None:
            _add_inbound(found, spec, service, view, history)
        for upstream in upstreams:
            known = view.services.get(upstream.service)
            if known is None:
                missing.append(f"the virtual address of upstream {upstream.service}")
                continue
            _add_outbound(
                found,
                spec,
                source=service.service,
                upstream=upstream,
                known=known,
                view=view,
                virtual_taken=virtual_taken,
                tapped=tapped,
            )
        if service.gateway:
            missing += _add_gateway(found, spec, service, view, pems)
    _add_external(found, spec, addresses)
    return ResourceSet(resources=found, missing=tuple(missing))


def _add_external(found: dict[Kind, dict[str, Resource]], spec: SidecarSpec, addresses: Addresses) -> None:
    parts = external_parts(spec, addresses)
    found[Kind.CLUSTER].update({one.name: one for one in parts.clusters})
    found[Kind.LISTENER].update({one.name: one for one in parts.listeners})
    for name, hosts in parts.endpoints:
        found[Kind.ENDPOINTS][name] = EndpointSet(name=name, tiers=(hosts,) if hosts else ())


def _add_gateway(
    found: dict[Kind, dict[str, Resource]],
    spec: SidecarSpec,
    service: SidecarService,
    view: MeshView,
    pems: Mapping[SecretName, str],
) -> tuple[str, ...]:
    parts = gateway_parts(spec, service, view.services, pems)
    for kind, several in (
        (Kind.CLUSTER, parts.clusters),
        (Kind.SECRET, parts.certificates),
        (Kind.LISTENER, parts.listeners),
        (Kind.ROUTES, parts.routes),
    ):
        found[kind].update({one.name: one for one in several})
    return parts.missing


def leaf_name(service: ServiceName, scope: str = "") -> str:
    return f"{scope}leaf/{service}"


def rules_name(service: ServiceName, scope: str = "") -> str:
    return f"{scope}rules/{service}"


def local_cluster_name(service: ServiceName, scope: str = "") -> str:
    return f"{scope}local/{service}"


def outbound_name(source: ServiceName, destination: ServiceName, scope: str = "") -> str:
    """Names the cluster and the routes of a pair."""
    return f"{scope}outbound/{source}/{destination}"


def inbound_name(service: ServiceName, scope: str = "") -> str:
    """Names the listener and the routes of a service."""
    return f"{scope}inbound/{service}"


def is_http(protocol: Protocol) -> bool:
    return protocol is not Protocol.TCP


def _upstreams(service: SidecarService, view: MeshView) -> tuple[SidecarUpstream, ...]:
    """Those that the job names, and what else is in reach of a transparent service."""
    named = {upstream.service for upstream in service.upstreams}
    reached = (name for name in view.reach.get(service.service, ()) if name not in named and name in view.services)
    return (*service.upstreams, *(SidecarUpstream(service=name) for name in reached))


def _add_inbound(
    found: dict[Kind, dict[str, Resource]],
    spec: SidecarSpec,
    service: SidecarService,
    view: MeshView,
    history: Mapping[ServiceName, AccessHistory],
) -> None:
    name = service.service
    past = history.get(name, AccessHistory())
    assert service.workload_port is not None
    scope = spec.scope
    cluster = LocalCluster(
        name=local_cluster_name(name, scope),
        address=service.workload_address,
        port=service.workload_port,
        protocol=service.protocol,
        patient=service.workload_address != LOOPBACK and not spec.shared,
    )
    listener = InboundListener(
        name=inbound_name(name, scope),
        service=name,
        address=spec.listens_at(),
        port=service.public_port,
        protocol=service.protocol,
        # HTTP asks its rules for every request; connections and long streams outlive a revocation, and are cut.
        revision=past.revision,
        traced_percent=spec.traces.percent if spec.traces is not None else None,
        scope=scope,
    )
    rules = AccessRules(
        name=rules_name(name, scope),
        service=name,
        protocol=service.protocol,
        trust_domain=view.roots.trust_domain,
        datacenter=view.roots.datacenter,
        rules=past.rules,
        scope=scope,
    )
    found[Kind.CLUSTER][cluster.name] = cluster
    found[Kind.LISTENER][listener.name] = listener
    found[Kind.RULES][rules.name] = rules
    if is_http(service.protocol):
        routes = InboundRoutes(name=inbound_name(name, scope), service=name, rate=view.rates.get(name), scope=scope)
        found[Kind.ROUTES][routes.name] = routes


def _add_outbound(
    found: dict[Kind, dict[str, Resource]],
    spec: SidecarSpec,
    *,
    source: ServiceName,
    upstream: SidecarUpstream,
    known: MeshService,
    view: MeshView,
    virtual_taken: set[ServiceName],
    tapped: Pair | None,
) -> None:
    destination, scope = upstream.service, spec.scope
    pair = outbound_name(source, destination, scope)
    backends = Backends(view, spec.node)
    if is_http(known.protocol):
        routes, mirror = pair_routes(known)
        found[Kind.ROUTES][pair] = UpstreamRoutes(
            name=pair,
            source=source,
            destination=destination,
            routes=routes,
            mirror=mirror,
            fault=known.traffic.fault,
            tapped=tapped == (source, destination),
            scope=scope,
        )
        legs = {leg for route in routes for leg, _ in route.legs} | ({mirror.leg} if mirror is not None else set())
        for leg in sorted(legs):
            _add_backend(found, source=source, leg=leg, backends=backends, view=view, scope=scope)
    else:
        target = known.traffic.target
        leg = (target.service, target.subset) if target is not None else (destination, "")
        _add_backend(found, source=source, leg=leg, backends=backends, view=view, scope=scope, name=pair)
    places = []
    if destination not in virtual_taken:
        # One address, one caller: where two services of an allocation share an upstream, the first is its name there.
        virtual_taken.add(destination)
        places.append(("virtual", spec.listens_at(known.virtual_address), VIRTUAL_PORT))
    if upstream.local_port is not None:
        places.append((str(upstream.local_port), LOOPBACK, upstream.local_port))
    for place, address, port in places:
        name = f"{pair}/{place}"
        found[Kind.LISTENER][name] = OutboundListener(
            name=name,
            source=source,
            destination=destination,
            address=address,
            port=port,
            protocol=known.protocol,
            traced_percent=spec.traces.percent if spec.traces is not None else None,
            scope=scope,
        )


def _add_backend(
    found: dict[Kind, dict[str, Resource]],
    *,
    source: ServiceName,
    leg: LegKey,
    backends: Backends,
    view: MeshView,
    scope: str,
    name: str = "",
) -> None:
    roots, backend = view.roots, backends.of(leg)
    name = name or leg_name(source, leg, scope)
    backend = msgspec.structs.replace(backend, endpoints=scope + backend.endpoints)
    found[Kind.CLUSTER][name] = UpstreamCluster(
        name=name,
        source=source,
        destination=ServiceName(backend.service),
        protocol=backend.protocol,
        # Consul's form: its own proxies and gateways route by it.
        sni=f"{backend.service}.default.{roots.datacenter}.internal.{roots.trust_domain}",
        backend=msgspec.structs.replace(backend, tiers=()),
        peers=tuple(spiffe_id(roots.trust_domain, roots.datacenter, ServiceName(peer)) for peer in backend.peers),
        scope=scope,
    )
    found[Kind.ENDPOINTS][backend.endpoints] = EndpointSet(name=backend.endpoints, tiers=backend.tiers)
