"""Plain resource values as Envoy's protobuf messages, with a hash of the content as version.

Each content is encoded once and shared by all sidecars. Owns clusters, endpoints and secrets; listeners, routes and
rules are next door. Sends nothing.
"""

import hashlib
from functools import lru_cache
from typing import assert_never

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import extension_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.config.trace.v3 import opentelemetry_pb2
from envoy.extensions.access_loggers.filters.cel.v3 import cel_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2
from envoy.extensions.filters.common.fault.v3 import fault_pb2 as common_fault_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as http_rbac_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.http.tap.v3 import tap_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as tcp_rbac_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.matching.common_inputs.ssl.v3 import ssl_inputs_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.extensions.tracers.opentelemetry.samplers.v3 import (
    parent_based_sampler_pb2,
    trace_id_ratio_based_sampler_pb2,
)
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.type.matcher.v3 import http_inputs_pb2
from google.protobuf import json_format
from google.protobuf.message import Message

from outrider.model.job import Protocol
from outrider.model.traffic import Balancing, Limits, Outliers
from sidecar.access_log import Config
from sidecar.core.external import ExternalCluster, ExternalListener
from sidecar.core.gateway import GatewayCertificate, GatewayCluster, GatewayListener, GatewayRoutes
from sidecar.core.resources import (
    ROOTS,
    AccessRules,
    EndpointSet,
    InboundListener,
    InboundRoutes,
    Kind,
    LeafSecret,
    LocalCluster,
    OutboundListener,
    Resource,
    RootsSecret,
    TraceCluster,
    UpstreamCluster,
    UpstreamRoutes,
    is_http,
    leaf_name,
)
from sidecar.core.scope import figures_scope
from sidecar.render_external import external_cluster, external_listener
from sidecar.render_gateway import gateway_listener, gateway_routes, gateway_way
from sidecar.render_listener import (
    ADS,
    TLS_PARAMETERS,
    access_rules,
    inbound_listener,
    outbound_listener,
)
from sidecar.render_routes import inbound_routes, upstream_routes
from sidecar.render_traces import trace_cluster

# Named by type URL inside configurations: they must be loaded for the JSON form to be read.
_BY_TYPE_URL = (
    cel_pb2,
    als_pb2,
    stream_pb2,
    common_fault_pb2,
    fault_pb2,
    local_rate_limit_pb2,
    http_inputs_pb2,
    http_rbac_pb2,
    router_pb2,
    tap_pb2,
    original_dst_pb2,
    http_connection_manager_pb2,
    tcp_rbac_pb2,
    tcp_proxy_pb2,
    ssl_inputs_pb2,
    previous_hosts_pb2,
    opentelemetry_pb2,
    parent_based_sampler_pb2,
    trace_id_ratio_based_sampler_pb2,
    tls_pb2,
    http_protocol_options_pb2,
)
_TYPE = "type.googleapis.com/"
TYPE_URLS = {
    Kind.CLUSTER: _TYPE + "envoy.config.cluster.v3.Cluster",
    Kind.ENDPOINTS: _TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment",
    Kind.SECRET: _TYPE + "envoy.extensions.transport_sockets.tls.v3.Secret",
    Kind.LISTENER: _TYPE + "envoy.config.listener.v3.Listener",
    Kind.ROUTES: _TYPE + "envoy.config.route.v3.RouteConfiguration",
    Kind.RULES: _TYPE + "envoy.config.core.v3.TypedExtensionConfig",
}
KINDS = {url: kind for kind, url in TYPE_URLS.items()}
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CONTENTS_KEPT = 4096
_LIMIT = 1 << 20  # concurrency is the workload's business: no breaker trips before memory does
_TCP_LEVEL, _TCP_USER_TIMEOUT = 6, 18
_BALANCING = {
    Balancing.LEAST_REQUEST: "LEAST_REQUEST",
    Balancing.ROUND_ROBIN: "ROUND_ROBIN",
    Balancing.RANDOM: "RANDOM",
    Balancing.RING_HASH: "RING_HASH",
    Balancing.MAGLEV: "MAGLEV",
}


@lru_cache(maxsize=_CONTENTS_KEPT)
def render(resource: Resource) -> discovery_pb2.Resource:
    """The resource as it goes into a response. Treat it as frozen: it is shared."""
    message = _message(resource)
    rendered = discovery_pb2.Resource(name=resource.name)
    rendered.resource.Pack(message, deterministic=True)
    rendered.version = hashlib.sha256(rendered.resource.value).hexdigest()[:16]
    return rendered


def _message(resource: Resource) -> Message:
    message: Message
    config: Config = {}
    match resource:
        case EndpointSet():
            message = _endpoints(resource)
        case LeafSecret() | RootsSecret() | GatewayCertificate():
            message = _secret(resource)
        case LocalCluster() | TraceCluster() | UpstreamCluster() | GatewayCluster() | ExternalCluster():
            config, message = _cluster(resource), cluster_pb2.Cluster()
        case InboundListener() | OutboundListener() | GatewayListener() | ExternalListener():
            config, message = _listener(resource), listener_pb2.Listener()
        case UpstreamRoutes() | InboundRoutes() | GatewayRoutes():
            config, message = _routes(resource), route_pb2.RouteConfiguration()
        case AccessRules():
            config = {"name": resource.name, "typed_config": access_rules(resource)}
            message = extension_pb2.TypedExtensionConfig()
        case _:
            assert_never(resource)
    return json_format.ParseDict(config, message)  # into what it has already


def _cluster(cluster: LocalCluster | TraceCluster | UpstreamCluster | GatewayCluster | ExternalCluster) -> Config:
    match cluster:
        case LocalCluster():
            return _local_cluster(cluster)
        case TraceCluster():
            return trace_cluster(cluster)
        case UpstreamCluster():
            return _upstream_cluster(cluster)
        case GatewayCluster():
            return gateway_way(cluster)
        case ExternalCluster():
            return external_cluster(cluster)
        case _:
            assert_never(cluster)


def _listener(listener: InboundListener | OutboundListener | GatewayListener | ExternalListener) -> Config:
    match listener:
        case InboundListener():
            return inbound_listener(listener)
        case OutboundListener():
            return outbound_listener(listener)
        case GatewayListener():
            return gateway_listener(listener)
        case ExternalListener():
            return external_listener(listener)
        case _:
            assert_never(listener)


def _routes(routes: UpstreamRoutes | InboundRoutes | GatewayRoutes) -> Config:
    match routes:
        case UpstreamRoutes():
            return upstream_routes(routes)
        case InboundRoutes():
            return inbound_routes(routes)
        case GatewayRoutes():
            return gateway_routes(routes)
        case _:
            assert_never(routes)


def _local_cluster(cluster: LocalCluster) -> Config:
    address = {"socket_address": {"address": cluster.address, "port_value": cluster.port}}
    config: Config = {
        "name": cluster.name,
        "type": "STATIC",
        # A guest that comes from another node is called here shortly before it is here.
        "connect_timeout": "10s" if cluster.patient else "1s",
        "circuit_breakers": _breakers(Limits(), 50),
        "load_assignment": {
            "cluster_name": cluster.name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    if cluster.protocol in (Protocol.HTTP2, Protocol.GRPC):
        options = {"explicit_http_config": {"http2_protocol_options": {"allow_connect": True}}}
        config["typed_extension_protocol_options"] = {_OPTIONS: {"@type": _TYPE + _OPTIONS, **options}}
    return config


def _upstream_cluster(cluster: UpstreamCluster) -> Config:
    policy = cluster.backend.policy
    config: Config = {
        "name": cluster.name,
        "alt_stat_name": f"{figures_scope(cluster.scope)}outbound.{cluster.source}.{cluster.destination}",
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS, "service_name": cluster.backend.endpoints},
        "connect_timeout": f"{policy.connect_timeout_s:g}s",
        "lb_policy": _BALANCING[policy.balance],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": _breakers(policy.limits, policy.budget_percent),
        "outlier_detection": _outliers(policy.outliers),
        "upstream_bind_config": {"socket_options": [_user_timeout(1000)]},
        "upstream_connection_options": {
            "tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 5, "keepalive_interval": 1}
        },
        "transport_socket": {"name": "tls", "typed_config": _upstream_tls(cluster)},
    }
    if is_http(cluster.protocol):
        config["typed_extension_protocol_options"] = {_OPTIONS: _upstream_http(cluster.protocol)}
    return config


def _upstream_http(protocol: Protocol) -> Config:
    http2: Config = {
        "allow_connect": True,
        "connection_keepalive": {"interval": "1s", "timeout": "2s"},
    }
    if protocol is Protocol.HTTP:
        # By ALPN: HTTP/2 between our sidecars, HTTP/1.1 to a proxy that offers nothing else.
        options: Config = {"auto_config": {"http_protocol_options": {}, "http2_protocol_options": http2}}
    else:
        options = {"explicit_http_config": {"http2_protocol_options": http2}}
    return {"@type": _TYPE + _OPTIONS, **options}


def _upstream_tls(cluster: UpstreamCluster) -> Config:
    peers = [{"san_type": "URI", "matcher": {"exact": peer}} for peer in cluster.peers]
    context: Config = {
        "tls_params": TLS_PARAMETERS,
        "tls_certificate_sds_secret_configs": [{"name": leaf_name(cluster.source, cluster.scope), "sds_config": ADS}],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": peers},
            "validation_context_sds_secret_config": {"name": cluster.scope + ROOTS, "sds_config": ADS},
        },
    }
    if cluster.protocol in (Protocol.HTTP2, Protocol.GRPC):
        context["alpn_protocols"] = ["h2"]
    return {
        "@type": _TYPE + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": cluster.sni,
        "max_session_keys": 64,
        "common_tls_context": context,
    }


def _outliers(outliers: Outliers) -> Config:
    """What this side saw fail (connects, resets, timeouts); an answer, even a 503, is the workload's unless the
    service's policy says otherwise."""
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 3,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_local_origin_success_rate": 0,
        "consecutive_5xx": outliers.errors or 5,
        "enforcing_consecutive_5xx": 100 if outliers.errors else 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "interval": f"{outliers.interval_s:g}s",
        "base_ejection_time": f"{outliers.ejection_s:g}s",
        "max_ejection_time": f"{5 * outliers.ejection_s:g}s",
        "max_ejection_percent": outliers.percent,  # never the only one: trying it beats refusing
    }


def _breakers(limits: Limits, budget_percent: int) -> Config:
    bounds = {
        "max_connections": limits.connections or _LIMIT,
        "max_pending_requests": limits.pending or _LIMIT,
        "max_requests": limits.requests or _LIMIT,
    }
    retries = {"budget_percent": {"value": budget_percent}, "min_retry_concurrency": 64 if budget_percent else 0}
    return {"thresholds": [{**bounds, "retry_budget": retries}]}


def _user_timeout(milliseconds: int) -> Config:
    return {
        "description": "TCP_USER_TIMEOUT",
        "level": _TCP_LEVEL,
        "name": _TCP_USER_TIMEOUT,
        "int_value": milliseconds,
        "state": "STATE_PREBIND",
    }


def _endpoints(endpoints: EndpointSet) -> endpoint_pb2.ClusterLoadAssignment:
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=endpoints.name)
    for priority, tier in enumerate(endpoints.tiers):
        locality = assignment.endpoints.add(priority=priority)
        for address, port in tier:
            socket = locality.lb_endpoints.add().endpoint.address.socket_address
            socket.address, socket.port_value = address, port
    return assignment


def _secret(secret: LeafSecret | RootsSecret | GatewayCertificate) -> secret_pb2.Secret:
    message = secret_pb2.Secret(name=secret.name)
    match secret:
        case LeafSecret():
            message.tls_certificate.certificate_chain.inline_string = secret.certificate_pem
            message.tls_certificate.private_key.inline_string = secret.key_pem
        case GatewayCertificate():
            # One file has both, and each reader takes its part.
            message.tls_certificate.certificate_chain.inline_string = secret.pem
            message.tls_certificate.private_key.inline_string = secret.pem
        case RootsSecret():
            message.validation_context.trusted_ca.inline_string = "\n".join(
                pem.strip() for pem in secret.certificates_pem
            )
        case _:
            assert_never(secret)
    return message
