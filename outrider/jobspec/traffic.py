"""`traffic:` of a service -> a `Traffic` value."""

from outrider.jobspec.document import Node
from outrider.jobspec.fields import Faults, Fields, Path, listed, named, text_of
from outrider.jobspec.units import duration_s
from outrider.model.traffic import (
    Balancing,
    HttpFault,
    HttpMatch,
    Leg,
    Limits,
    Mirror,
    Outliers,
    Policy,
    RateLimit,
    Retries,
    Route,
    Sticky,
    Subset,
    TextMatch,
    Traffic,
)

_POLICY_KEYS = ("balance", "sticky", "limits", "outliers", "retry_budget", "connect_timeout", "node_first")
_KEYS = (
    *("subsets", "default_subset", "split", "routes", "failover", "timeout", "retries", "mirror", "fault", "rate"),
    *_POLICY_KEYS,
)
_MATCH_KEYS = ("path", "prefix", "regex", "methods", "headers", "query")
_FORMS = ("exact", "prefix", "suffix", "regex", "present", "not")


def read_traffic(service: Fields, name: str, faults: Faults) -> Traffic | None:
    node = service.node("traffic")
    if node is None:
        return None
    path = (*service.path, "traffic")
    fields = Fields(node, path, faults, _KEYS)
    return Traffic(
        subsets=_subsets(fields, faults),
        default_subset=fields.text("default_subset", ""),
        split=_split(fields, name, faults),
        routes=_routes(fields, name, faults),
        failover=tuple(_leg(text, name) for text in fields.texts("failover")),
        timeout_s=fields.quantity("timeout", duration_s, 0.0),
        retries=_retries(fields, faults),
        policy=_policy(fields, faults),
        mirror=_mirror(fields, name, faults),
        fault=_fault(fields, faults),
        rate=_rate(fields, faults),
    )


def _part(fields: Fields, key: str, faults: Faults, known: tuple[str, ...]) -> Fields | None:
    node = fields.node(key)
    return Fields(node, (*fields.path, key), faults, known) if node is not None else None


def _leg(text: str, name: str, weight: int | None = None) -> Leg:
    """`SERVICE`, `SERVICE/SUBSET`, or `/SUBSET` of the service itself."""
    service, _, subset = text.partition("/")
    leg = Leg(service=service or name, subset=subset)
    return leg if weight is None else Leg(service=leg.service, subset=subset, weight=weight)


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is no percentage; write 10 or 2.5%") from error


def _subsets(fields: Fields, faults: Faults) -> tuple[Subset, ...]:
    node = fields.node("subsets")
    if node is None:
        return ()
    path = (*fields.path, "subsets")
    return tuple(
        Subset(name=name, meta=dict(_texts(meta, (*path, name), faults))) for name, meta in named(node, path, faults)
    )


def _texts(node: Node, path: Path, faults: Faults) -> list[tuple[str, str]]:
    found = ((key, text_of(value, (*path, key), faults)) for key, value in named(node, path, faults))
    return [(key, text) for key, text in found if text is not None]


def _split(fields: Fields, name: str, faults: Faults) -> tuple[Leg, ...]:
    node = fields.node("split")
    if node is None:
        return ()
    path = (*fields.path, "split")
    legs = []
    for target, text in _texts(node, path, faults):
        try:
            legs.append(_leg(target, name, round(_percent(text) * 100)))
        except ValueError as error:
            faults.add((*path, target), str(error))
    return tuple(legs)


def _routes(fields: Fields, name: str, faults: Faults) -> tuple[Route, ...]:
    node = fields.node("routes")
    if node is None:
        return ()
    return tuple(_route(item, at, name, faults) for at, item in listed(node, (*fields.path, "routes"), faults))


def _route(node: Node, path: Path, name: str, faults: Faults) -> Route:
    fields = Fields(node, path, faults, (*_MATCH_KEYS, "to", "rewrite", "timeout", "retries"))
    to = fields.text("to", "")
    return Route(
        match=HttpMatch(
            path_exact=fields.text("path", ""),
            path_prefix=fields.text("prefix", ""),
            path_regex=fields.text("regex", ""),
            methods=fields.texts("methods"),
            headers=_matches(fields, "headers", faults),
            query=_matches(fields, "query", faults),
        ),
        legs=(_leg(to, name),) if to else (),
        prefix_rewrite=fields.text("rewrite", ""),
        timeout_s=fields.quantity("timeout", duration_s, 0.0),
        retries=_retries(fields, faults),
    )


def _matches(fields: Fields, key: str, faults: Faults) -> tuple[TextMatch, ...]:
    """`NAME: {exact: TEXT}` and the like."""
    node = fields.node(key)
    if node is None:
        return ()
    path = (*fields.path, key)
    found = []
    for name, value in named(node, path, faults):
        one = Fields(value, (*path, name), faults, _FORMS)
        found.append(
            TextMatch(
                name=name,
                exact=one.text("exact", ""),
                prefix=one.text("prefix", ""),
                suffix=one.text("suffix", ""),
                regex=one.text("regex", ""),
                present=one.flag("present", default=False),
                invert=one.flag("not", default=False),
            )
        )
    return tuple(found)


def _retries(fields: Fields, faults: Faults) -> Retries:
    one = _part(fields, "retries", faults, ("attempts", "statuses"))
    if one is None:
        return Retries()
    statuses = one.texts("statuses")
    for status in statuses:
        if not status.isdigit() or not 400 <= int(status) <= 599:
            one.fault("statuses", f"{status[:20]!r} is no status of an error, 400 to 599")
    return Retries(
        attempts=one.integer("attempts", 3),
        connect_failure=True,
        statuses=tuple(int(status) for status in statuses if status.isdigit()),
    )


def _policy(fields: Fields, faults: Faults) -> Policy:
    sticky, limits, outliers = (
        _part(fields, "sticky", faults, ("cookie", "ttl", "header", "source")),
        _part(fields, "limits", faults, ("connections", "pending", "requests")),
        _part(fields, "outliers", faults, ("errors", "interval", "ejection", "percent")),
    )
    usual = Balancing.LEAST_REQUEST if sticky is None else Balancing.RING_HASH
    seen = Outliers()
    return Policy(
        balance=fields.choice("balance", Balancing, usual),
        sticky=Sticky(
            cookie=sticky.text("cookie", ""),
            ttl_s=sticky.quantity("ttl", duration_s, 0.0),
            header=sticky.text("header", ""),
            source=sticky.flag("source", default=False),
        )
        if sticky is not None
        else Sticky(),
        limits=Limits(
            connections=limits.integer("connections", 0),
            pending=limits.integer("pending", 0),
            requests=limits.integer("requests", 0),
        )
        if limits is not None
        else Limits(),
        outliers=Outliers(
            errors=outliers.integer("errors", 5),
            interval_s=outliers.quantity("interval", duration_s, seen.interval_s),
            ejection_s=outliers.quantity("ejection", duration_s, seen.ejection_s),
            percent=round(outliers.quantity("percent", _percent, float(seen.percent))),
        )
        if outliers is not None
        else seen,
        budget_percent=round(fields.quantity("retry_budget", _percent, float(Policy().budget_percent))),
        connect_timeout_s=fields.quantity("connect_timeout", duration_s, Policy().connect_timeout_s),
        node_first=fields.flag("node_first", default=False),
    )


def _mirror(fields: Fields, name: str, faults: Faults) -> Mirror | None:
    one = _part(fields, "mirror", faults, ("to", "percent"))
    if one is None:
        return None
    one.required("to", "shadow")
    return Mirror(to=_leg(one.text("to", ""), name), percent=one.quantity("percent", _percent, 100.0))


def _fault(fields: Fields, faults: Faults) -> HttpFault | None:
    one = _part(fields, "fault", faults, ("delay", "abort", "percent", "header"))
    if one is None:
        return None
    return HttpFault(
        delay_s=one.quantity("delay", duration_s, 0.0),
        abort=one.integer("abort", 0),
        percent=one.quantity("percent", _percent, 100.0),
        header=one.text("header", ""),
    )


def _rate(fields: Fields, faults: Faults) -> RateLimit | None:
    one = _part(fields, "rate", faults, ("requests", "burst"))
    if one is None:
        return None
    one.required("requests", "100")
    return RateLimit(requests=one.integer("requests", 1), burst=one.integer("burst", 0))
