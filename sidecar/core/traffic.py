"""A service's traffic rules as one caller's sidecar carries them out: backends, their endpoints, routes. Pure."""

from outrider.ids import NodeId, ServiceName
from outrider.model.job import Protocol, Value
from outrider.model.mesh import Endpoint, MeshService, MeshView
from outrider.model.traffic import HttpMatch, Leg, Policy, Retries, Route, Sticky

LegKey = tuple[str, str]  # service, subset


class Backend(Value, frozen=True, kw_only=True):
    """Where a share of calls goes: the instances of a service or of a subset, and those that stand in for them."""

    service: str
    subset: str
    endpoints: str  # names their set
    protocol: Protocol
    policy: Policy
    peers: tuple[str, ...]  # services that may answer
    tiers: tuple[tuple[tuple[str, int], ...], ...]


class PairRoute(Value, frozen=True, kw_only=True):
    match: HttpMatch
    legs: tuple[tuple[LegKey, int], ...]  # with their weights
    prefix_rewrite: str = ""
    timeout_s: float = 0.0
    retries: Retries = Retries()
    sticky: Sticky = Sticky()


class Shadow(Value, frozen=True, kw_only=True):
    leg: LegKey
    percent: float


class Backends:
    """`of` a node's view. A service that the view does not have has no endpoints, and is told so to its callers."""

    def __init__(self, view: MeshView, node: NodeId) -> None:
        self._view, self._node = view, node

    def of(self, leg: LegKey) -> Backend:
        service, subset = leg
        known = self._view.services.get(ServiceName(service))
        traffic = known.traffic if known is not None else None
        policy = traffic.policy if traffic is not None else Policy()
        stand_ins = next((one.to for one in traffic.failovers if one.subset == subset), ()) if traffic else ()
        tiers = [*self._tiers(leg, node_first=policy.node_first)]
        for stand_in in stand_ins:
            tiers += self._tiers((stand_in.service, stand_in.subset), node_first=False)
        return Backend(
            service=service,
            subset=subset,
            endpoints=f"{service}/{subset}" if subset else service,
            protocol=known.protocol if known is not None else Protocol.HTTP,
            policy=policy,
            peers=tuple(dict.fromkeys((service, *(one.service for one in stand_ins)))),
            tiers=tuple(tier for tier in tiers if tier),
        )

    def _tiers(self, leg: LegKey, *, node_first: bool) -> tuple[tuple[tuple[str, int], ...], ...]:
        service, subset = leg
        known = self._view.services.get(ServiceName(service))
        live = [
            endpoint
            for endpoint in (known.endpoints if known is not None else ())
            if endpoint.healthy and (not subset or subset in endpoint.subsets)
        ]
        if not node_first:
            return (tuple(self._dialled(endpoint) for endpoint in live),)
        here = tuple(self._dialled(endpoint) for endpoint in live if endpoint.node == self._node)
        return here, tuple(self._dialled(endpoint) for endpoint in live if endpoint.node != self._node)

    def _dialled(self, endpoint: Endpoint) -> tuple[str, int]:
        if endpoint.node == self._node and endpoint.local_address:
            return endpoint.local_address, endpoint.local_port
        return endpoint.address, endpoint.port


def leg_name(source: ServiceName, leg: LegKey, scope: str = "") -> str:
    """Names the cluster of a leg; of a whole service as `outbound_name` does."""
    service, subset = leg
    return f"{scope}outbound/{source}/{service}" + (f"/{subset}" if subset else "")


def used_services(known: MeshService) -> frozenset[str]:
    """The other services that calls of this one may come to."""
    traffic = known.traffic
    legs = [leg for route in traffic.routes for leg in route.legs]
    legs += [leg for failover in traffic.failovers for leg in failover.to]
    legs += [traffic.mirror.to] if traffic.mirror is not None else []
    legs += [traffic.target] if traffic.target is not None else []
    return frozenset(leg.service for leg in legs)


def pair_routes(known: MeshService) -> tuple[tuple[PairRoute, ...], Shadow | None]:
    """The routes of calls of `known`, in order, the last of which takes every request; and who gets copies."""
    traffic = known.traffic
    home = traffic.target or Leg(service=known.name)
    rules = traffic.routes or (Route(legs=(home,)),)
    if rules[-1].match != HttpMatch():
        rules = (*rules, Route(legs=(home,)))
    routes = tuple(
        PairRoute(
            match=rule.match,
            legs=tuple(((leg.service, leg.subset), leg.weight) for leg in rule.legs or (home,)),
            prefix_rewrite=rule.prefix_rewrite,
            timeout_s=rule.timeout_s,
            retries=rule.retries,
            sticky=traffic.policy.sticky,
        )
        for rule in rules
    )
    mirror = traffic.mirror
    shadow = Shadow(leg=(mirror.to.service, mirror.to.subset), percent=mirror.percent) if mirror is not None else None
    return routes, shadow
