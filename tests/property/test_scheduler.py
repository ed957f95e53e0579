"""The scheduler against the dumb reference: every copy goes where no other node would have been better."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
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

META = {
    "rack": ["a", "b", "c"],
    "zone": ["x", "y"],
    "tags": ["ssd", "ssd,fast", "slow"],
    "cores": ["4", "8", "many"],
}
CONSTRAINTS = [
    Constraint(attribute="meta.rack", operator=Operator.EQUAL, value="a"),
    Constraint(attribute="meta.rack", operator=Operator.NOT_EQUAL, value="b"),
    Constraint(attribute="meta.zone", operator=Operator.MATCHES, value="^[xz]"),
    Constraint(attribute="node.kernel", operator=Operator.VERSION, value=">= 5.10"),
    Constraint(attribute="meta.tags", operator=Operator.CONTAINS, value="fast,ssd"),
    Constraint(attribute="meta.tags", operator=Operator.CONTAINS_ANY, value="slow,fast"),
    Constraint(attribute="meta.rack", operator=Operator.IS_SET),
    Constraint(attribute="meta.zone", operator=Operator.IS_NOT_SET),
    Constraint(attribute="meta.unheard", operator=Operator.EQUAL, value="1"),
    *(
        Constraint(attribute="meta.cores", operator=operator, value=value)
        for operator in (Operator.LESS, Operator.LESS_EQUAL, Operator.GREATER, Operator.GREATER_EQUAL)
        for value in ("4", "6", "8")
    ),
]
DISTINCT = [
    Constraint(attribute=attribute, operator=Operator.DISTINCT, value=value)
    for attribute in ("node.id", "meta.rack", "meta.zone")
    for value in ("1", "2", "20")
]
TARGETS = [
    (),
    (SpreadTarget(value="a", percent=70), SpreadTarget(value="x", percent=30)),
    (SpreadTarget(value="b", percent=0), SpreadTarget(value="nowhere", percent=10)),
]
PORTS = [
    (), (), (), (Port(name=PortName("a"), static=8080),), (Port(name=PortName("a"), static=20002),),
    (Port(name=PortName("a"), dynamic=True), Port(name=PortName("b"), dynamic=True)),
]  # fmt: skip
COUNTS = [1, 2, 5, 33, 60, 200]
NODES_MAX = 7
MIXED = 2**32


def some_node(rng: random.Random, at: int) -> Node:
    return node(
        f"n{at}",
        cpu_millis=rng.choice([500, 2000, 4000, 64000]),
        memory_mib=rng.choice([256, 1024, 8192, 65536]),
        meta={name: rng.choice(values) for name, values in META.items() if rng.random() < 0.7},
        pool=rng.choice(["default", "default", "default", "gpu"]),
        kernel=rng.choice(["6.1.0-56-cloud", "5.10.3", "5.4.0"]),
        devices=rng.choice([{}, {"gpu": 1}, {"gpu": 4, "fpga": 1}]),
        reserved=rng.choice([Reserved(), Reserved(cpu_millis=100, memory_bytes=64 * MIB, ports=(8080, 20001))]),
        port_first=20000,
        port_last=rng.choice([20001, 20004, 20999]),
    )


def some_place(rng: random.Random, at: int) -> Place:
    found = Place(node=some_node(rng, at), ready=rng.random() < 0.9, copies=rng.choice([0, 0, 0, 1, 3]))
    found.job_copies = found.copies + rng.choice([0, 0, 1])
    return found


def wishes(rng: random.Random) -> tuple[Constraint, ...]:
    return tuple(rng.choice(CONSTRAINTS if rng.random() < 0.5 else DISTINCT) for _ in range(rng.choice([0, 0, 1, 2])))


def affinities(rng: random.Random) -> tuple[Affinity, ...]:
    return tuple(
        Affinity(prefer=rng.choice(CONSTRAINTS), weight=rng.choice([-100, -20, 1, 50, 100]))
        for _ in range(rng.choice([0, 0, 1, 2]))
    )


def spreads(rng: random.Random) -> tuple[Spread, ...]:
    attributes = rng.sample(["meta.rack", "meta.zone", "node.id"], rng.choice([0, 0, 1, 2]))
    return tuple(
        Spread(attribute=attribute, weight=rng.choice([1, 50, 100]), targets=rng.choice(TARGETS))
        for attribute in attributes
    )


def some_job(rng: random.Random, count: int) -> Job:
    resources = Resources(
        cpu_millis=rng.choice([1, 100, 700]),
        memory_bytes=rng.choice([1, 64, 900]) * MIB,
        disk_bytes=MIB,
        devices=rng.choice([{}, {}, {}, {"gpu": 1}, {"gpu": 2, "fpga": 1}]),
    )
    group = Group(
        name=GroupName("web"),
        tasks=(Task(name=TaskName("main"), command=("serve",), resources=resources),),
        count=count,
        network=Network(ports=rng.choice(PORTS)),
        constraints=wishes(rng),
        affinities=affinities(rng),
        spread=spreads(rng),
    )
    return Job(
        name=JobName("shop"),
        groups=(group,),
        constraints=wishes(rng),
        affinities=affinities(rng),
        pool=rng.choice(["default", "default", "all", "gpu"]),
        placement=rng.choice(list(Packing)),
    )


def follow(size: int, count: int, seed: int) -> None:
    """Place all copies at once; the reference then goes the same way, and no step may have been better elsewhere."""
    rng = random.Random(seed)  # noqa: S311  a trace: to draw each choice by hypothesis takes eight times as long
    places = [some_place(rng, at) for at in range(size)]
    job = some_job(rng, count)
    table = NodeTable()
    for one in places:
        table.register(one.node)
    snapshot = Snapshot(table, np.array([one.ready for one in places]))
    near = Near(np.array([one.copies for one in places]), np.array([one.job_copies for one in places]))
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


sizes, counts, seeds = st.integers(1, NODES_MAX), st.sampled_from(COUNTS), st.integers(0, MIXED)


@settings(max_examples=5000, deadline=None)
@given(sizes, counts, seeds)
def test_no_copy_had_a_better_node(size: int, count: int, seed: int) -> None:
    follow(size, count, seed)


@pytest.mark.deep
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None)
@given(sizes, counts, seeds)
def test_no_copy_had_a_better_node_in_many_more_cases(size: int, count: int, seed: int) -> None:
    follow(size, count, seed)
