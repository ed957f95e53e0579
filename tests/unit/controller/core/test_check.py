"""A plan that breaks an invariant never reaches the journal."""

import msgspec
import numpy as np
import pytest

from controller.core.check import PlanError, check
from controller.core.records import LatePlacement, Plan, Run, Stop
from controller.core.state import State
from outrider.ids import JobName
from outrider.model.allocation import Generation
from outrider.model.job import Constraint, Operator, Resources
from tests.scenarios.world import World, group, job, node, service


def ints(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def serials(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


@pytest.fixture
def state() -> State:
    """n1 runs web[0] (serial 0, port 20000) and n2 is gone; serial 1 found no room."""
    world = World()
    world.join(node("n1", memory_mib=1000), node("n2", memory_mib=10))
    world.submit(job("shop", group("web", services=[service("web")])))
    world.submit(job("large", group("web", memory_mib=5000)))
    world.leave("n2")
    return world.state


def run(**changes: object) -> Run:
    good = Run(job=JobName("shop"), version=1, group=0, first_serial=2, first_index=1, nodes=ints(0), ports=ints(20001))
    return msgspec.structs.replace(good, **changes)


def plan(state: State, **parts: object) -> Plan:
    parent = state.generation
    good = Plan(generation=Generation(parent.epoch, parent.counter + 1), parent=parent, at_s=0.0)
    return msgspec.structs.replace(good, **parts)


def test_a_good_plan_passes(state: State) -> None:
    check(state, plan(state, runs=(run(),), stops=(Stop(serials=serials(0), reason="moved"),)))


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"parent": Generation(1, 99)}, "does not follow"),
        ({"generation": Generation(0, 9)}, "does not follow"),
        ({"runs": (run(first_serial=7),)}, "begins at serial 7"),
        ({"runs": (run(nodes=ints(9)),)}, "nobody knows"),
        ({"runs": (run(nodes=ints(1)),)}, "n2, which is not ready"),
        ({"runs": (run(nodes=ints(*[0] * 9), ports=ints(*range(20001, 20010))),)}, "over-committed: memory"),
        ({"runs": (run(nodes=ints(*[0] * 99), ports=ints(*range(20001, 20100))),)}, "over-committed: cpu"),
        ({"runs": (run(ports=ints(20000)),)}, "port 20000 twice on n1"),
        ({"runs": (run(nodes=ints(0, 0), ports=ints(20001, 20001)),)}, "port 20001 twice"),
        ({"runs": (run(ports=ints(80)),)}, "outside the range"),
        ({"runs": (run(ports=b""),)}, "0 ports for 1 allocations"),
        ({"runs": (run(first_index=0),)}, "two allocations of one index"),
        ({"stops": (Stop(serials=serials(5), reason=""),)}, "not there to be placed or stopped"),
        ({"stops": (Stop(serials=serials(0, 0), reason=""),)}, "placed or stopped twice"),
        ({"late": (LatePlacement(serials=serials(0), nodes=ints(0), ports=ints(20001)),)}, "would move"),
        ({"late": (LatePlacement(serials=serials(1), nodes=ints(0)),)}, "over-committed"),
    ],
)
def test_a_bad_plan_stops_the_controller(state: State, parts: dict[str, object], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        check(state, plan(state, **parts))


def important(world: World, name: str, priority: int) -> None:
    world.submit(msgspec.structs.replace(job(name, group("web", memory_mib=1)), priority=priority))


@pytest.mark.parametrize("priority", [50, 49])
def test_nobody_goes_for_one_that_is_not_more_important(priority: int) -> None:
    world = World()
    world.join(node("n1"))
    important(world, "humble", 50)
    important(world, "other", priority)
    stop = Stop(serials=serials(0), reason="", by=JobName("other"))
    with pytest.raises(PlanError, match="is not less important than other"):
        check(world.state, plan(world.state, stops=(stop,)))


def test_devices_and_distinct_values_are_not_given_twice() -> None:
    world = World()
    world.join(node("n1", devices={"gpu": 1}, meta={"rack": "a"}), node("n2", meta={"rack": "a"}))
    apart = Constraint(attribute="meta.rack", operator=Operator.DISTINCT, value="1")
    world.submit(job("shop", msgspec.structs.replace(group("web"), constraints=(apart,))))
    with pytest.raises(PlanError, match="rack does not hold"):
        check(world.state, plan(world.state, runs=(run(first_serial=1, nodes=ints(1), ports=b""),)))
    task = msgspec.structs.replace(group().tasks[0], resources=Resources(devices={"gpu": 1}))
    world.submit(job("learn", msgspec.structs.replace(group("web"), tasks=(task,))))
    again = run(job=JobName("learn"), first_serial=2, ports=b"")
    with pytest.raises(PlanError, match="n1 over-committed: gpu 1 of 0"):
        check(world.state, plan(world.state, runs=(again,)))
    elsewhere = run(job=JobName("learn"), first_serial=2, nodes=ints(1), ports=b"")
    with pytest.raises(PlanError, match="n2 over-committed"):
        check(world.state, plan(world.state, runs=(elsewhere,)))
