"""What a submission would lead to is told before it happens, and nothing happens."""

import msgspec

from controller.core import views
from controller.core.preview import preview, twin_of
from outrider.ids import JobName
from outrider.model.fleet import JobPlan, PlannedAction, RolloutState
from outrider.model.job import Job, JobType, UpdatePolicy
from outrider.model.sidecar import SidecarKind
from tests.scenarios.world import World, group, job, node, service


def fleet(*jobs: Job, memory_mib: int = 1024) -> World:
    world = World()
    world.join(*(node(name, memory_mib=memory_mib) for name in ("n1", "n2", "n3")))
    for one in jobs:
        world.submit(one)
        world.wait(5)
    return world


def plan(world: World, wanted: Job) -> JobPlan:
    before = msgspec.msgpack.encode(list(world.state.snapshot()))
    live = repr(world.state.live)
    found = preview(twin_of(world.state), world.policy, wanted)
    assert msgspec.msgpack.encode(list(world.state.snapshot())) == before, "the plan changed something"
    assert repr(world.state.live) == live
    return found


def actions(found: JobPlan) -> list[tuple[str, str, int]]:
    return [(str(step.action), step.job, step.index) for step in found.steps]


def important(wanted: Job, priority: int) -> Job:
    return msgspec.structs.replace(wanted, priority=priority)


def test_a_new_job_is_placed_where_it_then_really_is() -> None:
    world = fleet()
    wanted = job("shop", group("web", 3))
    found = plan(world, wanted)
    assert (found.version, found.changed, found.current) == (1, True, None)
    assert found.counts == {"place": 3}
    assert {step.node_after for step in found.steps} == {"n1", "n2", "n3"}
    world.submit(wanted)
    assert {one.node for one in views.allocations(world.state)} == {"n1", "n2", "n3"}


def test_what_is_there_already_changes_nothing() -> None:
    wanted = job("shop", group("web", 3))
    found = plan(fleet(wanted), wanted)
    assert (found.changed, found.steps, found.kept) == (False, (), 3)


def test_a_larger_count_leaves_the_others_alone() -> None:
    found = plan(fleet(job("shop", group("web", 2))), job("shop", group("web", 4)))
    assert (found.counts, found.kept) == ({"place": 2}, 2)


def test_a_new_command_replaces_every_copy_through_the_whole_rollout() -> None:
    world = fleet(job("shop", group("web", 3, services=[service("web")])))
    update = UpdatePolicy(max_parallel=1)
    found = plan(world, job("shop", group("web", 3, services=[service("web")], command="other", update=update)))
    assert (found.counts, found.kept) == ({"replace": 3}, 0)
    assert found.rollout is RolloutState.SUCCESSFUL
    assert all(step.node_before and step.node_after for step in found.steps)


def test_another_kind_of_sidecar_replaces_every_copy() -> None:
    web = group("web", 2, services=[service("web")])
    shared = msgspec.structs.replace(web, sidecar=SidecarKind.SHARED)
    assert plan(fleet(job("shop", web)), job("shop", shared)).counts == {"replace": 2}


def test_a_group_that_left_is_stopped() -> None:
    found = plan(fleet(job("shop", group("web"), group("api"))), job("shop", group("web")))
    assert [(step.action, step.group) for step in found.steps] == [(PlannedAction.STOP, "api")]


def test_who_must_make_room_is_told_before() -> None:
    world = fleet(important(job("low", group("work", 3, memory_mib=900), type=JobType.BATCH), 10))
    found = plan(world, important(job("high", group("web", 1, memory_mib=800)), 80))
    assert min(actions(found))[:2] == ("place", "high")
    victims = [step for step in found.steps if step.job == "low"]
    assert [step.action for step in victims] == [PlannedAction.PREEMPT]
    assert victims[0].reason.startswith("preempted by high, priority 80; then 3 of 3 nodes: memory")
    assert {one.job for one in views.allocations(world.state)} == {"low"}


def test_what_fits_nowhere_waits_and_says_why() -> None:
    found = plan(fleet(), job("shop", group("web", 1, memory_mib=5000)))
    assert [(step.action, step.reason[:22]) for step in found.steps] == [(PlannedAction.WAIT, "3 of 3 nodes: memory 4")]


def test_a_submission_that_would_be_refused_says_so() -> None:
    world = fleet(job("shop", group("web")))
    found = plan(world, job("shop", group("web"), type=JobType.BATCH))
    assert "stop it before" in found.refusal


def test_a_plan_in_the_middle_of_an_append_starts_from_what_will_be_true() -> None:
    world = fleet()
    world.journal_works = False
    world.request(job("shop", group("web", 3)))
    found = preview(twin_of(world.state), world.policy, job("other", group("web")))
    assert found.counts["place"] == 1
    world.journal_works = True
    world.write()
    assert len(views.allocations(world.state, job=JobName("shop"))) == 3
