"""Why an allocation is where it is, or is nowhere."""

import msgspec
import pytest

from controller.core import views
from controller.core.why import explanation
from outrider.ids import AllocId, JobName
from outrider.model.fleet import Explanation
from outrider.model.job import Affinity, Constraint, Group, Operator, Spread, SpreadTarget
from tests.scenarios.world import World, group, job, node, service


def world() -> World:
    found = World()
    found.join(
        node("n1", memory_mib=1024, meta={"rack": "a"}),
        node("n2", memory_mib=4096, meta={"rack": "b"}),
        node("n3", memory_mib=4096, meta={"rack": "b"}, host_image=False),
    )
    return found


def on(rack: str) -> Constraint:
    return Constraint(attribute="meta.rack", operator=Operator.EQUAL, value=rack)


def why(wanted: Group) -> Explanation:
    fleet = world()
    fleet.submit(job("shop", wanted))
    (one,) = views.allocations(fleet.state, job=JobName("shop"))
    found = explanation(fleet.state, one.id)
    assert found is not None
    return found


def test_a_placed_one_is_explained_as_if_it_were_placed_again() -> None:
    wanted = msgspec.structs.replace(
        group(services=[service("web")], static=8080, memory_mib=500),
        services=(),
        affinities=(Affinity(prefer=on("b"), weight=40),),
    )
    found = why(wanted)
    assert found.allocation.node == "n2"
    assert [(one.reason, one.nodes) for one in found.filtered] == [("`image: host` is not allowed there", 1)]
    assert [one.node for one in found.best] == ["n2", "n1"], "its own port and memory are not in its way"
    assert found.best[0].score == pytest.approx(sum(found.best[0].parts.values()))
    assert found.best[0].parts["affinity"] == pytest.approx(0.4)
    assert found.remedies == ()


def test_what_would_make_it_fit_is_told_for_what_is_lacking() -> None:
    found = why(msgspec.structs.replace(group(memory_mib=2048), constraints=(on("a"),)))
    assert found.allocation.node is None
    assert found.best == ()
    assert [(one.nodes, one.reason) for one in found.filtered] == [
        (1, "`image: host` is not allowed there"),
        (1, "`meta.rack = a` does not hold"),
        (1, "memory 2.0 GiB wanted, at most 1.0 GiB free"),
    ]
    assert found.remedies == (
        "with 1.0 GiB more memory on n1, which lacks least",
        "on 1 nodes, were it not for this: `meta.rack = a` does not hold",
    )


def test_an_attribute_that_no_node_has_is_a_warning_and_a_reason() -> None:
    fleet = world()
    zone = Constraint(attribute="meta.zone", operator=Operator.EQUAL, value="x")
    reply = fleet.submit(job("shop", msgspec.structs.replace(group(), constraints=(zone,))))
    assert reply.warnings == ("group web: no node has `meta.zone = x`",)
    (one,) = views.allocations(fleet.state)
    assert "2 of 3 nodes: `meta.zone = x` does not hold: meta.zone is not set" in one.reason
    status = views.job_status(fleet.state, JobName("shop"))
    assert status is not None
    assert any("would fit on 2 nodes, were it not for this: `meta.zone = x`" in text for text in status.warnings)


@pytest.mark.parametrize(
    ("spread", "warning"),
    [
        (Spread(attribute="meta.zone"), "group web: spread over meta.zone, which no node has"),
        (
            Spread(attribute="meta.rack", targets=(SpreadTarget(value="q", percent=50),)),
            "group web: spread over meta.rack: no node has q",
        ),
    ],
)
def test_a_spread_that_cannot_be_is_a_warning(spread: Spread, warning: str) -> None:
    reply = world().submit(job("shop", msgspec.structs.replace(group(), spread=(spread,))))
    assert reply.warnings == (warning,)


def test_distinct_values_that_are_used_up_are_told() -> None:
    fleet = world()
    apart = Constraint(attribute="meta.rack", operator=Operator.DISTINCT, value="1")
    fleet.submit(job("shop", msgspec.structs.replace(group(count=3), constraints=(apart,))))
    placed = [one for one in views.allocations(fleet.state) if one.node]
    assert {one.node for one in placed} == {"n1", "n2"}
    (waiting,) = (one for one in views.allocations(fleet.state) if not one.node)
    assert "2 of 3 nodes: `distinct meta.rack` is used up" in waiting.reason


def test_nobody_knows_of_a_stranger() -> None:
    assert explanation(world().state, AllocId("0000000000")) is None
