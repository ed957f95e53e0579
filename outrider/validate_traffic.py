"""What is wrong with a service's `traffic:`, whoever wrote it. Pure."""

import re
from collections.abc import Iterator

from outrider.ids import is_name
from outrider.model.job import Protocol, Service
from outrider.model.patterns import fault as regex_fault
from outrider.model.traffic import WEIGHT_WHOLE, HttpMatch, Leg, Policy, Sticky, Traffic

Finding = tuple[tuple[str | int, ...], str]
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_META_BYTES_MAX = 512  # Consul's, of a value in an entry's Meta


def traffic_findings(service: Service) -> Iterator[Finding]:
    """(path below the service, message)."""
    for key, value in service.meta.items():
        if key.startswith("outrider-") or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key) or len(value) > _META_BYTES_MAX:
            yield ("meta", key), "letters, digits, - and _, not beginning with outrider-; values up to 512 characters"
    traffic = service.traffic
    if traffic is None:
        return
    if service.port is None:
        yield ("traffic",), "a service without a port is never called; give it a port"
    if service.protocol is Protocol.TCP:
        for key in ("split", "routes", "timeout_s", "mirror", "fault", "rate"):
            if getattr(traffic, key):
                yield (
                    ("traffic", key.removesuffix("_s")),
                    "is for requests, and the protocol is tcp; say `protocol: http`",
                )
    yield from _targets(service.name, traffic)
    total = sum(leg.weight for leg in traffic.split)
    if traffic.split and total != WEIGHT_WHOLE:
        yield ("traffic", "split"), f"the shares add up to {total / 100:g} %, not to 100 %"
    yield from _routes(traffic)
    yield from _policy(traffic.policy)
    yield from _trouble(traffic)


def _targets(service: str, traffic: Traffic) -> Iterator[Finding]:
    names = {subset.name for subset in traffic.subsets}
    for at, leg in _legs(traffic):
        if not is_name(leg.service):
            yield ("traffic", *at), f"{leg.service!r} is not the name of a service"
        elif leg.subset and leg.service == service and leg.subset not in names:
            known = ", ".join(sorted(names)) or "none"
            yield ("traffic", *at), f"the service has no subset {leg.subset!r}; known: {known}"
    if traffic.default_subset and traffic.default_subset not in names:
        yield ("traffic", "default_subset"), f"the service has no subset {traffic.default_subset!r}"


def _legs(traffic: Traffic) -> Iterator[tuple[tuple[str | int, ...], Leg]]:
    for leg in traffic.split:
        yield ("split",), leg
    for leg in traffic.failover:
        yield ("failover",), leg
    for index, route in enumerate(traffic.routes):
        for leg in route.legs:
            yield ("routes", index, "to"), leg
    if traffic.mirror is not None:
        yield ("mirror", "to"), traffic.mirror.to


def _routes(traffic: Traffic) -> Iterator[Finding]:
    if len(traffic.failover) > 1:
        yield ("traffic", "failover"), "Consul keeps one service to stand in; name one"
    seen: list[HttpMatch] = []
    for index, route in enumerate(traffic.routes):
        at: tuple[str | int, ...] = ("traffic", "routes", index)
        match = route.match
        if sum(map(bool, (match.path_exact, match.path_prefix, match.path_regex))) > 1:
            yield at, "give one of path, prefix and regex"
        for path in (match.path_exact, match.path_prefix):
            if path and not path.startswith("/"):
                yield at, f"{path[:80]!r}: a path begins with /"
        for text in (match.path_regex, *(one.regex for one in (*match.headers, *match.query))):
            if text and (why := regex_fault(text)):
                yield at, f"{text[:80]!r} is no regular expression: {why}"
        for name in (one.name for one in match.headers):
            if not _HEADER.fullmatch(name):
                yield at, f"{name[:80]!r} is not the name of a header"
        for number, earlier in enumerate(seen):
            if _covers(earlier, match):
                yield at, f"is never taken: routes[{number}] takes all that it matches; put it before that one"
                break
        seen.append(match)


def _covers(first: HttpMatch, second: HttpMatch) -> bool:
    """Whether `first` surely matches whatever `second` does."""
    if first == second:
        return True
    if first.methods or first.headers or first.query or first.path_regex or first.path_exact:
        return False
    path = second.path_exact or second.path_prefix
    return first.path_prefix in ("", "/") or path.startswith(first.path_prefix)


def _policy(policy: Policy) -> Iterator[Finding]:
    sticky = policy.sticky
    if sticky != Sticky():
        if sum(map(bool, (sticky.cookie, sticky.header, sticky.source))) != 1:
            yield ("traffic", "sticky"), "expected exactly one of cookie, header and source"
        if policy.balance.value not in ("ring-hash", "maglev"):
            yield ("traffic", "balance"), "sticky needs ring-hash or maglev; leave balance out"
    for key in ("connections", "pending", "requests"):
        if not 0 <= getattr(policy.limits, key) <= 1_000_000:
            yield ("traffic", "limits", key), "expected 0 to 1000000"
    if not 0 <= policy.budget_percent <= 100:
        yield ("traffic", "retry_budget"), "expected 0 to 100 %"
    if not 0 <= policy.outliers.percent <= 100:
        yield ("traffic", "outliers", "percent"), "expected 0 to 100 %"
    if not 0 < policy.connect_timeout_s <= 60:
        yield ("traffic", "connect_timeout"), "expected more than 0, up to 1m"


def _trouble(traffic: Traffic) -> Iterator[Finding]:
    if not 0 <= traffic.retries.attempts <= 10:
        yield ("traffic", "retries", "attempts"), "expected 0 to 10"
    if traffic.mirror is not None and not 0 < traffic.mirror.percent <= 100:
        yield ("traffic", "mirror", "percent"), "expected more than 0, up to 100 %"
    fault = traffic.fault
    if fault is not None:
        if not (fault.delay_s or fault.abort):
            yield ("traffic", "fault"), "expected delay or abort"
        if fault.abort and not 200 <= fault.abort <= 599:
            yield ("traffic", "fault", "abort"), "expected a status, 200 to 599"
        if not 0 < fault.percent <= 100:
            yield ("traffic", "fault", "percent"), "expected more than 0, up to 100 %"
    if traffic.rate is not None and not 1 <= traffic.rate.requests <= 10_000_000:
        yield ("traffic", "rate", "requests"), "expected 1 to 10000000"
