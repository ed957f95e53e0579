"""The jobs' `traffic:` as config entries, and what makes Consul have them. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from controller.core.mesh_intent import OwnedTraffic
from controller.entries import (
    DEFAULTS,
    FAULT_META,
    MIRROR_META,
    OWNER_META,
    POLICY_META,
    RATE_META,
    RESOLVER,
    ROUTER,
    SPLITTER,
    TRAFFIC_KINDS,
    Entry,
    HttpRule,
    ResolverFailover,
    ResolverSubset,
    RouteDestination,
    RouteMatch,
    RouterRoute,
    Split,
    go_duration,
    http_rule,
    keyed,
)
from outrider.ids import ServiceName
from outrider.model.job import Protocol, Value
from outrider.model.traffic import Leg, Policy, Retries, Route, Traffic

_FROM_META = (POLICY_META, MIRROR_META, FAULT_META, RATE_META)


class EntryPlan(Value, frozen=True, kw_only=True):
    put: tuple[Entry, ...] = ()  # in an order that Consul takes
    delete: tuple[tuple[str, str], ...] = ()  # kind, name; likewise


def owned_entries(owned: OwnedTraffic, cluster: str, protocols: Mapping[ServiceName, Protocol]) -> tuple[Entry, ...]:
    """What one service's `traffic:` comes to. The protocols of the services that it names are said too: Consul takes
    no route to one that speaks another."""
    traffic, name = owned.traffic, owned.service
    owner = {OWNER_META: f"{cluster}/{owned.job}"}
    found = [
        Entry(kind=DEFAULTS, name=name, protocol=owned.protocol.value, meta={**owner, **_extras(traffic)}),
        *_resolver(name, traffic, owner),
    ]
    if traffic.split:
        splits = tuple(
            Split(weight=leg.weight / 100, service=_other(leg, name), service_subset=leg.subset)
            for leg in traffic.split
        )
        found.append(Entry(kind=SPLITTER, name=name, splits=splits, meta=owner))
    routes = tuple(_route(route, name) for route in traffic.routes)
    if traffic.timeout_s or traffic.retries != Retries():
        rest = Route(timeout_s=traffic.timeout_s, retries=traffic.retries)
        routes += (_route(rest, name),)
    if routes:
        found.append(Entry(kind=ROUTER, name=name, routes=routes, meta=owner))
    others = {name: protocols.get(ServiceName(name), Protocol.TCP) for name in sorted(_named(traffic) - {name})}
    found += [
        Entry(kind=DEFAULTS, name=other, protocol=protocol.value, meta=owner)
        for other, protocol in others.items()
        if protocol is not Protocol.TCP
    ]
    return tuple(found)


def plan_entries(wanted: Iterable[Entry], found: Iterable[Entry], cluster: str) -> EntryPlan:
    """An entry that no job of this cluster wrote stays as it is, and wins: as with intentions."""
    want: dict[tuple[str, str], Entry] = {}
    for entry in wanted:
        old = want.get((entry.kind, entry.name))
        # The service's own job says more of it than one that only routes to it.
        if old is None or len(entry.meta or {}) > len(old.meta or {}):
            want[entry.kind, entry.name] = entry
    have = keyed(found)
    put = [one for key, one in want.items() if key not in have or (_ours(have[key], cluster) and have[key] != one)]
    delete = [key for key, one in have.items() if key not in want and _ours(one, cluster)]
    order = TRAFFIC_KINDS.index
    return EntryPlan(
        put=tuple(sorted(put, key=lambda one: (order(one.kind), one.name))),
        delete=tuple(sorted(delete, key=lambda key: (-order(key[0]), key[1]))),
    )


def _ours(entry: Entry, cluster: str) -> bool:
    return (entry.meta or {}).get(OWNER_META, "").startswith(f"{cluster}/")


def _extras(traffic: Traffic) -> dict[str, str]:
    values = (traffic.policy if traffic.policy != Policy() else None, traffic.mirror, traffic.fault, traffic.rate)
    return {
        key: msgspec.json.encode(value).decode()
        for key, value in zip(_FROM_META, values, strict=True)
        if value is not None
    }


def _resolver(name: str, traffic: Traffic, owner: Mapping[str, str]) -> tuple[Entry, ...]:
    if not (traffic.subsets or traffic.failover or traffic.default_subset):
        return ()
    subsets = {
        one.name: ResolverSubset(
            filter=" and ".join(f'Service.Meta.{key} == "{value}"' for key, value in sorted(one.meta.items()))
        )
        for one in traffic.subsets
    }
    failover = {"*": _stand_in(traffic.failover[0], name)} if traffic.failover else {}
    return (
        Entry(
            kind=RESOLVER,
            name=name,
            subsets=subsets or None,
            default_subset=traffic.default_subset,
            failover=failover or None,
            meta=owner,
        ),
    )


def _stand_in(leg: Leg, name: str) -> ResolverFailover:
    return ResolverFailover(service=_other(leg, name), service_subset=leg.subset)


def _route(route: Route, name: str) -> RouterRoute:
    leg = route.legs[0] if route.legs else Leg(service=name)
    rule = http_rule(route.match)
    return RouterRoute(
        # Consul takes no route without a match: every path begins with a slash.
        match=RouteMatch(http=rule if rule != HttpRule() else HttpRule(path_prefix="/")),
        destination=RouteDestination(
            service=_other(leg, name),
            service_subset=leg.subset,
            prefix_rewrite=route.prefix_rewrite,
            request_timeout=go_duration(route.timeout_s),
            num_retries=route.retries.attempts,
            retry_on_connect_failure=route.retries.connect_failure,
            retry_on_status_codes=route.retries.statuses or None,
        ),
    )


def _other(leg: Leg, name: str) -> str:
    return "" if leg.service == name else leg.service


def _named(traffic: Traffic) -> set[str]:
    legs = [*traffic.split, *traffic.failover, *(leg for route in traffic.routes for leg in route.legs)]
    return {leg.service for leg in legs}
