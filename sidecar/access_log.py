"""What an Envoy tells of each request and connection: JSON lines on its standard output, and refusals to the agent.

Owns formats and filters. Fields are bounded: a path is cut and loses its query, which may hold secrets.
"""

from outrider.ids import AllocId
from sidecar.bootstrap import ADS_CLUSTER
from sidecar.core.scope import alloc_of

Config = dict[str, object]

MARKER_HEADER = "x-outrider-origin"
_ALLOC = "alloc"
_STDOUT = "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"
_CEL = "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"
_COMMON: Config = {
    "at": "%START_TIME%",
    "flags": "%RESPONSE_FLAGS%",
    "duration_ms": "%DURATION%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
    "endpoint": "%UPSTREAM_HOST%",
    "connect_error": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
_HTTP: Config = {
    "method": "%REQ(:METHOD)%",
    "protocol": "%PROTOCOL%",
    "path": "%PATH(NQ:PATH):256%",
    "authority": "%REQ(:AUTHORITY):128%",
    "code": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "request": "%REQ(X-REQUEST-ID):64%",
}
_TCP: Config = {"details": "%CONNECTION_TERMINATION_DETAILS%"}
_INBOUND: Config = {"caller": "%DOWNSTREAM_PEER_URI_SAN%", "identity": "%DOWNSTREAM_LOCAL_URI_SAN%"}
_OUTBOUND: Config = {"callee": "%UPSTREAM_PEER_URI_SAN%", "identity": "%UPSTREAM_LOCAL_URI_SAN%"}


def inbound_log(service: str, *, http: bool, scope: str = "") -> list[Config]:
    """Every request or connection to standard output; refused ones also to the agent over the ADS socket."""
    names = {**_whose(scope), "side": "inbound", "service": service}
    fields = {**names, **_INBOUND, **(_HTTP if http else _TCP), **_COMMON}
    return [_stdout(fields), _refusals(scope + service, http=http)]


def outbound_log(source: str, destination: str, *, http: bool, scope: str = "") -> list[Config]:
    names = {**_whose(scope), "side": "outbound", "service": source, "upstream": destination}
    return [_stdout({**names, **_OUTBOUND, **(_HTTP if http else _TCP), **_COMMON})]


def external_log(source: str, service: str) -> list[Config]:
    """`asked`: the port that the workload named; `peer` is the other side's certificate, where we made the TLS."""
    names = {"side": "external", "service": source, "upstream": service, "asked": "%DOWNSTREAM_LOCAL_PORT%"}
    return [_stdout({**names, "peer": "%UPSTREAM_PEER_DNS_SAN%", **_TCP, **_COMMON})]


def gateway_log(service: str, *, http: bool) -> list[Config]:
    """Whoever calls from outside has an address and no name."""
    names = {"side": "gateway", "service": service, "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}
    return [_stdout({**names, "sni": "%REQUESTED_SERVER_NAME%", **(_HTTP if http else _TCP), **_COMMON})]


def log_mark(alloc: AllocId) -> bytes:
    """What is in every line of a shared sidecar's log that is about that allocation, and in no other's."""
    return f'"{_ALLOC}":"{alloc}"'.encode()


def _whose(scope: str) -> Config:
    return {_ALLOC: alloc_of(scope)} if scope else {}


def _stdout(fields: Config) -> Config:
    return {
        "name": "stdout",
        "typed_config": {"@type": _STDOUT, "log_format": {"json_format": fields}},
    }


def _refusals(name: str, *, http: bool) -> Config:
    details = "response.code_details" if http else "connection.termination_details"
    name = "HttpGrpcAccessLogConfig" if http else "TcpGrpcAccessLogConfig"
    refused: Config = {
        "extension_filter": {
            "name": "refused",
            "typed_config": {"@type": _CEL, "expression": f'{details}.startsWith("rbac_access_denied")'},
        }
    }
    if http:
        # The expression costs more than all the rest of a good request's log: it is for those that were answered 403.
        forbidden = {"default_value": 403, "runtime_key": "outrider.unused"}
        refused = {
            "and_filter": {
                "filters": [{"status_code_filter": {"comparison": {"op": "EQ", "value": forbidden}}}, refused]
            }
        }
    return {
        "name": "refusals",
        "filter": refused,
        "typed_config": {
            "@type": f"type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.{name}",
            "common_config": {
                "log_name": name,
                "transport_api_version": "V3",
                "buffer_flush_interval": "0.25s",
                "grpc_service": {"envoy_grpc": {"cluster_name": ADS_CLUSTER}},
            },
        },
    }
