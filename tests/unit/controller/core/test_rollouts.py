"""Rollouts, drains and silent nodes: what the stories of tests/scenarios leave out."""

import pytest

from controller.core import views
from controller.core.events import (
    AllocSteerRequested,
    JobRestartRequested,
    NodeSteerRequested,
    RolloutSteerRequested,
)
from controller.core.policy import Policy
from outrider.ids import AllocId, JobName, NodeId
from outrider.model.allocation import AllocAction, Allocation, AllocStatus, CopyRole
from outrider.model.fleet import JobStatus, RolloutAction, RolloutState
from outrider.model.job import DisconnectPolicy, Job, JobType, ReschedulePolicy, RestartPolicy, Survivor, UpdatePolicy
from tests.scenarios.world import World, group, job, node

CANARY = UpdatePolicy(canary=1)


@pytest.fixture
def world() -> World:
    return three_nodes()


def three_nodes(policy: Policy | None = None) -> World:
    made = World(policy)
    made.join(node("n1"), node("n2"), node("n3"))
    return made


def shop(command: str = "v1", count: int = 3, **policies: object) -> Job:
    return job("shop", group(count=count, command=command, **policies))  # type: ignore[arg-type]


def settled(world: World, wanted: Job) -> None:
    world.submit(wanted)
    world.wait(count_s(wanted))


def count_s(wanted: Job) -> float:
    return 2.0 + sum(one.count for one in wanted.groups)


def status(world: World, name: str = "shop") -> JobStatus:
    found = views.job_status(world.state, JobName(name))
    assert found is not None
    return found


def live(world: World, name: str = "shop") -> list[Allocation]:
    """Those that are to run, or still do."""
    ended = {AllocStatus.COMPLETE, AllocStatus.FAILED, AllocStatus.LOST}
    return [one for one in status(world, name).allocations if one.status not in ended]


def steer(world: World, action: RolloutAction, name: str = "shop") -> str:
    """What the fleet says to it; "" where it was done."""
    return world.replies[world.call(RolloutSteerRequested, job=JobName(name), action=action)].message


def drain(world: World, name: str, **words: object) -> str:
    values = {"eligible": False, "drain": True, **words}
    return world.replies[world.call(NodeSteerRequested, node=NodeId(name), **values)].message


def roles(world: World) -> list[CopyRole]:
    return [one.role for one in live(world)]


@pytest.mark.parametrize("action", list(RolloutAction))
def test_a_rollout_that_is_over_cannot_be_steered(world: World, action: RolloutAction) -> None:
    settled(world, shop())
    assert f"there is nothing to {action}" in steer(world, action)


@pytest.mark.parametrize("action", list(RolloutAction))
def test_a_rollout_of_nobody_cannot_be_steered(world: World, action: RolloutAction) -> None:
    assert "no job 'shop'" in steer(world, action)


def test_what_has_no_canaries_cannot_be_promoted(world: World) -> None:
    settled(world, shop())
    world.submit(shop("v2"))
    assert "has no canaries to promote; `update: {canary: 1}`" in steer(world, RolloutAction.PROMOTE)


def test_the_first_version_needs_no_canaries(world: World) -> None:
    settled(world, shop(update=CANARY))
    assert status(world).rollout is RolloutState.SUCCESSFUL
    assert roles(world) == [CopyRole.ORDINARY] * 3


def test_another_count_needs_no_canaries(world: World) -> None:
    settled(world, shop(update=CANARY))
    settled(world, shop(count=5, update=CANARY))
    assert status(world).rollout is RolloutState.SUCCESSFUL
    assert len(live(world)) == 5


def test_the_old_count_holds_until_the_canaries_are_promoted(world: World) -> None:
    settled(world, shop())
    settled(world, shop("v2", count=1, update=CANARY))
    assert len(live(world)) == 4
    steer(world, RolloutAction.PROMOTE)
    world.wait(2)
    assert [one.job_version for one in live(world)] == [2]


def test_all_groups_with_canaries_are_promoted_together(world: World) -> None:
    def both(command: str, *, auto: bool) -> Job:
        by_itself = UpdatePolicy(canary=1, auto_promote=True)
        return job(
            "shop",
            group("a", 2, command=command, update=by_itself),
            group("b", 2, command=command, update=by_itself if auto else CANARY),
        )

    settled(world, both("v1", auto=True))
    settled(world, both("v2", auto=False))
    assert status(world).rollout is RolloutState.PROVEN
    settled(world, both("v3", auto=True))
    assert status(world).rollout is RolloutState.SUCCESSFUL


@pytest.mark.parametrize("compacted", [False, True])
def test_a_restart_of_the_controller_changes_nothing_about_a_rollout(world: World, compacted: bool) -> None:
    settled(world, shop())
    settled(world, shop("v2", update=CANARY))
    steer(world, RolloutAction.PAUSE)
    drain(world, "n3", deadline_s=600.0)
    before = status(world)
    if compacted:
        world.journal = list(world.state.snapshot())
    world.begin()
    world.join(*(agent.node for agent in world.agents.values()))
    assert status(world).rollout is RolloutState.PAUSED
    assert [(one.id, one.role) for one in status(world).allocations] == [
        (one.id, one.role) for one in before.allocations
    ]
    state = views.node_state(world.state, NodeId("n3"))
    assert state is not None
    assert not state.eligible
    assert state.drain is not None
    steer(world, RolloutAction.RESUME)
    world.wait(2)
    assert status(world).rollout is RolloutState.PROVEN


def test_a_newer_version_takes_the_canaries_of_the_one_before_back(world: World) -> None:
    settled(world, shop())
    settled(world, shop("v2", update=CANARY))
    settled(world, shop("v3", update=CANARY))
    assert sorted(one.job_version for one in live(world)) == [1, 1, 1, 3]
    settled(world, shop())
    assert [one.job_version for one in live(world)] == [1, 1, 1]
    assert status(world).rollout is RolloutState.SUCCESSFUL


def test_a_failed_rollout_is_tried_again_when_it_is_submitted_again(world: World) -> None:
    settled(world, shop())
    for agent in world.agents.values():
        agent.obedient = False
    spoilt = shop("v2", update=UpdatePolicy(healthy_deadline_s=5.0))
    settled(world, spoilt)
    world.wait(5)
    assert status(world).rollout is RolloutState.FAILED
    for agent in world.agents.values():
        agent.obedient = True
    assert world.submit(spoilt).changed
    for agent in world.agents.values():
        world.report(agent, *agent.reports())
    world.wait(5)
    assert status(world).rollout is RolloutState.SUCCESSFUL
    assert not world.submit(spoilt).changed


def test_what_an_operator_made_fail_does_not_come_good_by_itself(world: World) -> None:
    settled(world, shop())
    world.submit(shop("v2"))
    steer(world, RolloutAction.FAIL)
    world.wait(60)
    assert status(world).rollout is RolloutState.FAILED
    assert sorted(one.job_version for one in live(world)) == [1, 1, 2]


def test_a_restart_of_a_job_survives_its_file(world: World) -> None:
    settled(world, shop())
    first = {one.id for one in live(world)}
    world.call(JobRestartRequested, job=JobName("shop"))
    world.wait(6)
    assert not first & {one.id for one in live(world)}
    assert not world.submit(shop()).changed


@pytest.mark.parametrize(
    ("made", "why"), [(None, "no job 'shop' runs"), (job("shop", group(), type=JobType.BATCH), "is a batch job")]
)
def test_some_jobs_cannot_be_restarted(world: World, made: Job | None, why: str) -> None:
    if made is not None:
        world.submit(made)
    assert why in world.replies[world.call(JobRestartRequested, job=JobName("shop"))].message


@pytest.mark.parametrize("action", list(AllocAction))
def test_what_has_ended_cannot_be_restarted_or_stopped(world: World, action: AllocAction) -> None:
    settled(world, shop(count=1))
    (one,) = live(world)
    world.stop("shop")
    said = world.replies[world.call(AllocSteerRequested, alloc=one.id, action=action)]
    assert "has ended" in said.message
    said = world.replies[world.call(AllocSteerRequested, alloc=AllocId("0123456789"), action=action)]
    assert said.code == "not-found"


def test_what_runs_nowhere_cannot_be_restarted() -> None:
    world = World()
    world.submit(shop(count=1))
    (one,) = live(world)
    said = world.replies[world.call(AllocSteerRequested, alloc=one.id, action=AllocAction.RESTART)]
    assert "runs nowhere" in said.message


def test_a_newer_restart_policy_is_told_where_the_copies_run(world: World) -> None:
    settled(world, shop())
    before = {one.id for one in live(world)}
    settled(world, shop(restart=RestartPolicy(attempts=9)))
    assert {one.id for one in live(world)} == before
    running = [one for agent in world.agents.values() for one in agent.running.values()]
    assert {one.group.restart.attempts for one in running} == {9}
    assert {one.job_version for one in running} == {2}


def test_replacements_of_a_lost_node_keep_the_fleets_pace() -> None:
    world = three_nodes(Policy(replacements_burst=2.0, replacements_per_s=1.0))
    settled(world, shop(count=18))
    world.leave("n1")
    world.wait(30.1)
    assert len(live(world)) == 12 + 2
    world.wait(2.1)
    assert len(live(world)) == 12 + 4
    world.wait(10)
    assert len(live(world)) == 18


def test_nothing_stands_in_while_the_brake_is_on() -> None:
    world = World()
    world.join(*(node(f"n{at}") for at in range(1, 7)))
    settled(world, shop(count=6, disconnect=DisconnectPolicy(replace_after_s=2.0, lost_after_s=4.0)))
    for name in ("n1", "n2", "n3"):
        world.silence(name)
    world.wait(60)
    assert roles(world) == [CopyRole.ORDINARY] * 6
    world.join(world.agents[NodeId("n1")].node)
    world.wait(1)
    assert roles(world) == [CopyRole.ORDINARY] * 6, "the others may be on their way back too"
    world.wait(4)
    assert len(live(world)) == 6
    assert {one.node for one in live(world)}.isdisjoint({"n2", "n3"})


def test_the_healthy_one_of_two_survives(world: World) -> None:
    policy = DisconnectPolicy(replace_after_s=2.0, lost_after_s=60.0, survivor=Survivor.HEALTHY)
    settled(world, shop(count=1, disconnect=policy))
    (original,) = live(world)
    assert original.node is not None
    agent = world.agents[original.node]
    world.leave(original.node)
    world.wait(4)
    assert len(live(world)) == 2
    agent.running.clear()  # its host was booted anew
    agent.obedient = False
    world.join(agent.node)
    world.wait(2)
    (stays,) = live(world)
    assert stays.id != original.id
    assert stays.role is CopyRole.ORDINARY


def test_a_drained_node_keeps_system_jobs_where_that_is_asked_for(world: World) -> None:
    settled(world, job("watch", group("all"), type=JobType.SYSTEM))
    settled(world, shop())
    drain(world, "n1", keep_system=True)
    world.wait(5)
    state = views.node_state(world.state, NodeId("n1"))
    assert state is not None
    assert (state.allocations, state.drain, state.eligible) == (1, None, False)
    assert len(live(world, "watch")) == 3


def test_batch_work_ends_where_it_is_before_its_node_is_drained(world: World) -> None:
    world.submit(job("work", group("main"), type=JobType.BATCH))
    (work,) = live(world, "work")
    assert work.node is not None
    drain(world, work.node)
    world.wait(3600)
    assert [one.id for one in live(world, "work")] == [work.id]
    world.finish(work.id)
    state = views.node_state(world.state, work.node)
    assert state is not None
    assert state.drain is None


def test_an_empty_node_is_drained_at_once(world: World) -> None:
    drain(world, "n2")
    assert [event.kind for event in world.events if event.node == "n2"][-2:] == ["node.draining", "node.drained"]


def test_batch_work_is_tried_again_elsewhere_as_often_as_it_asks(world: World) -> None:
    policy = ReschedulePolicy(attempts=1, delay_s=1.0)
    world.submit(job("work", group("main", reschedule=policy), type=JobType.BATCH))
    nodes = []
    for _ in range(2):
        (one,) = live(world, "work")
        nodes.append(one.node)
        world.fail(one.id)
        world.wait(2)
    assert not live(world, "work")
    assert len(set(nodes)) == 2
    assert status(world, "work").rollout is RolloutState.FAILED


def test_what_failed_is_remembered_by_the_next_controller(world: World) -> None:
    settled(world, shop(count=1, reschedule=ReschedulePolicy(delay_s=100.0)))
    (one,) = live(world)
    world.fail(one.id)
    world.begin()
    world.join(*(agent.node for agent in world.agents.values()))
    world.wait(90)
    assert not live(world)
    world.wait(15)
    (again,) = live(world)
    assert again.node != one.node
