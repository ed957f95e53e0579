"""What sidecars counted, as the graph of who calls whom; what stands about a call, as findings. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from controller.core import views
from controller.core.mesh_intent import virtual_services
from controller.core.state import State
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.allocation import Allocation
from outrider.model.insight import CallPart, Finding, LatencyBucket, MeshEdge, PairFigures
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Intention, MeshService
from outrider.model.traffic import HttpMatch, Leg, ServiceTraffic, Verdict

Pair = tuple[ServiceName, ServiceName]
_NAMED_MAX = 3


def edges(state: State, figures: Iterable[PairFigures], *, seen: Mapping[Pair, bool]) -> tuple[MeshEdge, ...]:
    """One for each pair that calls or that a running copy says it may; those that `seen` denies are left out."""
    by_pair: dict[Pair, list[PairFigures]] = defaultdict(list)
    for one in figures:
        by_pair[one.source, one.destination].append(one)
    protocols = virtual_services(state)
    return tuple(
        _edge(pair, by_pair.get(pair, []), protocols[pair[1]][1] if pair[1] in protocols else Protocol.TCP)
        for pair in sorted({*by_pair, *declared(state)})
        if seen.get(pair, True)
    )


def declared(state: State) -> Iterator[Pair]:
    """Of every group that has copies, who says that it calls whom."""
    for entry in state.groups.values():
        for service in entry.group.services:
            for upstream in service.upstreams:
                yield service.name, upstream.service


def quantile(buckets: Iterable[LatencyBucket], share: float) -> float | None:
    """By linear interpolation within the bucket, as Prometheus does it. None where nothing was counted."""
    ordered = sorted(buckets, key=lambda bucket: bucket.below_ms)
    total = ordered[-1].count if ordered else 0
    if total <= 0:
        return None
    rank, low_ms, below = share * total, 0.0, 0
    for bucket in ordered:
        if bucket.count >= rank:
            if bucket.below_ms == float("inf"):
                return low_ms  # nothing is known beyond the last bound
            within = bucket.count - below
            return low_ms + (bucket.below_ms - low_ms) * ((rank - below) / within if within else 1.0)
        low_ms, below = bucket.below_ms, bucket.count
    return low_ms


def _edge(pair: Pair, figures: list[PairFigures], protocol: Protocol) -> MeshEdge:
    counts: dict[float, int] = defaultdict(int)
    for one in figures:
        for bucket in one.latency:
            counts[bucket.below_ms] += bucket.count
    latency = [LatencyBucket(below_ms=below, count=count) for below, count in counts.items()]
    http = protocol is not Protocol.TCP
    calls = sum(one.requests if http else one.connections for one in figures)
    failed = sum(one.failed for one in figures)
    seconds = max((one.seconds for one in figures), default=0.0)
    return MeshEdge(
        source=pair[0],
        destination=pair[1],
        protocol=protocol,
        sidecars=len({one.alloc for one in figures}),
        calls_per_s=calls / seconds if seconds else 0.0,
        failed_share=min(1.0, failed / calls) if calls else float(failed > 0),
        p50_ms=quantile(latency, 0.5),
        p99_ms=quantile(latency, 0.99),
        connections_active=sum(one.connections_active for one in figures),
        bytes_per_s=sum(one.bytes for one in figures) / seconds if seconds else 0.0,
    )


def callers(state: State, source: ServiceName) -> tuple[Allocation, ...]:
    """The running copies of a service, those first whose calls say the most: healthy ones."""
    found = [
        one
        for one in views.allocations_of_service(state, source)
        if one.node is not None and one.report is not None and one.report.local_address
    ]
    return tuple(sorted(found, key=lambda one: (not one.healthy, one.id)))


def about_caller(state: State, source: ServiceName, found: tuple[Allocation, ...]) -> Finding:
    if found:
        shown = ", ".join(f"{one.id} on {one.node}" for one in found[:_NAMED_MAX])
        return _good(CallPart.CALLER, f"{len(found)} running: {shown}{'' if len(found) <= _NAMED_MAX else ' ...'}")
    placed = views.allocations_of_service(state, source)
    if placed:
        why = placed[0].reason or placed[0].status.value
        return _bad(CallPart.CALLER, f"no copy of {source} runs yet: {placed[0].id} is {why}")
    if source in state.providers or any(pair[0] == source for pair in declared(state)):
        return _bad(CallPart.CALLER, f"no copy of {source} runs; `outrider job ls` says what became of its job")
    return _bad(CallPart.CALLER, f"no job of this fleet has a service {source}; `outrider job ls` lists them")


def is_transparent(state: State, source: ServiceName) -> bool:
    return any(one.name == source and one.transparent for each in state.groups.values() for one in each.group.services)


def about_name(state: State, source: ServiceName, destination: ServiceName, address: str, *, named: bool) -> Finding:
    """`named`: among its upstreams, or in reach of a transparent one."""
    if not named and is_transparent(state, source):
        hint = f"`outrider intention create {source} {destination}`"
        return _bad(CallPart.NAME, f"{source} is transparent, and no intention lets it call {destination}: {hint}")
    if not named:
        hint = f"add `upstreams: [{destination}]` to service {source} in its job"
        return _bad(CallPart.NAME, f"{source} does not name {destination} under `upstreams`: {hint}")
    if not address:
        return _bad(CallPart.NAME, f"the catalog has not been asked for {destination} yet; is Consul reachable?")
    return _good(CallPart.NAME, f"{destination}.mesh is {address} inside")


def about_routes(state: State, service: MeshService, endpoints: Mapping[ServiceName, int]) -> Finding:
    """`endpoints`: how many each service has, of those that calls may come to."""
    traffic = service.traffic
    named = sorted({leg.service for leg in legs(service.name, traffic)})
    for name in named:
        if not endpoints.get(ServiceName(name)) and not state.providers.get(ServiceName(name)):
            return _bad(
                CallPart.ROUTES, f"calls may be sent to {name}, which nobody provides: change the route or split"
            )
    rules = [
        f"{_described(route.match)} -> {_shares(route.legs or (Leg(service=service.name),))}"
        for route in traffic.routes
    ]
    target = traffic.target or Leg(service=service.name)
    return _good(CallPart.ROUTES, "; ".join(rules) or f"all calls -> {_leg(target)}")


def about_endpoints(state: State, service: MeshService) -> Finding:
    healthy = [one for one in service.endpoints if one.healthy]
    if healthy:
        shown = ", ".join(f"{one.alloc or one.id} on {one.node}" for one in healthy[:_NAMED_MAX])
        more = "" if len(healthy) <= _NAMED_MAX else " ..."
        return _good(CallPart.ENDPOINTS, f"{len(healthy)} of {len(service.endpoints)} healthy: {shown}{more}")
    copies = views.allocations_of_service(state, service.name)
    if not service.endpoints and not copies:
        return _bad(CallPart.ENDPOINTS, f"{service.name} has no instance: nothing of it runs")
    why = next((each for one in copies if (each := _sickness(one, service.name))), "none of them passes its check")
    return _bad(CallPart.ENDPOINTS, f"{service.name} has no healthy instance: {why}")


def about_intention(
    source: ServiceName, destination: ServiceName, *, allowed: bool, decided_by: Intention | None
) -> Finding:
    if decided_by is None:
        by = "by Consul's default" if allowed else "no intention names them"
        hint = "" if allowed else f"; `outrider intention create {source} {destination}`"
        return Finding(part=CallPart.INTENTION, good=allowed, text=f"{'allowed' if allowed else 'denied'}: {by}{hint}")
    owner = f" of job {decided_by.owner}" if decided_by.owner else ""
    kind = "http" if decided_by.permissions else decided_by.action.value
    rule = f"{decided_by.source} -> {decided_by.destination} {kind}{owner} ({decided_by.id})"
    if decided_by.permissions:
        some = sum(one.action is Verdict.ALLOW for one in decided_by.permissions)
        return Finding(part=CallPart.INTENTION, good=allowed, text=f"{rule} allows by {some} rules for requests")
    good = decided_by.action is Action.ALLOW
    why = f", “{decided_by.description}”" if decided_by.description and not good else ""
    return Finding(part=CallPart.INTENTION, good=good, text=f"{'allowed' if good else 'denied'} by {rule}{why}")


def about_certificate(
    source: ServiceName, node: NodeId, alloc: AllocId, expires_at_s: float | None, now_s: float
) -> Finding:
    if expires_at_s is None:
        return _bad(CallPart.CERTIFICATE, f"node {node} has no certificate for {source}, whose sidecar is {alloc}'s")
    left_s = expires_at_s - now_s
    if left_s <= 0:
        return _bad(CallPart.CERTIFICATE, f"the certificate of {source} on {node} expired {-left_s:.0f} s ago")
    return _good(CallPart.CERTIFICATE, f"{source}'s on {node} is good for {left_s / 3600:.1f} h")


def legs(name: ServiceName, traffic: ServiceTraffic) -> Iterator[Leg]:
    """Where calls of `name` may come to while all is well."""
    for route in traffic.routes:
        yield from route.legs
    yield traffic.target or Leg(service=name)


def _sickness(allocation: Allocation, service: ServiceName) -> str:
    report = allocation.report
    if report is None:
        return f"{allocation.id} is {allocation.status}, {allocation.reason or 'its node has not said more'}"
    check = next((one for one in report.checks if one.service == service and not one.passing), None)
    where = f"{allocation.id} on {allocation.node}"
    return f"{where}: {check.output or 'its check has not passed yet'}" if check is not None else ""


def _described(match: HttpMatch) -> str:
    path = match.path_exact or (match.path_prefix and f"{match.path_prefix}*") or match.path_regex or "/*"
    methods = ",".join(match.methods)
    more = [f"{one.name}" for one in (*match.headers, *match.query)]
    return " ".join(part for part in (methods, path, f"[{', '.join(more)}]" if more else "") if part)


def _shares(found: tuple[Leg, ...]) -> str:
    if len(found) == 1:
        return _leg(found[0])
    return " + ".join(f"{leg.weight / 100:g}% {_leg(leg)}" for leg in found)


def _leg(leg: Leg) -> str:
    return f"{leg.service}/{leg.subset}" if leg.subset else leg.service


def _good(part: CallPart, text: str) -> Finding:
    return msgspec.structs.replace(_bad(part, text), good=True)


def _bad(part: CallPart, text: str) -> Finding:
    return Finding(part=part, good=False, text=text)
