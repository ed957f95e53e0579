"""Listeners, routes and access rules as Envoy configuration (JSON form). Holds no state, sends nothing."""

import re

from outrider.ids import ServiceName
from outrider.model.mesh import Action, spiffe_id
from outrider.model.traffic import HttpMatch, TextMatch
from sidecar.access_log import MARKER_HEADER, Config, inbound_log, outbound_log
from sidecar.core.access import ANYONE, DEFAULT_DENY, AccessRule
from sidecar.core.resources import (
    ROOTS,
    AccessRules,
    InboundListener,
    OutboundListener,
    inbound_name,
    is_http,
    leaf_name,
    local_cluster_name,
    outbound_name,
    rules_name,
)
from sidecar.core.scope import figures_scope
from sidecar.render_traces import tracing

_TYPE = "type.googleapis.com/envoy."
_HTTP_RBAC = _TYPE + "extensions.filters.http.rbac.v3.RBAC"
_TCP_RBAC = _TYPE + "extensions.filters.network.rbac.v3.RBAC"
ADS: Config = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
TLS_PARAMETERS: Config = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}
RATE_LIMIT, FAULT, TAP = "rate_limit", "fault", "tap"
FILTERS = {
    RATE_LIMIT: _TYPE + "extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
    FAULT: _TYPE + "extensions.filters.http.fault.v3.HTTPFault",
    TAP: _TYPE + "extensions.filters.http.tap.v3.Tap",
}
_IDLE: dict[str, Config] = {RATE_LIMIT: {"stat_prefix": RATE_LIMIT}, FAULT: {}}
# Values of MARKER_HEADER on a response that a server's sidecar made itself.
UNREACHED = "unreached"  # the workload never saw the request
INTERRUPTED = "interrupted"  # it may have
_UNREACHED_FLAGS = ["UF", "UH", "UO", "NC"]
_INTERRUPTED_FLAGS = ["UC", "UR", "LR", "URX", "UPE"]
_AMBIGUOUS = r"[^?]*(?://|%2[fF]|%5[cC]|%00)[^?]*(?:\?.*)?"
_QUERY = r"(?:\?.*)?"


# On public listeners, and so on what they accept: callers on a host that died must not hold connections for ever.
# (level, name, value) of SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT.
ACCEPTED = ((1, 9, 1), (6, 4, 5), (6, 5, 1), (6, 6, 3), (6, 18, 10_000))


def inbound_listener(listener: InboundListener) -> Config:
    http = is_http(listener.protocol)
    tls: Config = {
        "@type": _TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_params": TLS_PARAMETERS,
            "tls_certificate_sds_secret_configs": [
                {"name": leaf_name(listener.service, listener.scope), "sds_config": ADS}
            ],
            "validation_context_sds_secret_config": {"name": listener.scope + ROOTS, "sds_config": ADS},
            **({"alpn_protocols": ["h2", "http/1.1"]} if http else {}),
        },
    }
    chain: Config = {
        # Another revision is another chain: Envoy drains the old one, and with it what a revocation forbids.
        "name": f"revision {listener.revision}",
        "transport_socket": {"name": "tls", "typed_config": tls},
        "filters": _inbound_http(listener) if http else _inbound_tcp(listener),
    }
    options = [
        {"level": level, "name": name, "int_value": value, "state": "STATE_PREBIND"} for level, name, value in ACCEPTED
    ]
    return {**_listener(listener, chain, "INBOUND"), "socket_options": options}


def outbound_listener(listener: OutboundListener) -> Config:
    filters = _outbound_http(listener) if is_http(listener.protocol) else _outbound_tcp(listener)
    return _listener(listener, {"name": "all", "filters": filters}, "OUTBOUND")


def access_rules(rules: AccessRules) -> Config:
    """An ECDS resource's filter configuration: an ordered list, the first match decides, nothing matched is denied."""
    matchers = [matcher for rule in rules.rules for matcher in _matchers(rule, rules)]
    tree: Config = {"on_no_match": _verdict(DEFAULT_DENY, Action.DENY)}
    if matchers:
        tree["matcher_list"] = {"matchers": matchers}
    if is_http(rules.protocol):
        return {"@type": _HTTP_RBAC, "matcher": tree}
    return {"@type": _TCP_RBAC, "matcher": tree, "stat_prefix": f"{figures_scope(rules.scope)}inbound.{rules.service}."}


def _listener(listener: InboundListener | OutboundListener, chain: Config, direction: str) -> Config:
    return {
        "name": listener.name,
        "address": {"socket_address": {"address": listener.address, "port_value": listener.port}},
        "filter_chains": [chain],
        "traffic_direction": direction,
        # A drained sidecar's workload still calls out until it ends.
        "drain_type": "DEFAULT" if direction == "INBOUND" else "MODIFY_ONLY",
        "enable_reuse_port": False,
        "stat_prefix": listener.name,
    }


def _inbound_tcp(listener: InboundListener) -> list[Config]:
    return [
        _discovered_rules(listener, _TCP_RBAC),
        {
            "name": "tcp",
            "typed_config": {
                "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"{figures_scope(listener.scope)}inbound.{listener.service}",
                "cluster": local_cluster_name(listener.service, listener.scope),
                "idle_timeout": "0s",  # idle is the workload's business; keepalive finds dead peers
                "access_log": inbound_log(listener.service, http=False, scope=listener.scope),
            },
        },
    ]


def _outbound_tcp(listener: OutboundListener) -> list[Config]:
    return [
        {
            "name": "tcp",
            "typed_config": {
                "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"{figures_scope(listener.scope)}outbound.{listener.source}.{listener.destination}",
                "cluster": outbound_name(listener.source, listener.destination, listener.scope),
                "idle_timeout": "0s",
                "max_connect_attempts": 5,
                "access_log": outbound_log(listener.source, listener.destination, http=False, scope=listener.scope),
            },
        }
    ]


def _inbound_http(listener: InboundListener) -> list[Config]:
    service, scope = listener.service, listener.scope
    return [
        _http_manager(
            f"{figures_scope(scope)}inbound.{service}",
            {
                "rds": {"route_config_name": inbound_name(service, scope), "config_source": ADS},
                "http_filters": [_discovered_rules(listener, _HTTP_RBAC), dormant(RATE_LIMIT), router()],
                # Who calls, proven by the certificate, replaces whatever the caller wrote there.
                "forward_client_cert_details": "SANITIZE_SET",
                "set_current_client_cert_details": {"uri": True},
                # A caller's x-envoy-* headers must not steer this side's router.
                "use_remote_address": True,
                "skip_xff_append": True,
                "local_reply_config": {"mappers": _inbound_replies(service)},
                **tracing(service, listener.traced_percent, scope),
                "access_log": inbound_log(service, http=True, scope=scope),
            },
        )
    ]


def _inbound_replies(service: ServiceName) -> list[Config]:
    def marked(flags: list[str], mark: str, text: str) -> Config:
        header = {"header": {"key": MARKER_HEADER, "value": mark}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        return {
            "filter": {"response_flag_filter": {"flags": flags}},
            "headers_to_add": [header],
            "body_format_override": _text(text),
        }

    forbidden: Config = {
        "filter": {"status_code_filter": {"comparison": {"op": "EQ", "value": _runtime(403)}}},
        "body_format_override": _text(
            f"outrider: %DOWNSTREAM_PEER_URI_SAN% may not call service {service}: %RESPONSE_CODE_DETAILS%\n"
        ),
    }
    limited: Config = {
        "filter": {"status_code_filter": {"comparison": {"op": "EQ", "value": _runtime(429)}}},
        "body_format_override": _text(f"outrider: an instance of service {service} takes no more requests a second\n"),
    }
    return [
        forbidden,
        limited,
        marked(_UNREACHED_FLAGS, UNREACHED, f"outrider: the workload of service {service} is not reachable\n"),
        marked(_INTERRUPTED_FLAGS, INTERRUPTED, f"outrider: the workload of service {service} broke off the request\n"),
    ]


def _outbound_http(listener: OutboundListener) -> list[Config]:
    source, destination, scope = listener.source, listener.destination, listener.scope
    nobody: Config = {
        "filter": {"response_flag_filter": {"flags": ["UH"]}},
        "body_format_override": _text(f"outrider: service {destination} has no healthy endpoint\n"),
    }
    full: Config = {
        "filter": {"response_flag_filter": {"flags": ["UO"]}},
        "body_format_override": _text(
            f"outrider: as many calls of service {destination} are under way as its `limits` allow\n"
        ),
    }
    late: Config = {
        "filter": {"response_flag_filter": {"flags": ["UT"]}},
        "body_format_override": _text(f"outrider: service {destination} took longer than its `timeout` allows\n"),
    }
    broken: Config = {
        "filter": {"response_flag_filter": {"flags": ["FI"]}},
        "body_format_override": _text(f"outrider: a `fault` made on purpose for calls of service {destination}\n"),
    }
    unreachable: Config = {
        "filter": {"response_flag_filter": {"flags": ["UF", "UC", "UR", "URX", "NC"]}},
        "body_format_override": _text(
            f"outrider: no endpoint of service {destination} answered: "
            "%RESPONSE_CODE_DETAILS% %UPSTREAM_TRANSPORT_FAILURE_REASON%\n"
        ),
    }
    return [
        _http_manager(
            f"{figures_scope(scope)}outbound.{source}.{destination}",
            {
                "rds": {"route_config_name": outbound_name(source, destination, scope), "config_source": ADS},
                "http_filters": [_tap(listener), dormant(FAULT), router()],
                "local_reply_config": {"mappers": [nobody, full, late, broken, unreachable]},
                **tracing(source, listener.traced_percent, scope),
                "access_log": outbound_log(source, destination, http=True, scope=scope),
            },
        )
    ]


def _http_manager(stat_prefix: str, more: Config) -> Config:
    manager: Config = {
        "@type": _TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": stat_prefix,
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",  # how long an answer may take is for the workloads to say
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "normalize_path": True,  # rules and routes see what the workload sees
        "preserve_external_request_id": True,  # one id in the logs of both sides
        "server_header_transformation": "PASS_THROUGH",
        **more,
    }
    return {"name": "http", "typed_config": manager}


def dormant(name: str, config: Config | None = None) -> Config:
    """A filter that costs nothing until a route wakes it: listeners never change."""
    return {"name": name, "disabled": True, "typed_config": {"@type": FILTERS[name], **(config or _IDLE[name])}}


def tap_id(source: ServiceName, destination: ServiceName, scope: str = "") -> str:
    """By which Envoy's admin interface knows the tap of a pair."""
    return f"{scope}{source}/{destination}"


def _tap(listener: OutboundListener) -> Config:
    admin = {"admin_config": {"config_id": tap_id(listener.source, listener.destination, listener.scope)}}
    return dormant(TAP, {"common_config": admin, "record_headers_received_time": True})


def router() -> Config:
    router = {"@type": _TYPE + "extensions.filters.http.router.v3.Router", "suppress_envoy_headers": True}
    return {"name": "router", "typed_config": router}


def _discovered_rules(listener: InboundListener, filter_type: str) -> Config:
    """A filter that comes by ECDS. Until it has come, and without it, nothing passes."""
    name = rules_name(listener.service, listener.scope)
    return {"name": name, "config_discovery": {"config_source": ADS, "type_urls": [filter_type]}}


def _matchers(rule: AccessRule, rules: AccessRules) -> list[Config]:
    """In order: the rule's permissions, and what is left to its action."""
    source = _source(rule, rules)
    if not rule.permissions or not is_http(rules.protocol):
        return [{"predicate": source, "on_match": _verdict(rule.name, rule.action)}]
    # What a prefix or an exact path means must not hang on who reads it: such paths are for nobody.
    ambiguous: Config = {"single_predicate": {"input": _header(":path"), "value_match": _regex(_AMBIGUOUS)}}
    found: list[Config] = [
        {"predicate": _all(source, ambiguous), "on_match": _verdict(f"{rule.name} ambiguous path", Action.DENY)}
    ]
    for permission in rule.permissions:
        action = Action(permission.action.value)
        predicate = _all(source, *_request(permission.match))
        found.append({"predicate": predicate, "on_match": _verdict(rule.name, action)})
    return [*found, {"predicate": source, "on_match": _verdict(rule.name, rule.action)}]


def _source(rule: AccessRule, rules: AccessRules) -> Config:
    if rule.source == ANYONE:
        # Any service; not Consul's own agents, whose certificates the same authority signs. One name, so no comma.
        anyone = spiffe_id(rules.trust_domain, rules.datacenter, ServiceName("")).replace(".", r"\.")
        match = _regex(anyone + "[a-z0-9-]+")
    else:
        match = {"exact": rule.source}
    san = {"@type": _TYPE + "extensions.matching.common_inputs.ssl.v3.UriSanInput"}
    return {"single_predicate": {"input": {"name": "uri_san", "typed_config": san}, "value_match": match}}


def _request(match: HttpMatch) -> list[Config]:
    """What a request must be like. Envoy's `:path` has the query; permissions look at the path alone."""
    found: list[Config] = []
    if match.path_exact:
        found.append(_text_predicate(":path", _regex(_escaped(match.path_exact) + _QUERY)))
    if match.path_prefix:
        found.append(_text_predicate(":path", {"prefix": match.path_prefix}))
    if match.path_regex:
        found.append(_text_predicate(":path", _regex(f"(?:{match.path_regex}){_QUERY}")))
    if match.methods:
        found.append(_text_predicate(":method", _regex("|".join(match.methods))))
    for header in match.headers:
        predicate = _text_predicate(header.name.lower(), text_match(header))
        found.append({"not_matcher": predicate} if header.invert else predicate)
    return found


def text_match(text: TextMatch) -> Config:
    """Envoy's StringMatcher; a value that is only to be there matches anything."""
    if text.exact:
        return {"exact": text.exact}
    if text.prefix:
        return {"prefix": text.prefix}
    if text.suffix:
        return {"suffix": text.suffix}
    return _regex(text.regex or ".*")


def _text_predicate(header: str, match: Config) -> Config:
    return {"single_predicate": {"input": _header(header), "value_match": match}}


def _header(name: str) -> Config:
    config = {"@type": _TYPE + "type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": name}
    return {"name": name, "typed_config": config}


def _all(*predicates: Config) -> Config:
    return predicates[0] if len(predicates) == 1 else {"and_matcher": {"predicate": list(predicates)}}


def _regex(regex: str) -> Config:
    return {"safe_regex": {"google_re2": {}, "regex": regex}}


def _escaped(text: str) -> str:
    return re.sub(r"([^A-Za-z0-9/_-])", r"\\\1", text)


def _verdict(name: str, action: Action) -> Config:
    verdict = {"@type": _TYPE + "config.rbac.v3.Action", "name": name, "action": action.value.upper()}
    return {"action": {"name": "verdict", "typed_config": verdict}}


def _text(text: str) -> Config:
    return {"text_format_source": {"inline_string": text}, "content_type": "text/plain; charset=utf-8"}


def _runtime(value: int) -> Config:
    # Envoy wants a runtime key beside the value; nothing sets it.
    return {"default_value": value, "runtime_key": "outrider.unused"}
