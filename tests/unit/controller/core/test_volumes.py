"""Volumes in the controller's core: where their users go, who waits, what is refused."""

import msgspec
import pytest

from controller.core import views
from controller.core.commands import Reply
from controller.core.events import RequestId, VolumeDeleteRequested, VolumeMade, VolumeSnapshotMade
from controller.core.state import State
from outrider.ids import DEFAULT_NAMESPACE, JobName, NodeId, VolumeName
from outrider.model.allocation import Allocation
from outrider.model.belongings import Access, Volume, VolumeUse
from outrider.model.job import MIB, Driver, Job, JobType
from tests.scenarios.world import World, group, job, node

NAME = VolumeName("data")


@pytest.fixture
def world() -> World:
    made = World()
    made.join(node("n1"), node("n2"), node("n3"))
    return made


def call(world: World, kind: type, **values: object) -> Reply:
    request = RequestId(10_000 + len(world.replies))
    world.send(kind(request=request, **values))
    return world.replies[request]


def make(world: World, on: str = "n2", access: Access = Access.SINGLE, name: VolumeName = NAME) -> Reply:
    volume = Volume(name=name, namespace=DEFAULT_NAMESPACE, node=NodeId(on), size_bytes=64 * MIB, access=access)
    return call(world, VolumeMade, volume=volume)


def delete(world: World) -> Reply:
    return call(world, VolumeDeleteRequested, namespace=DEFAULT_NAMESPACE, name=NAME)


def using(name: str, *volumes: str, count: int = 1, command: str = "serve", type: JobType = JobType.SERVICE) -> Job:  # noqa: A002
    made = group(count=count, command=command)
    uses = tuple(VolumeUse(volume=VolumeName(each), target=f"/{each}") for each in volumes or (NAME,))
    task = msgspec.structs.replace(made.tasks[0], volumes=uses)
    return job(name, msgspec.structs.replace(made, tasks=(task,)), type=type)


def running(world: World, name: str) -> list[Allocation]:
    return [each for each in views.allocations(world.state, job=JobName(name)) if each.desired == "run"]


def test_what_names_it_goes_where_it_is_and_is_told_of_it(world: World) -> None:
    make(world, on="n2")
    world.submit(using("db"))
    (only,) = running(world, "db")
    assert only.node == "n2"
    (told,) = world.agents[NodeId("n2")].running[only.id].volumes
    assert (told.name, told.size_bytes) == (NAME, 64 * MIB)


def test_all_copies_go_to_one_for_many(world: World) -> None:
    make(world, on="n3", access=Access.MANY)
    world.submit(using("web", count=3))
    assert [each.node for each in running(world, "web")] == ["n3"] * 3


def test_one_for_one_at_a_time_is_waited_for(world: World) -> None:
    make(world)
    world.submit(using("first"))
    world.submit(using("second"))
    (holder,) = running(world, "first")
    (waiting,) = running(world, "second")
    assert waiting.node is None
    assert waiting.reason == f"volume data is for one at a time: allocation {holder.id} has it"
    world.stop("first")
    (placed,) = running(world, "second")
    assert placed.node == "n2"


def test_two_that_come_at_once_do_not_both_get_it(world: World) -> None:
    make(world)
    world.journal_works = False
    world.request(using("a"))
    world.request(using("b"))
    world.journal_works = True
    world.write()
    assert sorted(str(each.node) for name in ("a", "b") for each in running(world, name)) == ["None", "n2"]


def test_a_new_version_gets_it_when_the_old_one_has_ended(world: World) -> None:
    make(world)
    world.submit(using("db"))
    (before,) = running(world, "db")
    world.submit(using("db", command="serve2"))
    (after,) = running(world, "db")
    assert (after.node, after.id == before.id) == ("n2", False)


def test_it_takes_its_size_of_the_nodes_disk_until_it_goes(world: World) -> None:
    ref = world.state.nodes.reference[NodeId("n2")]
    before = int(world.state.nodes.disk_free[ref])
    make(world)
    assert int(world.state.nodes.disk_free[ref]) == before - 64 * MIB
    assert delete(world).changed
    assert int(world.state.nodes.disk_free[ref]) == before


def test_one_that_a_job_names_is_not_deleted(world: World) -> None:
    make(world)
    world.submit(using("db"))
    (holder,) = running(world, "db")
    reply = delete(world)
    assert reply.code == "in-use"
    assert f"allocation {holder.id} has it" in reply.message
    world.stop("db")
    assert delete(world).changed
    assert delete(world).code == "not-found"


def test_what_cannot_be_is_refused_with_what_to_do(world: World) -> None:
    assert "`outrider volume create data --size 1Gi` makes it" in world.submit(using("db")).message
    make(world)
    assert "make it with `--access many`, or let count be 1" in world.submit(using("db", count=2)).message
    assert "a system job runs on every node" in world.submit(using("db", type=JobType.SYSTEM)).message
    make(world, on="n1", name=VolumeName("other"))
    assert "its volumes are on different nodes" in world.submit(using("db", "data", "other")).message
    make(world, access=Access.MANY, name=VolumeName("many"))
    wanted = using("vm", "many")
    task = msgspec.structs.replace(wanted.groups[0].tasks[0], driver=Driver.VM)
    vm = msgspec.structs.replace(wanted, groups=(msgspec.structs.replace(wanted.groups[0], tasks=(task,)),))
    assert "a vm must have its disk alone" in world.submit(vm).message


def test_the_journal_alone_and_a_snapshot_give_the_same_volumes(world: World) -> None:
    make(world)
    call(world, VolumeSnapshotMade, namespace=DEFAULT_NAMESPACE, name=NAME, snapshot="first", bytes=5)
    world.submit(using("db"))
    replayed, compacted = State.empty(), State.empty()
    for record in world.journal:
        replayed.apply(record)
    for record in replayed.snapshot():
        compacted.apply(record)
    assert world.state.stored.volumes == replayed.stored.volumes == compacted.stored.volumes
    assert len(compacted.stored.volumes[DEFAULT_NAMESPACE, NAME].claims) == 1
    for state in (replayed, compacted):
        assert (state.nodes.disk_free[:3] == world.state.nodes.disk_free[:3]).all()
