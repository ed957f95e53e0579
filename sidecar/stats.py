"""Envoy's figures as traffic between services. Pure: text in, values out."""

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from outrider.ids import AllocId
from sidecar.core.intent import PairStats, SidecarStats

_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
_OUTBOUND = "envoy_cluster_outbound_upstream_"
_INBOUND = ("envoy_http_inbound_downstream_", "envoy_tcp_inbound_downstream_")
_REFUSED = ("envoy_http_inbound_rbac_denied", "envoy_inbound_rbac_denied")
_ERRORS = ("cx_connect_fail", "cx_none_healthy", "rq_rx_reset")


@dataclass(slots=True)
class _Pair:
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    buckets: list[tuple[float, int]] = field(default_factory=list)


def sidecar_stats(alloc: AllocId, text: str) -> SidecarStats:
    """`text`: Envoy's /stats/prometheus, with the tags that the bootstrap configuration defines; of a shared one, what
    is the allocation's."""
    inbound: dict[str, _Pair] = defaultdict(_Pair)
    outbound: dict[tuple[str, str], _Pair] = defaultdict(_Pair)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("alloc", alloc) != alloc:
                continue
            destination = sample.labels.get("destination", "")
            # The parser gives every counter the suffix, Envoy only some.
            name = sample.name.removesuffix("_total")
            if name.startswith(_OUTBOUND):
                pair = outbound[sample.labels.get("source", ""), destination]
                _add(pair, name.removeprefix(_OUTBOUND), sample.labels, sample.value)
            elif name in _REFUSED:
                inbound[destination].values["refused"] += sample.value
            else:
                for prefix in _INBOUND:
                    if name.startswith(prefix):
                        _add(inbound[destination], name.removeprefix(prefix), sample.labels, sample.value)
    return SidecarStats(
        alloc=alloc,
        # The caller's side receives what ours sends: both sides count from the caller's point of view.
        inbound=tuple(_stats("", name, pair, sent="rx", received="tx") for name, pair in sorted(inbound.items())),
        outbound=tuple(_stats(*names, pair, sent="tx", received="rx") for names, pair in sorted(outbound.items())),
    )


def _add(pair: _Pair, name: str, labels: dict[str, str], value: float) -> None:
    if name == "rq_time_bucket":
        pair.buckets.append((float(labels["le"]), int(value)))
    else:
        pair.values[name] += value


def _stats(source: str, destination: str, pair: _Pair, *, sent: str, received: str) -> PairStats:
    values = pair.values
    return PairStats(
        source=source,
        destination=destination,
        requests=tuple((code, int(values[f"rq_{code}"])) for code in _CLASSES if values[f"rq_{code}"]),
        errors=int(sum(values[name] for name in _ERRORS)),
        latency_ms=tuple(sorted(pair.buckets)),
        latency_count=int(values["rq_time_count"]),
        latency_sum_ms=values["rq_time_sum"],
        bytes_sent=int(values[f"cx_{sent}_bytes"]),
        bytes_received=int(values[f"cx_{received}_bytes"]),
        connections=int(values["cx"]),
        connections_active=int(values["cx_active"]),
        requests_active=int(values["rq_active"]),
        refused=int(values["refused"]),
    )
