"""Figures put together: percentiles from buckets that were added up, and shares that never exceed the whole."""

import pytest

from controller.core.insight import _edge, quantile
from outrider.ids import AllocId, ServiceName
from outrider.model.insight import LatencyBucket, PairFigures
from outrider.model.job import Protocol

WEB, API = ServiceName("web"), ServiceName("api")


def _buckets(*counts: tuple[float, int]) -> tuple[LatencyBucket, ...]:
    return tuple(LatencyBucket(below_ms=below, count=count) for below, count in counts)


@pytest.mark.parametrize(
    ("buckets", "share", "found"),
    [
        ((), 0.5, None),
        (((1.0, 0), (float("inf"), 0)), 0.5, None),
        (((10.0, 100), (20.0, 100), (float("inf"), 100)), 0.5, 5.0),
        (((10.0, 50), (20.0, 100), (float("inf"), 100)), 0.75, 15.0),
        (((10.0, 50), (float("inf"), 100)), 0.99, 10.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(
    buckets: tuple[tuple[float, int], ...], share: float, found: float | None
) -> None:
    assert quantile(_buckets(*buckets), share) == found


def test_sidecars_of_a_pair_are_added_up() -> None:
    figures = [
        PairFigures(
            source=WEB,
            destination=API,
            alloc=AllocId(alloc),
            seconds=2.0,
            requests=100,
            failed=failed,
            bytes=1000,
            latency=_buckets((10.0, below), (20.0, 100), (float("inf"), 100)),
        )
        for alloc, failed, below in (("a", 10, 100), ("b", 0, 0))
    ]
    edge = _edge((WEB, API), figures, Protocol.HTTP)
    assert (edge.sidecars, edge.calls_per_s, edge.failed_share, edge.bytes_per_s) == (2, 100.0, 0.05, 1000.0)
    assert (edge.p50_ms, edge.p99_ms) == (10.0, pytest.approx(19.8))


def test_a_tcp_service_counts_connections_and_one_that_never_came_about_is_a_failure() -> None:
    tried = PairFigures(source=WEB, destination=API, alloc=AllocId("a"), seconds=1.0, failed=3)
    assert _edge((WEB, API), [tried], Protocol.TCP).failed_share == 1.0
    assert _edge((WEB, API), [], Protocol.TCP).failed_share == 0.0
