"""The scheduler against the dumb reference: every copy goes where no other node would have been better."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.core.groups import group_entry
from controller.core.nodes import NodeTable
from controller.core.schedule import place
from controller.core.scores import Near
from controller.core.snapshot import Snapshot
from outrider.ids import GroupName, JobName, PortName, TaskName
from outrider.model.job import (
    MIB,
    Affinity,
    Constraint,
    Group,
    Job,
    Network,
    Operator,
    Packing,
    Port,
    Resources,
    Spread,
    SpreadTarget,
    Task,
)
from outrider.model.node import Node, Reserved
from tests.property.reference_scheduler import NOWHERE, Place, Reference
from tests.scenarios.world import node

CLOSE = 1e-9  # sums of the same terms in another order

maybe_meta = st.fixed_dictionaries(
    {},
    optional={
        "rack": st.sampled_from(["a", "b", "c"]),
        "zone": st.sampled_from(["x", "y"]),
        "tags": st.sampled_from(["ssd", "ssd,fast", "slow"]),
        "cores": st.sampled_from(["4", "8", "many"]),
    },
)


@st.composite
def nodes(draw: st.DrawFn, at: int) -> Node:
    return node(
        f"n{at}",
        cpu_millis=draw(st.sampled_from([500, 2000, 4000, 64000])),
        memory_mib=draw(st.sampled_from([256, 1024, 8192, 65536])),
        meta=draw(maybe_meta),
        pool=draw(st.sampled_from(["default", "default", "default", "gpu"])),
        kernel=draw(st.sampled_from(["6.1.0-56-cloud", "5.10.3", "5.4.0"])),
        devices=draw(st.sampled_from([{}, {"gpu": 1}, {"gpu": 4, "fpga": 1}])),
        reserved=draw(
            st.sampled_from([Reserved(), Reserved(cpu_millis=100, memory_bytes=64 * MIB, ports=(8080, 20001))])
        ),
        port_first=20000,
        port_last=draw(st.sampled_from([20001, 20004, 20999])),
    )


constraints = st.one_of(
    st.sampled_from(
        [
            Constraint(attribute="meta.rack", operator=Operator.EQUAL, value="a"),
            Constraint(attribute="meta.rack", operator=Operator.NOT_EQUAL, value="b"),
            Constraint(attribute="meta.zone", operator=Operator.MATCHES, value="^[xz]"),
            Constraint(attribute="node.kernel", operator=Operator.VERSION, value=">= 5.10"),
            Constraint(attribute="meta.tags", operator=Operator.CONTAINS, value="fast,ssd"),
            Constraint(attribute="meta.tags", operator=Operator.CONTAINS_ANY, value="slow,fast"),
            Constraint(attribute="meta.rack", operator=Operator.IS_SET),
            Constraint(attribute="meta.zone", operator=Operator.IS_NOT_SET),
            Constraint(attribute="meta.unheard", operator=Operator.EQUAL, value="1"),
        ]
    ),
    st.builds(
        Constraint,
        attribute=st.just("meta.cores"),
        operator=st.sampled_from([Operator.LESS, Operator.LESS_EQUAL, Operator.GREATER, Operator.GREATER_EQUAL]),
        value=st.sampled_from(["4", "6", "8"]),
    ),
)
distinct = st.builds(
    Constraint,
    attribute=st.sampled_from(["node.id", "meta.rack", "meta.zone"]),
    operator=st.just(Operator.DISTINCT),
    value=st.sampled_from(["1", "2", "20"]),
)
wishes = st.lists(st.one_of(constraints, distinct), max_size=2).map(tuple)
affinities = st.lists(
    st.builds(Affinity, prefer=constraints, weight=st.sampled_from([-100, -20, 1, 50, 100])), max_size=2
).map(tuple)
spreads = st.lists(
    st.builds(
        Spread,
        attribute=st.sampled_from(["meta.rack", "meta.zone", "node.id"]),
        weight=st.sampled_from([1, 50, 100]),
        targets=st.sampled_from(
            [(), (SpreadTarget(value="a", percent=70), SpreadTarget(value="x", percent=30)),
             (SpreadTarget(value="b", percent=0), SpreadTarget(value="nowhere", percent=10))]
        ),
    ),
    max_size=2,
    unique_by=lambda wish: wish.attribute,
).map(tuple)  # fmt: skip
ports = st.sampled_from(
    [(), (), (), (Port(name=PortName("a"), static=8080),), (Port(name=PortName("a"), static=20002),),
     (Port(name=PortName("a"), dynamic=True), Port(name=PortName("b"), dynamic=True))]
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Place], Job]:
    places = [
        Place(node=draw(nodes(at)), ready=draw(st.integers(0, 9)) > 0, copies=draw(st.sampled_from([0, 0, 0, 1, 3])))
        for at in range(draw(st.integers(1, 7)))
    ]
    for one in places:
        one.job_copies = one.copies + draw(st.sampled_from([0, 0, 1]))
    resources = Resources(
        cpu_millis=draw(st.sampled_from([1, 100, 700])),
        memory_bytes=draw(st.sampled_from([1, 64, 900])) * MIB,
        disk_bytes=MIB,
        devices=draw(st.sampled_from([{}, {}, {}, {"gpu": 1}, {"gpu": 2, "fpga": 1}])),
    )
    group = Group(
        name=GroupName("web"),
        tasks=(Task(name=TaskName("main"), command=("serve",), resources=resources),),
        count=draw(st.sampled_from([1, 2, 5, 33, 60, 200])),
        network=Network(ports=draw(ports)),
        constraints=draw(wishes),
        affinities=draw(affinities),
        spread=draw(spreads),
    )
    return places, Job(
        name=JobName("shop"),
        groups=(group,),
        constraints=draw(wishes),
        affinities=draw(affinities),
        pool=draw(st.sampled_from(["default", "default", "all", "gpu"])),
        placement=draw(st.sampled_from(list(Packing))),
    )


def follow(places: list[Place], job: Job, seed: int) -> None:
    """Place all copies at once; the reference then goes the same way, and no step may have been better elsewhere."""
    table = NodeTable()
    for one in places:
        table.register(one.node)
    snapshot = Snapshot(table, np.array([one.ready for one in places]))
    near = Near(np.array([one.copies for one in places]), np.array([one.job_copies for one in places]))
    count = job.groups[0].count
    found = place(snapshot, group_entry(job, 1, 0), count, near, seed=seed)
    reference = Reference(places, job, job.groups[0])
    given = iter(found.ports)
    for at in found.nodes:
        scores = reference.scores()
        assert scores[at] > NOWHERE, f"{places[at].node.id} does not take one more"
        assert scores[at] >= max(scores) - CLOSE, f"{scores}: {at} was not the best"
        reference.put(at)
        for _ in range(reference.dynamic):
            port, found_here = next(given), places[at].node.fingerprint
            assert found_here.port_first <= port <= found_here.port_last
            assert port not in places[at].ports | set(found_here.reserved.ports)
            places[at].ports.add(port)
    if len(found.nodes) < count:
        assert max(reference.scores()) == NOWHERE, "one more would fit"
        assert found.reason
    else:
        assert not found.reason


slow = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=2000, deadline=None, suppress_health_check=slow)
@given(cases(), st.integers(0, 5))
def test_no_copy_had_a_better_node(case: tuple[list[Place], Job], seed: int) -> None:
    follow(*case, seed)


@pytest.mark.deep
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None, suppress_health_check=slow)
@given(cases(), st.integers(0, 1000))
def test_no_copy_had_a_better_node_in_many_more_cases(case: tuple[list[Place], Job], seed: int) -> None:
    follow(*case, seed)
