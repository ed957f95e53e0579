"""Spans as Envoy configuration (JSON form): who makes them, of how many requests, and who collects them."""

from outrider.ids import ServiceName
from sidecar.access_log import Config
from sidecar.core.resources import TRACES, TraceCluster

_PROVIDER = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig"
_SAMPLERS = "type.googleapis.com/envoy.extensions.tracers.opentelemetry.samplers.v3."
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def tracing(service: ServiceName, percent: float | None, scope: str = "") -> Config:
    """For an HTTP connection manager. A W3C trace context that comes along decides; `percent` is of the rest."""
    if percent is None:
        return {}
    collector = {"envoy_grpc": {"cluster_name": scope + TRACES}, "timeout": "1s"}
    share = {"numerator": round(percent * 10_000), "denominator": "MILLION"}
    ratio = {"@type": _SAMPLERS + "TraceIdRatioBasedSamplerConfig", "sampling_percentage": share}
    sampler = {
        "@type": _SAMPLERS + "ParentBasedSamplerConfig",
        "wrapped_sampler": {"name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based", "typed_config": ratio},
    }
    provider = {
        "@type": _PROVIDER,
        "grpc_service": collector,
        "service_name": service,
        "sampler": {"name": "envoy.tracers.opentelemetry.samplers.parent_based", "typed_config": sampler},
    }
    # All are offered to the sampler, which decides.
    return {"tracing": {"random_sampling": {"value": 100}, "provider": {"name": "otlp", "typed_config": provider}}}


def trace_cluster(cluster: TraceCluster) -> Config:
    address = {"socket_address": {"address": cluster.address, "port_value": cluster.port}}
    return {
        "name": cluster.name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            _OPTIONS: {
                "@type": "type.googleapis.com/" + _OPTIONS,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": cluster.name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
