"""Ways to services outside of the mesh as Envoy configuration (JSON form)."""

from outrider.model.external import ExternalTls
from outrider.model.mesh import VIRTUAL_PORT
from sidecar.access_log import Config, external_log
from sidecar.core.external import ExternalCluster, ExternalListener
from sidecar.render_listener import ADS, TLS_PARAMETERS

_TYPE = "type.googleapis.com/envoy."
_CONNECT_S = 5  # farther away than any of our own
_SYSTEM_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # the node's, which the sidecar's sandbox shows


def external_listener(listener: ExternalListener) -> Config:
    original = {"@type": _TYPE + "extensions.filters.listener.original_dst.v3.OriginalDst"}
    chains = [
        {
            "name": str(port),
            "filter_chain_match": {"destination_port": port},
            "filters": [_connections(listener, cluster)],
        }
        for port, cluster in listener.clusters
    ]
    return {
        "name": listener.name,
        "address": {"socket_address": {"address": listener.address, "port_value": VIRTUAL_PORT}},
        # nftables led the connection here: which port was asked for is known to the kernel.
        "listener_filters": [{"name": "original_dst", "typed_config": original}],
        "filter_chains": chains,
        "default_filter_chain": {"name": "other", "filters": [_connections(listener, listener.otherwise)]},
        "traffic_direction": "OUTBOUND",
        "drain_type": "MODIFY_ONLY",
        "enable_reuse_port": False,
        "stat_prefix": listener.name,
    }


def external_cluster(cluster: ExternalCluster) -> Config:
    config: Config = {
        "name": cluster.name,
        "alt_stat_name": f"outbound.{cluster.source}.{cluster.service}",
        "connect_timeout": f"{_CONNECT_S}s",
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
    }
    if cluster.nowhere:
        return {**config, "type": "STATIC"}
    config |= {
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS, "service_name": cluster.name},
        "upstream_connection_options": {
            "tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 30, "keepalive_interval": 10}
        },
    }
    if cluster.tls is not None:
        config["transport_socket"] = {"name": "tls", "typed_config": _tls(cluster.tls)}
    return config


def _tls(tls: ExternalTls) -> Config:
    trusted = {"inline_string": tls.ca_pem} if tls.ca_pem else {"filename": _SYSTEM_BUNDLE}
    validation = {
        "trusted_ca": trusted,
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": tls.server_name}}],
    }
    return {
        "@type": _TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": tls.server_name,
        "max_session_keys": 64,
        "common_tls_context": {"tls_params": TLS_PARAMETERS, "validation_context": validation},
    }


def _connections(listener: ExternalListener, cluster: str) -> Config:
    proxy = {
        "@type": _TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": f"outbound.{listener.source}.{listener.service}",
        "cluster": cluster,
        "idle_timeout": "0s",
        "max_connect_attempts": 3,
        "access_log": external_log(listener.source, listener.service),
    }
    return {"name": "tcp", "typed_config": proxy}
