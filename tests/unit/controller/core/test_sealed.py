"""Secrets in the controller's core: versions, who is rolled, who is told, who may have them."""

import msgspec
import pytest

from controller.core import sealed, views
from controller.core.commands import Reply
from controller.core.events import RequestId, SecretDeleteRequested, SecretPutRequested
from controller.core.state import State
from controller.core.store_calls import VERSIONS_KEPT
from outrider.ids import DEFAULT_NAMESPACE, JobName, Namespace, NodeId, SecretName
from outrider.model.belongings import OnChange, SecretUse
from outrider.model.job import Job
from tests.scenarios.world import World, group, job, node

NAME = SecretName("db")


@pytest.fixture
def world() -> World:
    made = World()
    made.join(node("n1"), node("n2"))
    return made


def put(world: World, content: bytes, namespace: Namespace = DEFAULT_NAMESPACE) -> Reply:
    request = RequestId(10_000 + len(world.replies))
    world.send(SecretPutRequested(request=request, namespace=namespace, name=NAME, sealed=content))
    return world.replies[request]


def delete(world: World) -> Reply:
    request = RequestId(10_000 + len(world.replies))
    world.send(SecretDeleteRequested(request=request, namespace=DEFAULT_NAMESPACE, name=NAME))
    return world.replies[request]


def naming(name: str, **use: object) -> Job:
    made = job(name, group())
    (only,) = made.groups
    task = msgspec.structs.replace(only.tasks[0], secrets=(SecretUse(name=NAME, file="db", **use),))  # type: ignore[arg-type]
    return msgspec.structs.replace(made, groups=(msgspec.structs.replace(only, tasks=(task,)),))


def test_a_job_naming_what_is_not_there_is_refused_with_what_to_do(world: World) -> None:
    reply = world.submit(naming("shop"))
    assert reply.code == "conflict"
    assert reply.message == (
        "group web: task main: no secret 'db' in namespace default; `outrider secret put db` makes it"
    )


def test_one_of_another_namespace_is_not_there(world: World) -> None:
    put(world, b"1", Namespace("theirs"))
    assert "no secret 'db' in namespace default" in world.submit(naming("shop")).message


def test_a_change_is_a_new_version_of_the_jobs_that_want_to_be_rolled(world: World) -> None:
    put(world, b"1")
    world.submit(naming("rolls"))
    world.submit(naming("told", on_change=OnChange.SIGNAL))
    reply = put(world, b"2")
    assert reply.version == 2
    assert reply.warnings == ("job rolls is rolled: version 2",)
    assert world.state.jobs[JobName("rolls")].job.groups[0].secrets == {NAME: 2}
    assert world.state.jobs[JobName("told")].latest == 1
    (told,) = views.allocations(world.state, job=JobName("told"))
    agent = world.agents[told.node or NodeId("")]
    assert agent.running[told.id].secrets == {NAME: 2}


def test_the_same_job_again_changes_nothing(world: World) -> None:
    put(world, b"1")
    assert world.submit(naming("shop")).changed
    assert not world.submit(naming("shop")).changed


def test_only_the_node_that_runs_it_is_told(world: World) -> None:
    put(world, b"sealed")
    world.submit(naming("shop"))
    (placed,) = views.allocations(world.state, job=JobName("shop"))
    other = NodeId("n1" if placed.node == "n2" else "n2")
    found = sealed.held_by(world.state, placed.node or NodeId(""), placed.id)
    assert found is not None
    assert [each.sealed for each in found] == [b"sealed"]
    assert sealed.held_by(world.state, other, placed.id) is None
    world.stop("shop")
    assert sealed.held_by(world.state, placed.node or NodeId(""), placed.id) is None


def test_the_newest_few_are_kept_and_those_that_a_job_was_rolled_out_with(world: World) -> None:
    put(world, b"1")
    world.submit(naming("pinned", version=1))
    for number in range(2, 10):
        put(world, b"%d" % number)
    kept = world.state.stored.secrets[DEFAULT_NAMESPACE, NAME].versions
    assert sorted(kept) == [1, *range(10 - VERSIONS_KEPT + 1, 10)]


def test_what_a_job_names_is_not_deleted(world: World) -> None:
    put(world, b"1")
    world.submit(naming("shop"))
    assert delete(world).code == "in-use"
    world.stop("shop")
    assert delete(world).changed
    assert delete(world).code == "not-found"


def test_the_journal_alone_and_a_snapshot_give_the_same_secrets(world: World) -> None:
    for number in range(9):
        put(world, b"%d" % number)
    replayed, compacted = State.empty(), State.empty()
    for record in world.journal:
        replayed.apply(record)
    for record in replayed.snapshot():
        compacted.apply(record)
    assert world.state.stored.secrets == replayed.stored.secrets == compacted.stored.secrets
