"""How calls of a service are routed, balanced, limited and broken: the job file's and the sidecars' values."""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

WEIGHT_WHOLE = 10_000  # weights are in hundredths of a percent, as Consul's splitters count


class TrafficValue(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every value here: frozen, compared by content, defaults left out on the wire."""


class Verdict(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class Balancing(StrEnum):
    LEAST_REQUEST = "least-request"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    RING_HASH = "ring-hash"
    MAGLEV = "maglev"


class TextMatch(TrafficValue, frozen=True, kw_only=True):
    """A header or a query parameter: one of the forms is set."""

    name: str
    exact: str = ""
    prefix: str = ""
    suffix: str = ""
    regex: str = ""
    present: bool = False
    invert: bool = False


class HttpMatch(TrafficValue, frozen=True, kw_only=True):
    """What a request must be like; all of it. Of the paths one is set, or none: every path."""

    path_exact: str = ""
    path_prefix: str = ""
    path_regex: str = ""
    methods: tuple[str, ...] = ()
    headers: tuple[TextMatch, ...] = ()
    query: tuple[TextMatch, ...] = ()


class Permission(TrafficValue, frozen=True, kw_only=True):
    """One rule of an intention for HTTP; the first that matches decides, and none that does denies."""

    action: Verdict
    match: HttpMatch


class Leg(TrafficValue, frozen=True, kw_only=True):
    """A share of the calls: to a service, or to those of its instances that a subset names."""

    service: str
    subset: str = ""
    weight: int = WEIGHT_WHOLE


class Retries(TrafficValue, frozen=True, kw_only=True):
    attempts: int = 0  # 0: not said; sidecars retry what is safe to retry, up to 3 times
    connect_failure: bool = False
    statuses: tuple[int, ...] = ()


class Route(TrafficValue, frozen=True, kw_only=True):
    """The first one that matches decides."""

    match: HttpMatch = HttpMatch()
    legs: tuple[Leg, ...] = ()
    prefix_rewrite: str = ""
    timeout_s: float = 0.0  # 0: none
    retries: Retries = Retries()


class Subset(TrafficValue, frozen=True, kw_only=True):
    """The instances whose service has all of `meta`."""

    name: str
    meta: Mapping[str, str] = {}


class Failover(TrafficValue, frozen=True, kw_only=True):
    """Where calls of a subset ("" for all) go while it has no healthy instance, in order."""

    subset: str = ""
    to: tuple[Leg, ...] = ()


class Sticky(TrafficValue, frozen=True, kw_only=True):
    """What a caller is recognised by, so that it meets the same instance again: exactly one of them."""

    cookie: str = ""
    ttl_s: float = 0.0  # of the cookie; 0: of the browser's session
    header: str = ""
    source: bool = False  # the connection's address


class Limits(TrafficValue, frozen=True, kw_only=True):
    """Of each calling sidecar; 0: none. What is beyond them is refused at once."""

    connections: int = 0
    pending: int = 0
    requests: int = 0


class Outliers(TrafficValue, frozen=True, kw_only=True):
    """An instance that answers so many errors (5xx) in a row is left alone for a while."""

    errors: int = 0  # 0: answers are not looked at, only whether there are any
    interval_s: float = 1.0
    ejection_s: float = 2.0
    percent: int = 50  # of the instances, at most


class Policy(TrafficValue, frozen=True, kw_only=True):
    """How a caller's sidecar treats one called service."""

    balance: Balancing = Balancing.LEAST_REQUEST
    sticky: Sticky = Sticky()
    limits: Limits = Limits()
    outliers: Outliers = Outliers()
    budget_percent: int = 50  # of the requests under way, that may be retries
    connect_timeout_s: float = 0.25
    node_first: bool = False  # instances on the caller's node first, the others when there is none


class Mirror(TrafficValue, frozen=True, kw_only=True):
    """A copy of so many requests, whose answers nobody sees."""

    to: Leg
    percent: float = 100.0


class HttpFault(TrafficValue, frozen=True, kw_only=True):
    """Trouble made on purpose, on the caller's side; of requests with `header` alone, where one is given."""

    delay_s: float = 0.0
    abort: int = 0  # the status answered instead; 0: none
    percent: float = 100.0
    header: str = ""


class RateLimit(TrafficValue, frozen=True, kw_only=True):
    """What one instance takes; more is answered with 429 by its sidecar."""

    requests: int  # a second
    burst: int = 0  # 0: as many as a second's


class ServiceTraffic(TrafficValue, frozen=True, kw_only=True):
    """What a caller's sidecar needs to know of a service, compiled from its config entries."""

    routes: tuple[Route, ...] = ()  # () : all to `target`
    target: Leg | None = None  # None: the service itself
    policy: Policy = Policy()
    failovers: tuple[Failover, ...] = ()
    mirror: Mirror | None = None
    fault: HttpFault | None = None


class Traffic(TrafficValue, frozen=True, kw_only=True):
    """`traffic:` of a service in a job file: what its config entries come from."""

    subsets: tuple[Subset, ...] = ()
    default_subset: str = ""
    split: tuple[Leg, ...] = ()
    routes: tuple[Route, ...] = ()
    failover: tuple[Leg, ...] = ()
    timeout_s: float = 0.0
    retries: Retries = Retries()
    policy: Policy = Policy()
    mirror: Mirror | None = None
    fault: HttpFault | None = None
    rate: RateLimit | None = None
