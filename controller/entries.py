"""Consul's config entries that say how calls are routed: their JSON, and what sidecars are to make of them. Pure.

What no Consul has a field for (mirrors, faults, rates, budgets ...) stands in the entry's Meta under `outrider-...`:
Consul's own tools show it, keep it and can change it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from outrider.errors import InputError
from outrider.model.traffic import (
    WEIGHT_WHOLE,
    Balancing,
    Failover,
    HttpFault,
    HttpMatch,
    Leg,
    Mirror,
    Policy,
    RateLimit,
    Retries,
    Route,
    ServiceTraffic,
    Sticky,
    TextMatch,
)

DEFAULTS, ROUTER, SPLITTER, RESOLVER = "service-defaults", "service-router", "service-splitter", "service-resolver"
INTENTIONS = "service-intentions"
# In the order in which they can be written: each leans on those before.
TRAFFIC_KINDS = (DEFAULTS, RESOLVER, SPLITTER, ROUTER)
OWNER_META = "outrider-owner"  # CLUSTER/JOB
POLICY_META, MIRROR_META, FAULT_META, RATE_META = (f"outrider-{name}" for name in ("policy", "mirror", "fault", "rate"))
_HTTP = frozenset({"http", "http2", "grpc"})
_HOPS_MAX = 8  # redirects and splits of splits; more is a circle
_SUBSET_TERM = re.compile(r'Service\.Meta\.([\w-]+) == "?([^"\s]+)"?')
_BALANCING = {
    "least_request": Balancing.LEAST_REQUEST,
    "round_robin": Balancing.ROUND_ROBIN,
    "random": Balancing.RANDOM,
    "ring_hash": Balancing.RING_HASH,
    "maglev": Balancing.MAGLEV,
}
T = TypeVar("T")


class Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """Base of the shapes. Fields of later Consuls are ignored."""


class TextRule(Shape, frozen=True, kw_only=True):
    """Of a header or a query parameter."""

    name: str
    exact: str = ""
    prefix: str = ""
    suffix: str = ""
    regex: str = ""
    present: bool = False
    invert: bool = False


class HttpRule(Shape, frozen=True, kw_only=True):
    """Of a router's match and of an intention's permission."""

    path_exact: str = ""
    path_prefix: str = ""
    path_regex: str = ""
    header: tuple[TextRule, ...] | None = None
    query_param: tuple[TextRule, ...] | None = None
    methods: tuple[str, ...] | None = None


class RouteMatch(Shape, frozen=True, kw_only=True):
    http: HttpRule | None = msgspec.field(default=None, name="HTTP")


class RouteDestination(Shape, frozen=True, kw_only=True):
    service: str = ""
    service_subset: str = ""
    prefix_rewrite: str = ""
    request_timeout: str = ""
    num_retries: int = 0
    retry_on_connect_failure: bool = False
    retry_on_status_codes: tuple[int, ...] | None = None


class RouterRoute(Shape, frozen=True, kw_only=True):
    match: RouteMatch | None = None
    destination: RouteDestination | None = None


class Split(Shape, frozen=True, kw_only=True):
    weight: float = 0.0
    service: str = ""
    service_subset: str = ""


class ResolverSubset(Shape, frozen=True, kw_only=True):
    filter: str = ""
    only_passing: bool = False


class ResolverRedirect(Shape, frozen=True, kw_only=True):
    service: str = ""
    service_subset: str = ""


class ResolverFailover(Shape, frozen=True, kw_only=True):
    service: str = ""
    service_subset: str = ""


class HashCookie(Shape, frozen=True, kw_only=True):
    ttl: str = msgspec.field(default="", name="TTL")
    session: bool = False


class HashPolicy(Shape, frozen=True, kw_only=True):
    field: str = ""
    field_value: str = ""
    cookie_config: HashCookie | None = None
    source_ip: bool = msgspec.field(default=False, name="SourceIP")


class LoadBalancer(Shape, frozen=True, kw_only=True):
    policy: str = ""
    hash_policies: tuple[HashPolicy, ...] | None = None


class Entry(Shape, frozen=True, kw_only=True):
    """One config entry of the kinds that bear on traffic; the fields of all of them."""

    kind: str
    name: str
    protocol: str = ""
    routes: tuple[RouterRoute, ...] | None = None
    splits: tuple[Split, ...] | None = None
    default_subset: str = ""
    subsets: Mapping[str, ResolverSubset] | None = None
    redirect: ResolverRedirect | None = None
    failover: Mapping[str, ResolverFailover] | None = None
    connect_timeout: str = ""
    load_balancer: LoadBalancer | None = None
    meta: Mapping[str, str] | None = None


Entries = Mapping[tuple[str, str], Entry]  # by kind and name


def keyed(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    return {(entry.kind, entry.name): entry for entry in entries}


def http_match(rule: HttpRule) -> HttpMatch:
    return HttpMatch(
        path_exact=rule.path_exact,
        path_prefix=rule.path_prefix,
        path_regex=rule.path_regex,
        methods=rule.methods or (),
        headers=tuple(_text_match(one) for one in rule.header or ()),
        query=tuple(_text_match(one) for one in rule.query_param or ()),
    )


def http_rule(match: HttpMatch) -> HttpRule:
    return HttpRule(
        path_exact=match.path_exact,
        path_prefix=match.path_prefix,
        path_regex=match.path_regex,
        methods=match.methods or None,
        header=tuple(_text_rule(one) for one in match.headers) or None,
        query_param=tuple(_text_rule(one) for one in match.query) or None,
    )


def subsets_of(entries: Entries, service: str, meta: Mapping[str, str]) -> tuple[str, ...]:
    """The subsets of `service` to which an instance with `meta` belongs."""
    resolver = entries.get((RESOLVER, service))
    found = resolver.subsets if resolver is not None else None
    return tuple(sorted(name for name, subset in (found or {}).items() if _chosen(subset.filter, meta)))


def problem(entry: Entry) -> str:
    """What an entry asks for that sidecars cannot do; "" for nothing."""
    for name, subset in (entry.subsets or {}).items():
        if subset.filter and _terms(subset.filter) is None:
            return f"subset {name}: only `Service.Meta.KEY == VALUE`, joined by `and`, is understood"
    for key in (POLICY_META, MIRROR_META, FAULT_META, RATE_META):
        try:
            _extra(entry, key, msgspec.Raw)
        except InputError as error:
            return str(error)
    return ""


def protocol_of(entries: Entries, service: str) -> str:
    """As service-defaults say; "" where they say nothing."""
    defaults = entries.get((DEFAULTS, service))
    return defaults.protocol if defaults is not None else ""


def rate_of(entries: Entries, service: str) -> RateLimit | None:
    return _extra(entries.get((DEFAULTS, service)), RATE_META, RateLimit)


def compiled(entries: Entries, service: str) -> ServiceTraffic:
    """What calls of `service` come to: its router, the splitters and resolvers behind it. Consul's discovery chain."""
    defaults = entries.get((DEFAULTS, service))
    router = entries.get((ROUTER, service))
    routes = [_route(entries, service, one) for one in (router.routes if router else None) or ()]
    last = _legs(entries, service, "", WEIGHT_WHOLE)
    if routes or last != (Leg(service=service),):
        routes.append(Route(legs=last))
    target = last[0] if len(last) == 1 and last[0] != Leg(service=service) else None
    return ServiceTraffic(
        routes=tuple(routes),
        target=target,
        policy=_policy(defaults, entries.get((RESOLVER, service))),
        failovers=tuple(_failovers(entries, service)),
        mirror=_extra(defaults, MIRROR_META, Mirror),
        fault=_extra(defaults, FAULT_META, HttpFault),
    )


def used(traffic: ServiceTraffic) -> frozenset[str]:
    """All services that calls of one with `traffic` may come to."""
    legs = [leg for route in traffic.routes for leg in route.legs]
    legs += [leg for failover in traffic.failovers for leg in failover.to]
    legs += [traffic.mirror.to] if traffic.mirror is not None else []
    legs += [traffic.target] if traffic.target is not None else []
    return frozenset(leg.service for leg in legs)


def _route(entries: Entries, service: str, route: RouterRoute) -> Route:
    to = route.destination or RouteDestination()
    rule = route.match.http if route.match is not None else None
    return Route(
        match=http_match(rule) if rule is not None else HttpMatch(),
        legs=_legs(entries, to.service or service, to.service_subset, WEIGHT_WHOLE),
        prefix_rewrite=to.prefix_rewrite,
        timeout_s=go_duration_s(to.request_timeout),
        retries=Retries(
            attempts=to.num_retries,
            connect_failure=to.retry_on_connect_failure,
            statuses=to.retry_on_status_codes or (),
        ),
    )


def _legs(entries: Entries, service: str, subset: str, weight: int, hops: int = 0) -> tuple[Leg, ...]:
    """Where `weight` calls of a service go. A subset that is named is not split again, as Consul has it."""
    splitter = entries.get((SPLITTER, service))
    if splitter is None or not splitter.splits or subset or hops >= _HOPS_MAX:
        return (_resolved(entries, service, subset, weight),)
    legs: list[Leg] = []
    shares = _shares(splitter.splits, weight)
    for split, share in zip(splitter.splits, shares, strict=True):
        other = split.service or service
        if other == service:
            legs.append(_resolved(entries, service, split.service_subset, share))
        else:
            legs += _legs(entries, other, split.service_subset, share, hops + 1)
    return tuple(leg for leg in legs if leg.weight) or (_resolved(entries, service, subset, weight),)


def _shares(splits: tuple[Split, ...], weight: int) -> list[int]:
    """Whole numbers that add up to `weight`: the largest share takes what rounding leaves."""
    total = sum(split.weight for split in splits) or 1.0
    shares = [int(split.weight / total * weight) for split in splits]
    shares[shares.index(max(shares))] += weight - sum(shares)
    return shares


def _resolved(entries: Entries, service: str, subset: str, weight: int) -> Leg:
    for _ in range(_HOPS_MAX):
        resolver = entries.get((RESOLVER, service))
        if resolver is None:
            break
        if resolver.redirect is not None:
            redirect = resolver.redirect
            service, subset = redirect.service or service, redirect.service_subset
            continue
        subset = subset or resolver.default_subset
        break
    return Leg(service=service, subset=subset, weight=weight)


def _failovers(entries: Entries, service: str) -> Iterator[Failover]:
    resolver = entries.get((RESOLVER, service))
    found = (resolver.failover if resolver is not None else None) or {}
    subsets = (resolver.subsets if resolver is not None else None) or {}
    names = {"", *subsets}
    for name in sorted(names):
        one = found.get(name) or found.get("*")
        if one is not None:
            yield Failover(subset=name, to=(Leg(service=one.service or service, subset=one.service_subset),))


def _policy(defaults: Entry | None, resolver: Entry | None) -> Policy:
    policy = _extra(defaults, POLICY_META, Policy) or Policy()
    if resolver is not None and resolver.connect_timeout:
        policy = msgspec.structs.replace(policy, connect_timeout_s=go_duration_s(resolver.connect_timeout))
    balancer = resolver.load_balancer if resolver is not None else None
    if balancer is None or balancer.policy not in _BALANCING:
        return policy
    sticky = next((found for one in balancer.hash_policies or () if (found := _sticky(one))), policy.sticky)
    return msgspec.structs.replace(policy, balance=_BALANCING[balancer.policy], sticky=sticky)


def _sticky(policy: HashPolicy) -> Sticky | None:
    if policy.source_ip:
        return Sticky(source=True)
    if policy.field == "header":
        return Sticky(header=policy.field_value)
    if policy.field != "cookie":
        return None
    cookie = policy.cookie_config or HashCookie()
    return Sticky(cookie=policy.field_value, ttl_s=0.0 if cookie.session else go_duration_s(cookie.ttl))


def _extra(entry: Entry | None, key: str, kind: type[T]) -> T | None:
    text = ((entry.meta if entry is not None else None) or {}).get(key)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        assert entry is not None
        raise InputError(f"{entry.kind} {entry.name}: Meta.{key}: {error}") from error


def _text_match(rule: TextRule) -> TextMatch:
    return TextMatch(**msgspec.structs.asdict(rule))


def _text_rule(match: TextMatch) -> TextRule:
    return TextRule(**msgspec.structs.asdict(match))


def _chosen(subset_filter: str, meta: Mapping[str, str]) -> bool:
    """What is not understood chooses nobody: `problem` says so."""
    terms = _terms(subset_filter)
    return terms is not None and all(meta.get(key) == value for key, value in terms)


def _terms(subset_filter: str) -> list[tuple[str, str]] | None:
    if not subset_filter.strip():
        return []
    found = [_SUBSET_TERM.fullmatch(part.strip()) for part in subset_filter.split(" and ")]
    return None if None in found else [(one[1], one[2]) for one in found if one is not None]


_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def go_duration_s(text: str) -> float:
    """Go's form, "1m30s"; "" is 0. What is no duration is 0 too: Consul has checked it."""
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))


def go_duration(seconds: float) -> str:
    """As Go writes it, so that what comes back is what was sent; "" for none."""
    millis = round(seconds * 1000)
    if millis < 1000:
        return f"{millis}ms" if millis else ""
    minutes, rest = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{text}{rest / 1000:.12g}s"


def splits_whole(entry: Entry) -> bool:
    return entry.kind != SPLITTER or abs(sum(split.weight for split in entry.splits or ()) - 100.0) < 0.005


def permits_routing(entries: Entries, service: str) -> bool:
    """Routers and splitters are for requests: Consul takes them only where the protocol has any."""
    return protocol_of(entries, service) in _HTTP
