"""Sticky disks in the controller's core: a copy goes to what the one before it left."""

import msgspec

from controller.core import views
from outrider.ids import JobName, NodeId
from outrider.model.allocation import Allocation
from outrider.model.belongings import StickyDisk
from outrider.model.job import MIB, Job
from tests.scenarios.world import World, group, job, node
from tests.unit.controller.core.test_volumes import make, using

DISK = StickyDisk(target="/data", size_bytes=MIB)


def keeping(command: str, sticky: tuple[StickyDisk, ...] = (DISK,), count: int = 1) -> Job:
    made = group(count=count, command=command)
    task = msgspec.structs.replace(made.tasks[0], sticky=sticky)
    return job("app", msgspec.structs.replace(made, tasks=(task,)))


def wanted(world: World) -> list[Allocation]:
    return [each for each in views.allocations(world.state, job=JobName("app")) if each.desired == "run"]


def with_others_beside(world: World, first: Job) -> NodeId:
    """Where its only copy runs, together with more than the other nodes have."""
    world.join(node("n1"), node("n2"), node("n3"))
    world.submit(first)
    home = wanted(world)[0].node
    assert home is not None
    make(world, on=home)
    world.submit(using("other"))
    return home


def test_a_new_version_goes_where_the_old_one_was() -> None:
    world = World()
    home = with_others_beside(world, keeping("one"))
    before = wanted(world)[0].id
    world.submit(keeping("two"))
    world.wait(5)
    (after,) = wanted(world)
    assert after.id != before
    assert after.node == home


def test_without_one_it_goes_where_there_is_most_room() -> None:
    world = World()
    home = with_others_beside(world, keeping("one", sticky=()))
    world.submit(keeping("two", sticky=()))
    world.wait(5)
    assert wanted(world)[0].node != home


def test_each_copy_has_a_home_of_its_own() -> None:
    world = World()
    world.join(node("n1"), node("n2"), node("n3"))
    world.submit(keeping("one", count=3))
    before = {each.index: each.node for each in wanted(world)}
    world.submit(keeping("two", count=3))
    world.wait(20)
    assert {each.index: each.node for each in wanted(world)} == before


def test_where_the_node_has_no_room_any_more_it_goes_elsewhere() -> None:
    world = World()
    home = with_others_beside(world, keeping("one"))
    large = group(count=1, command="two")
    memory = world.state.nodes.nodes[world.state.nodes.reference[home]].fingerprint.memory_bytes
    resources = msgspec.structs.replace(large.tasks[0].resources, memory_bytes=memory - 32 * MIB)
    task = msgspec.structs.replace(large.tasks[0], sticky=(DISK,), resources=resources)
    world.submit(job("app", msgspec.structs.replace(large, tasks=(task,))))
    world.wait(5)
    (after,) = wanted(world)
    assert after.node not in (None, home)


def test_it_is_counted_as_disk() -> None:
    entry_of = group(count=1, command="x")
    task = msgspec.structs.replace(entry_of.tasks[0], sticky=(DISK, StickyDisk(target="/more", size_bytes=2 * MIB)))
    world = World()
    world.join(node("n1"))
    free = int(world.state.nodes.disk_free[0])
    world.submit(job("app", msgspec.structs.replace(entry_of, tasks=(task,))))
    assert free - int(world.state.nodes.disk_free[0]) == 2 * task.resources.disk_bytes + 3 * MIB
