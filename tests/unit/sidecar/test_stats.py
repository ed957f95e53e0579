"""Envoy's text of figures as traffic between services."""

from outrider.ids import AllocId
from sidecar.stats import sidecar_stats

TEXT = """\
# TYPE envoy_cluster_outbound_upstream_rq_2xx counter
envoy_cluster_outbound_upstream_rq_2xx{source="web",destination="api"} 7
# TYPE envoy_cluster_outbound_upstream_cx_total counter
envoy_cluster_outbound_upstream_cx_total{source="web",destination="api"} 2
# TYPE envoy_cluster_outbound_upstream_cx_connect_fail counter
envoy_cluster_outbound_upstream_cx_connect_fail{source="web",destination="api"} 1
# TYPE envoy_cluster_outbound_upstream_cx_tx_bytes_total counter
envoy_cluster_outbound_upstream_cx_tx_bytes_total{source="web",destination="api"} 100
# TYPE envoy_tcp_inbound_downstream_cx_rx_bytes_total counter
envoy_tcp_inbound_downstream_cx_rx_bytes_total{destination="web"} 30
# TYPE envoy_inbound_rbac_denied counter
envoy_inbound_rbac_denied{destination="web"} 4
# TYPE envoy_listener_manager_workers_started gauge
envoy_listener_manager_workers_started{} 1
# TYPE envoy_cluster_outbound_upstream_rq_time histogram
envoy_cluster_outbound_upstream_rq_time_bucket{source="web",destination="api",le="5"} 6
envoy_cluster_outbound_upstream_rq_time_bucket{source="web",destination="api",le="+Inf"} 7
envoy_cluster_outbound_upstream_rq_time_sum{source="web",destination="api"} 21.5
envoy_cluster_outbound_upstream_rq_time_count{source="web",destination="api"} 7
"""


def test_outbound_is_told_by_pair_with_its_latencies() -> None:
    (pair,) = sidecar_stats(AllocId("1"), TEXT).outbound
    assert (pair.source, pair.destination) == ("web", "api")
    assert (pair.requests, pair.errors, pair.connections, pair.bytes_sent) == ((("2xx", 7),), 1, 2, 100)
    assert pair.latency_ms == ((5.0, 6), (float("inf"), 7))
    assert (pair.latency_count, pair.latency_sum_ms) == (7, 21.5)


def test_inbound_counts_bytes_from_the_callers_point_of_view_and_refusals() -> None:
    (pair,) = sidecar_stats(AllocId("1"), TEXT).inbound
    assert (pair.source, pair.destination, pair.bytes_sent, pair.refused) == ("", "web", 30, 4)


def test_an_idle_sidecar_has_no_pairs() -> None:
    found = sidecar_stats(AllocId("1"), "")
    assert (found.inbound, found.outbound) == ((), ())
