"""A gateway's listeners and routes as Envoy configuration (JSON form). Nobody outside is trusted."""

from itertools import groupby

from outrider.model.gateway import GatewayRoute
from sidecar.access_log import Config, gateway_log
from sidecar.core.gateway import GatewayCluster, GatewayListener, GatewayRoutes, gateway_cluster
from sidecar.render_listener import ACCEPTED, ADS, TLS_PARAMETERS, router
from sidecar.render_traces import tracing

_TYPE = "type.googleapis.com/envoy."
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_BUFFER_BYTES = 256 * 1024
_HANDSHAKE_S = 5
_NOBODY = "outrider: this gateway has no route for the host and path that were asked for\n"


def gateway_listener(listener: GatewayListener) -> Config:
    filters = [_connections(listener) if listener.to is not None else _requests(listener)]
    chain: Config = {"name": "all", "filters": filters, "transport_socket_connect_timeout": f"{_HANDSHAKE_S}s"}
    if listener.secret:
        tls: Config = {
            "@type": _TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "tls_params": TLS_PARAMETERS,
                "tls_certificate_sds_secret_configs": [{"name": listener.secret, "sds_config": ADS}],
                **({} if listener.to is not None else {"alpn_protocols": ["h2", "http/1.1"]}),
            },
        }
        chain["transport_socket"] = {"name": "tls", "typed_config": tls}
    return {
        "name": listener.name,
        "address": {"socket_address": {"address": listener.address, "port_value": listener.port}},
        "filter_chains": [chain],
        "traffic_direction": "INBOUND",
        "enable_reuse_port": False,
        "stat_prefix": listener.name,
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "socket_options": [
            {"level": level, "name": name, "int_value": value, "state": "STATE_PREBIND"}
            for level, name, value in ACCEPTED
        ],
    }


def gateway_routes(routes: GatewayRoutes) -> Config:
    hosts = groupby(routes.routes, key=lambda route: route.host)
    found = [_host(host, [_route(route) for route in of_host]) for host, of_host in hosts]
    if not any(route.host == "*" for route in routes.routes):
        found.append(_host("*", []))
    return {
        "name": routes.name,
        "validate_clusters": False,
        "virtual_hosts": found,
        "ignore_port_in_host_matching": True,
    }


def gateway_way(cluster: GatewayCluster) -> Config:
    address = {"socket_address": {"address": cluster.address, "port_value": cluster.port}}
    limit = 1 << 20  # how much a service takes is said by its own limits, one listener further on
    return {
        "name": cluster.name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {
            "thresholds": [{"max_connections": limit, "max_pending_requests": limit, "max_requests": limit}]
        },
        # HTTP/2 where the caller speaks it: gRPC needs its trailers.
        "typed_extension_protocol_options": {
            _OPTIONS: {
                "@type": "type.googleapis.com/" + _OPTIONS,
                "use_downstream_protocol_config": {
                    "http_protocol_options": {},
                    "http2_protocol_options": {"allow_connect": True},
                },
            }
        },
        "load_assignment": {
            "cluster_name": cluster.name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def _connections(listener: GatewayListener) -> Config:
    assert listener.to is not None
    proxy = {
        "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": listener.name,
        "cluster": gateway_cluster(listener.to),
        "idle_timeout": "0s",
        "access_log": gateway_log(listener.service, http=False),
    }
    return {"name": "tcp", "typed_config": proxy}


def _requests(listener: GatewayListener) -> Config:
    manager: Config = {
        "@type": _TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": listener.name,
        "codec_type": "AUTO",
        "rds": {"route_config_name": listener.name, "config_source": ADS},
        "http_filters": [router()],
        # The address that was seen, not the one that the caller claims, is what comes last in x-forwarded-for.
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT",
        # One that says little, and slowly, holds nothing for long.
        "request_headers_timeout": "10s",
        "stream_idle_timeout": "300s",
        "common_http_protocol_options": {
            "idle_timeout": "3600s",
            "max_headers_count": 100,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {
            "allow_connect": True,
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 65_536,
            "initial_connection_window_size": 1 << 20,
        },
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "server_header_transformation": "PASS_THROUGH",
        **tracing(listener.service, listener.traced_percent),
        "access_log": gateway_log(listener.service, http=True),
    }
    return {"name": "http", "typed_config": manager}


def _host(host: str, routes: list[Config]) -> Config:
    answer = {"status": 404, "body": {"inline_string": _NOBODY}}
    return {
        "name": host,
        "domains": [host],
        "routes": [*routes, {"match": {"prefix": "/"}, "direct_response": answer}],
    }


def _route(route: GatewayRoute) -> Config:
    return {
        "match": {"prefix": route.prefix},
        # How long an answer may take is said by the service's own `timeout`.
        "route": {"cluster": gateway_cluster(route.to), "timeout": "0s"},
    }
