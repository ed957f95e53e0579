"""Figures put together: percentiles from buckets that were added up, and shares that never exceed the whole."""

from itertools import permutations

import pytest

from controller.core.insight import (
    _edge,
    about_certificate,
    about_endpoints,
    about_intention,
    about_routes,
    quantile,
)
from controller.core.policy import Policy
from controller.core.state import State
from controller.mesh.intentions import decide
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.insight import LatencyBucket, PairFigures
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Intention, MeshService
from outrider.model.traffic import Leg, Route, ServiceTraffic

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


def test_an_expired_certificate_is_said_to_be_and_a_good_one_for_how_long() -> None:
    node, alloc = NodeId("n1"), AllocId("a")
    expired = about_certificate(WEB, node, alloc, 1000.0, now_s=1090.0)
    assert (expired.good, expired.text) == (False, "the certificate of web on n1 expired 90 s ago")
    assert not about_certificate(WEB, node, alloc, None, now_s=0.0).good
    assert about_certificate(WEB, node, alloc, 7200.0, now_s=0.0).text == "web's on n1 is good for 2.0 h"


def test_of_wildcards_that_contradict_each_other_the_more_exact_destination_decides_and_is_named() -> None:
    """Consul's precedence: 9 exact -> exact, 8 * -> exact, 6 exact -> *, 5 * -> *."""
    circle = (
        Intention(source="web", destination="*", action=Action.ALLOW, id="6", precedence=6),
        Intention(source="*", destination="api", action=Action.DENY, id="8", precedence=8, description="not now"),
        Intention(source="*", destination="*", action=Action.ALLOW, id="5", precedence=5),
    )
    for order in permutations(circle):
        decided_by = decide(order, WEB, API)
        assert decided_by is not None
        finding = about_intention(WEB, API, allowed=False, decided_by=decided_by)
        assert (finding.good, finding.text) == (False, "denied by * -> api deny (8), “not now”")
    assert about_intention(WEB, API, allowed=False, decided_by=None).text.startswith("denied: no intention names them")


def test_a_route_to_a_service_that_nobody_provides_is_found() -> None:
    state = State.empty(Policy())
    split = (Leg(service="api", weight=9000), Leg(service="ghost", weight=1000))
    routed = MeshService(name=API, virtual_address="198.18.1.0", traffic=ServiceTraffic(routes=(Route(legs=split),)))
    finding = about_routes(state, routed, {API: 1})
    assert (finding.good, "sent to ghost, which nobody provides" in finding.text) == (False, True)
    whole = about_routes(state, routed, {API: 1, ServiceName("ghost"): 1})
    assert (whole.good, whole.text) == (True, "/* -> 90% api + 10% ghost")
    assert about_endpoints(state, routed).text == "api has no instance: nothing of it runs"
