"""Routes as Envoy configuration (JSON form): from a caller's sidecar out, and from a public listener in."""

from outrider.model.traffic import WEIGHT_WHOLE, HttpFault, HttpMatch, RateLimit, Sticky, TextMatch
from sidecar.access_log import MARKER_HEADER, Config
from sidecar.core.resources import InboundRoutes, UpstreamRoutes, local_cluster_name
from sidecar.core.traffic import PairRoute, leg_name
from sidecar.render_listener import FAULT, FILTERS, RATE_LIMIT, TAP, UNREACHED, text_match

_TYPE = "type.googleapis.com/envoy."
_IDEMPOTENT = "GET|HEAD|OPTIONS|PUT|DELETE|TRACE"
_BASE_RETRIES = 3
_ALL: Config = {"default_value": {"numerator": 100}}


def inbound_routes(routes: InboundRoutes) -> Config:
    route: Config = {
        "match": {"prefix": "/"},
        "route": {"cluster": local_cluster_name(routes.service, routes.scope), "timeout": "0s"},
    }
    host: Config = {"name": routes.service, "domains": ["*"], "routes": [route]}
    if routes.rate is not None:
        host["typed_per_filter_config"] = {RATE_LIMIT: _rate_limit(routes.rate)}
    return {
        "name": routes.name,
        "validate_clusters": False,
        # The workload cannot pose as its sidecar.
        "response_headers_to_remove": [MARKER_HEADER],
        "virtual_hosts": [host],
    }


def upstream_routes(routes: UpstreamRoutes) -> Config:
    host: Config = {
        "name": routes.destination,
        "domains": ["*"],
        "routes": [found for route in routes.routes for found in _pair(routes, route)],
    }
    if routes.mirror is not None:
        copies = {"default_value": {"numerator": round(routes.mirror.percent * 10_000), "denominator": "MILLION"}}
        cluster = leg_name(routes.source, routes.mirror.leg, routes.scope)
        host["request_mirror_policies"] = [{"cluster": cluster, "runtime_fraction": copies}]
    woken: Config = {}
    if routes.fault is not None:
        woken[FAULT] = _fault(routes.fault)
    if routes.tapped:
        woken[TAP] = {"@type": _TYPE + "config.route.v3.FilterConfig", "config": {}}
    if woken:
        host["typed_per_filter_config"] = woken
    return {
        "name": routes.name,
        "validate_clusters": False,  # a cluster is there first, and goes last
        "virtual_hosts": [host],
        # After retries have read it: the mark is between sidecars.
        "response_headers_to_remove": [MARKER_HEADER],
    }


def _pair(routes: UpstreamRoutes, route: PairRoute) -> list[Config]:
    """The route for requests that may be sent twice, and the one for those that may not."""
    idempotent = {"name": ":method", "string_match": {"safe_regex": {"regex": _IDEMPOTENT}}}
    match = _match(route.match)
    headers = match.pop("headers", [])
    assert isinstance(headers, list)
    safe = _retries("connect-failure,refused-stream,reset,retriable-headers", {"present_match": True}, route)
    careful = _retries(
        "connect-failure,refused-stream,reset-before-request,retriable-headers",
        {"string_match": {"exact": UNREACHED}},
        route,
    )
    return [
        _route({**match, "headers": [*headers, idempotent]}, routes, route, safe),
        _route({**match, "headers": headers}, routes, route, careful),
    ]


def _match(match: HttpMatch) -> Config:
    config: Config = {"prefix": "/"}
    if match.path_exact:
        config = {"path": match.path_exact}
    elif match.path_prefix:
        config = {"prefix": match.path_prefix}
    elif match.path_regex:
        config = {"safe_regex": {"regex": match.path_regex}}
    config["headers"] = [_header(header) for header in match.headers]
    if match.methods:
        methods = {"safe_regex": {"regex": "|".join(match.methods)}}
        config["headers"] = [*config["headers"], {"name": ":method", "string_match": methods}]  # type: ignore[misc]
    if match.query:
        config["query_parameters"] = [
            {"name": one.name, **({"present_match": True} if one.present else {"string_match": text_match(one)})}
            for one in match.query
        ]
    return config


def _header(header: TextMatch) -> Config:
    match: Config = {"present_match": True} if header.present else {"string_match": text_match(header)}
    return {"name": header.name, **match, **({"invert_match": True} if header.invert else {})}


def _route(match: Config, routes: UpstreamRoutes, route: PairRoute, retries: Config) -> Config:
    action: Config = {"timeout": f"{route.timeout_s:g}s", "retry_policy": retries}
    if len(route.legs) == 1:
        action["cluster"] = leg_name(routes.source, route.legs[0][0], routes.scope)
    else:
        clusters = [
            {"name": leg_name(routes.source, leg, routes.scope), "weight": weight} for leg, weight in route.legs
        ]
        assert sum(weight for _, weight in route.legs) == WEIGHT_WHOLE, "a split was checked when it was compiled"
        action["weighted_clusters"] = {"clusters": clusters}
    if route.prefix_rewrite:
        action["prefix_rewrite"] = route.prefix_rewrite
    if (policy := _hash_policy(route.sticky)) is not None:
        action["hash_policy"] = [policy]
    return {"match": match, "route": action}


def _hash_policy(sticky: Sticky) -> Config | None:
    if sticky.cookie:
        return {"cookie": {"name": sticky.cookie, "path": "/", "ttl": f"{sticky.ttl_s:g}s"}}
    if sticky.header:
        return {"header": {"header_name": sticky.header}}
    return {"connection_properties": {"source_ip": True}} if sticky.source else None


def _retries(retry_on: str, marker: Config, route: PairRoute) -> Config:
    previous = _TYPE + "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    statuses: Config = {}
    if route.retries.statuses:
        retry_on += ",retriable-status-codes"
        statuses = {"retriable_status_codes": list(route.retries.statuses)}
    return {
        "retry_on": retry_on,
        **statuses,
        "retriable_headers": [{"name": MARKER_HEADER, **marker}],
        "num_retries": route.retries.attempts or _BASE_RETRIES,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
        "retry_host_predicate": [{"name": "previous_hosts", "typed_config": {"@type": previous}}],
        # A dead workload's sidecar answers at once, so least request favours it, 3 to 1 of two: ask until another.
        "host_selection_retry_max_attempts": "30",
    }


def _rate_limit(rate: RateLimit) -> Config:
    bucket = {"max_tokens": rate.burst or rate.requests, "tokens_per_fill": rate.requests, "fill_interval": "1s"}
    return {
        "@type": FILTERS[RATE_LIMIT],
        "stat_prefix": RATE_LIMIT,
        "token_bucket": bucket,
        "filter_enabled": _ALL,
        "filter_enforced": _ALL,
    }


def _fault(fault: HttpFault) -> Config:
    share = {"numerator": round(fault.percent * 10_000), "denominator": "MILLION"}
    config: Config = {"@type": FILTERS[FAULT]}
    if fault.delay_s:
        config["delay"] = {"fixed_delay": f"{fault.delay_s:g}s", "percentage": share}
    if fault.abort:
        config["abort"] = {"http_status": fault.abort, "percentage": share}
    if fault.header:
        config["headers"] = [{"name": fault.header, "present_match": True}]
    return config
