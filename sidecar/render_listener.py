"""Listeners, routes and access rules as Envoy configuration (JSON form). Holds no state, sends nothing."""

from outrider.ids import ServiceName
from outrider.model.mesh import Action, spiffe_id
from sidecar.access_log import MARKER_HEADER, Config, inbound_log, outbound_log
from sidecar.core.access import ANYONE, DEFAULT_DENY, AccessRule
from sidecar.core.resources import (
    AccessRules,
    InboundListener,
    OutboundListener,
    UpstreamRoutes,
    is_http,
    leaf_name,
    local_cluster_name,
    outbound_name,
    rules_name,
)

_TYPE = "type.googleapis.com/envoy."
_HTTP_RBAC = _TYPE + "extensions.filters.http.rbac.v3.RBAC"
_TCP_RBAC = _TYPE + "extensions.filters.network.rbac.v3.RBAC"
ADS: Config = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
TLS_PARAMETERS: Config = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}
# Values of MARKER_HEADER on a response that a server's sidecar made itself.
UNREACHED = "unreached"  # the workload never saw the request
INTERRUPTED = "interrupted"  # it may have
_UNREACHED_FLAGS = ["UF", "UH", "UO", "NC"]
_INTERRUPTED_FLAGS = ["UC", "UR", "LR", "URX", "UPE"]
_IDEMPOTENT = "GET|HEAD|OPTIONS|PUT|DELETE|TRACE"


# On public listeners, and so on what they accept: callers on a host that died must not hold connections for ever.
# (level, name, value) of SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT.
_ACCEPTED = ((1, 9, 1), (6, 4, 5), (6, 5, 1), (6, 6, 3), (6, 18, 10_000))


def inbound_listener(listener: InboundListener) -> Config:
    http = is_http(listener.protocol)
    tls: Config = {
        "@type": _TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_params": TLS_PARAMETERS,
            "tls_certificate_sds_secret_configs": [{"name": leaf_name(listener.service), "sds_config": ADS}],
            "validation_context_sds_secret_config": {"name": "roots", "sds_config": ADS},
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
        {"level": level, "name": name, "int_value": value, "state": "STATE_PREBIND"} for level, name, value in _ACCEPTED
    ]
    return {**_listener(listener, chain, "INBOUND"), "socket_options": options}


def outbound_listener(listener: OutboundListener) -> Config:
    filters = _outbound_http(listener) if is_http(listener.protocol) else _outbound_tcp(listener)
    return _listener(listener, {"name": "all", "filters": filters}, "OUTBOUND")


def upstream_routes(routes: UpstreamRoutes) -> Config:
    cluster = outbound_name(routes.source, routes.destination)
    idempotent = {"name": ":method", "string_match": {"safe_regex": {"regex": _IDEMPOTENT}}}
    safe = _retries("connect-failure,refused-stream,reset,retriable-headers", {"present_match": True})
    careful = _retries(
        "connect-failure,refused-stream,reset-before-request,retriable-headers",
        {"string_match": {"exact": UNREACHED}},
    )
    return {
        "name": routes.name,
        "virtual_hosts": [
            {
                "name": routes.destination,
                "domains": ["*"],
                "routes": [
                    _route({"prefix": "/", "headers": [idempotent]}, cluster, safe),
                    _route({"prefix": "/"}, cluster, careful),
                ],
            }
        ],
        # After retries have read it: the mark is between sidecars.
        "response_headers_to_remove": [MARKER_HEADER],
    }


def access_rules(rules: AccessRules) -> Config:
    """An ECDS resource's filter configuration: an ordered list, the first match decides, nothing matched is denied."""
    matchers = [_matcher(rule, rules) for rule in rules.rules]
    tree: Config = {"on_no_match": _verdict(DEFAULT_DENY, Action.DENY)}
    if matchers:
        tree["matcher_list"] = {"matchers": matchers}
    if is_http(rules.protocol):
        return {"@type": _HTTP_RBAC, "matcher": tree}
    return {"@type": _TCP_RBAC, "matcher": tree, "stat_prefix": f"inbound.{rules.service}."}


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
        _discovered_rules(listener.service, _TCP_RBAC),
        {
            "name": "tcp",
            "typed_config": {
                "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"inbound.{listener.service}",
                "cluster": local_cluster_name(listener.service),
                "idle_timeout": "0s",  # idle is the workload's business; keepalive finds dead peers
                "access_log": inbound_log(listener.service, http=False),
            },
        },
    ]


def _outbound_tcp(listener: OutboundListener) -> list[Config]:
    return [
        {
            "name": "tcp",
            "typed_config": {
                "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"outbound.{listener.source}.{listener.destination}",
                "cluster": outbound_name(listener.source, listener.destination),
                "idle_timeout": "0s",
                "max_connect_attempts": 5,
                "access_log": outbound_log(listener.source, listener.destination, http=False),
            },
        }
    ]


def _inbound_http(listener: InboundListener) -> list[Config]:
    service = listener.service
    route = {"match": {"prefix": "/"}, "route": {"cluster": local_cluster_name(service), "timeout": "0s"}}
    return [
        _http_manager(
            f"inbound.{service}",
            {
                "route_config": {
                    "name": f"inbound/{service}",
                    "validate_clusters": False,
                    # The workload cannot pose as its sidecar.
                    "response_headers_to_remove": [MARKER_HEADER],
                    "virtual_hosts": [{"name": service, "domains": ["*"], "routes": [route]}],
                },
                "http_filters": [_discovered_rules(service, _HTTP_RBAC), _router()],
                # Who calls, proven by the certificate, replaces whatever the caller wrote there.
                "forward_client_cert_details": "SANITIZE_SET",
                "set_current_client_cert_details": {"uri": True},
                # A caller's x-envoy-* headers must not steer this side's router.
                "use_remote_address": True,
                "skip_xff_append": True,
                "local_reply_config": {"mappers": _inbound_replies(service)},
                "access_log": inbound_log(service, http=True),
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
    return [
        forbidden,
        marked(_UNREACHED_FLAGS, UNREACHED, f"outrider: the workload of service {service} is not reachable\n"),
        marked(_INTERRUPTED_FLAGS, INTERRUPTED, f"outrider: the workload of service {service} broke off the request\n"),
    ]


def _outbound_http(listener: OutboundListener) -> list[Config]:
    source, destination = listener.source, listener.destination
    nobody: Config = {
        "filter": {"response_flag_filter": {"flags": ["UH"]}},
        "body_format_override": _text(f"outrider: service {destination} has no healthy endpoint\n"),
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
            f"outbound.{source}.{destination}",
            {
                "rds": {"route_config_name": outbound_name(source, destination), "config_source": ADS},
                "http_filters": [_router()],
                "local_reply_config": {"mappers": [nobody, unreachable]},
                "access_log": outbound_log(source, destination, http=True),
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
        "preserve_external_request_id": True,  # one id in the logs of both sides
        "server_header_transformation": "PASS_THROUGH",
        **more,
    }
    return {"name": "http", "typed_config": manager}


def _router() -> Config:
    router = {"@type": _TYPE + "extensions.filters.http.router.v3.Router", "suppress_envoy_headers": True}
    return {"name": "router", "typed_config": router}


def _discovered_rules(service: ServiceName, filter_type: str) -> Config:
    """A filter that comes by ECDS. Until it has come, and without it, nothing passes."""
    return {"name": rules_name(service), "config_discovery": {"config_source": ADS, "type_urls": [filter_type]}}


def _route(match: Config, cluster: str, retries: Config) -> Config:
    return {"match": match, "route": {"cluster": cluster, "timeout": "0s", "retry_policy": retries}}


def _retries(retry_on: str, marker: Config) -> Config:
    previous = _TYPE + "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    return {
        "retry_on": retry_on,
        "retriable_headers": [{"name": MARKER_HEADER, **marker}],
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
        "retry_host_predicate": [{"name": "previous_hosts", "typed_config": {"@type": previous}}],
        # A dead workload's sidecar answers at once, so least request favours it, 3 to 1 of two: ask until another.
        "host_selection_retry_max_attempts": "30",
    }


def _matcher(rule: AccessRule, rules: AccessRules) -> Config:
    if rule.source == ANYONE:
        # Any service; not Consul's own agents, whose certificates the same authority signs. One name, so no comma.
        anyone = spiffe_id(rules.trust_domain, rules.datacenter, ServiceName("")).replace(".", r"\.")
        match: Config = {"safe_regex": {"google_re2": {}, "regex": anyone + "[a-z0-9-]+"}}
    else:
        match = {"exact": rule.source}
    san = {"@type": _TYPE + "extensions.matching.common_inputs.ssl.v3.UriSanInput"}
    predicate = {"single_predicate": {"input": {"name": "uri_san", "typed_config": san}, "value_match": match}}
    return {"predicate": predicate, "on_match": _verdict(rule.name, rule.action)}


def _verdict(name: str, action: Action) -> Config:
    verdict = {"@type": _TYPE + "config.rbac.v3.Action", "name": name, "action": action.value.upper()}
    return {"action": {"name": "verdict", "typed_config": verdict}}


def _text(text: str) -> Config:
    return {"text_format_source": {"inline_string": text}, "content_type": "text/plain; charset=utf-8"}


def _runtime(value: int) -> Config:
    # Envoy wants a runtime key beside the value; nothing sets it.
    return {"default_value": value, "runtime_key": "outrider.unused"}
