"""What the controller's core answers to events; the longer stories are in tests/scenarios."""

import msgspec
import pytest

from controller.core import mesh_intent, views
from controller.core.access_records import NamespaceSet
from controller.core.commands import Append, CloseSession, SendAssignments, SyncMesh
from controller.core.events import (
    AccessChangeRequested,
    AgentReported,
    FingerprintChanged,
    HeartbeatReceived,
    SessionId,
    Tick,
)
from controller.core.kinds import Kind
from controller.core.policy import Policy
from controller.core.records import Plan
from controller.core.state import State
from controller.core.step import step
from controller.core.submit import job_warnings
from outrider.ids import AllocId, JobName, Namespace, NodeId, ServiceName
from outrider.model.access import NamespaceSpec
from outrider.model.allocation import Allocation, AllocReport, AllocStatus, Desired, TaskReport, TaskStatus
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType, Protocol, UpdatePolicy
from outrider.model.node import NodeStatus
from tests.scenarios.world import World, group, job, node, service


@pytest.fixture
def world() -> World:
    made = World()
    made.join(node("n1"), node("n2"))
    return made


def only(world: World, name: str = "shop") -> Allocation:
    (found,) = views.allocations(world.state, job=JobName(name))
    return found


def kinds(world: World) -> list[str]:
    return [event.kind for event in world.events]


def status_of(world: World, name: str) -> NodeStatus:
    found = views.node_state(world.state, NodeId(name))
    assert found is not None
    return found.status


def test_nothing_is_sent_before_the_journal_has_it(world: World) -> None:
    world.journal_works = False
    world.commands.clear()
    request = world.request(job("shop", group()))
    assert request not in world.replies
    assert [type(command) for command in world.commands] == [Append]
    world.journal_works = True
    world.write()
    assert world.replies[request].changed


def test_while_the_journal_works_calls_gather_for_one_append(world: World) -> None:
    world.journal_works = False
    first = world.request(job("a", group()))
    later = [world.request(job(name, group())) for name in ("b", "c", "d")]
    assert len(world.waiting) == 1
    world.commands.clear()
    world.journal_works = True
    world.write()
    appends = [command for command in world.commands if isinstance(command, Append)]
    added = [[type(record).__name__ for record in append.records].count("JobVersionAdded") for append in appends]
    assert [count for count in added if count] == [3]
    assert all(world.replies[request].version == 1 for request in (first, *later))


def test_calls_and_decisions_take_turns(world: World) -> None:
    world.journal_works = False
    world.request(job("a", group()))
    world.request(job("b", group()))
    world.commands.clear()
    world.journal_works = True
    world.write()
    kinds = [
        {type(record).__name__ for record in command.records}
        for command in world.commands
        if isinstance(command, Append)
    ]
    assert [("Plan" in kind, "JobVersionAdded" in kind) for kind in kinds][:3] == [
        (True, False),
        (False, True),
        (True, False),
    ]


def test_many_jobs_are_decided_in_steps_and_none_is_forgotten() -> None:
    world = World(Policy(plan_jobs_max=3))
    world.join(node("n1"))
    world.journal_works = False
    for at in range(11):
        world.request(job(f"j{at}", group(cpu_millis=10, memory_mib=8)))
    world.journal_works = True
    world.write()
    world.wait(5)
    assert all(entry.rollout is RolloutState.SUCCESSFUL for entry in world.state.jobs.values())
    plans = [record for record in world.journal if isinstance(record, Plan)]
    assert max(len({run.job for run in plan.runs}) for plan in plans) == 3
    # A new controller looks at all of them, and finds nothing to do.
    world.begin()
    world.join(node("n1"))
    world.wait(5)
    assert len(views.allocations(world.state)) == 11
    assert not world.state.live.dirty_jobs


def test_two_submissions_of_one_job_in_one_batch_are_two_versions(world: World) -> None:
    world.journal_works = False
    requests = [world.request(job("shop", group(command=command))) for command in ("v1", "v2", "v2")]
    world.journal_works = True
    world.write()
    assert [world.replies[request].version for request in requests] == [1, 2, 2]
    assert [world.replies[request].changed for request in requests] == [True, True, False]


def test_new_names_of_one_batch_get_addresses_of_their_own(world: World) -> None:
    world.journal_works = False
    for name in ("x", "a", "b"):
        world.request(job(name, group(services=[service(name, upstreams=[f"{name}-db"])])))
    world.journal_works = True
    world.write()
    indices = mesh_intent.virtual_indices(world.state)
    assert set(indices) == {"x", "x-db", "a", "a-db", "b", "b-db"}
    assert sorted(indices.values()) == list(range(6))


def test_too_many_waiting_calls_are_told_to_come_back() -> None:
    world = World(Policy(operator_calls_max=2))
    world.journal_works = False
    requests = [world.request(job(f"j{at}", group())) for at in range(4)]
    assert world.replies[requests[-1]].code == "busy"


def test_a_running_job_does_not_change_its_type(world: World) -> None:
    world.submit(job("shop", group()))
    reply = world.submit(job("shop", group(), type=JobType.BATCH))
    assert (reply.code, reply.changed) == ("conflict", False)
    assert "stop it before it becomes a batch job" in reply.message


def test_a_job_never_changes_its_namespace(world: World) -> None:
    team = NamespaceSet(namespace=NamespaceSpec(name=Namespace("team-b")))
    assert world.ask(lambda request: AccessChangeRequested(request=request, change=team)).changed
    world.submit(job("shop", group()))
    world.stop("shop")
    moved = msgspec.structs.replace(job("shop", group()), namespace=Namespace("team-b"))
    reply = world.submit(moved)
    assert (reply.code, reply.changed) == ("conflict", False)
    assert "in another namespace already" in reply.message


def test_groups_of_one_job_agree_on_a_services_protocol(world: World) -> None:
    groups = (
        group("a", services=[service("web", protocol=Protocol.HTTP)]),
        group("b", services=[service("web", protocol=Protocol.TCP)]),
    )
    assert world.submit(job("shop", *groups)).code == "conflict"


def test_a_stopped_job_stays_visible_and_starts_again_when_submitted(world: World) -> None:
    wanted = job("shop", group(services=[service("web")]))
    world.submit(wanted)
    assert world.stop("shop").changed
    assert not world.stop("shop").changed
    status = views.job_status(world.state, JobName("shop"))
    assert status is not None
    assert status.job.stopped
    assert status.rollout is RolloutState.STOPPED
    assert not mesh_intent.owned_intentions(world.state)
    again = world.submit(wanted)
    assert (again.version, again.changed) == (2, True)
    assert only(world).status is AllocStatus.RUNNING


def test_a_count_of_zero_runs_nothing_and_succeeds(world: World) -> None:
    world.submit(job("shop", group(count=0)))
    status = views.job_status(world.state, JobName("shop"))
    assert status is not None
    assert (status.allocations, status.rollout) == ((), RolloutState.SUCCESSFUL)


def test_an_unknown_source_in_allow_is_no_warning_and_an_own_upstream_neither(world: World) -> None:
    wanted = job("shop", group(services=[service("web", upstreams=["web"], allow=["nobody"])]))
    assert job_warnings(world.state, wanted) == ()
    world.submit(wanted)
    (owned,) = mesh_intent.owned_intentions(world.state)
    assert (owned.source, owned.destination, owned.job) == ("nobody", "web", "shop")


def test_only_the_last_few_that_ended_are_kept(world: World) -> None:
    world.submit(job("shop", group()))
    for at in range(8):
        world.fail(only(world).id, f"crash {at}")
        world.wait(400)
    found = views.allocations(world.state, job=JobName("shop"), terminal=True)
    assert [one.reason for one in found] == [*(f"crash {at}" for at in range(3, 8)), ""]
    assert all(one.report is not None and one.report.log_tail == "boom" for one in found[:-1])


def test_a_failed_allocation_keeps_its_report_after_a_restart(world: World) -> None:
    world.submit(job("shop", group()))
    world.fail(only(world).id, "out of memory")
    world.begin()
    (failed,) = views.allocations(world.state, terminal=True)
    assert failed.status is AllocStatus.FAILED
    assert failed.report is not None
    assert failed.report.log_tail == "boom"


def test_a_failed_batch_allocation_is_not_replaced(world: World) -> None:
    world.submit(job("night", group(), type=JobType.BATCH))
    world.fail(only(world, "night").id)
    world.wait(60)
    assert views.allocations(world.state) == ()
    status = views.job_status(world.state, JobName("night"))
    assert status is not None
    assert status.rollout is RolloutState.FAILED


def test_a_lost_batch_allocation_is_replaced(world: World) -> None:
    world.submit(job("night", group(), type=JobType.BATCH))
    before = only(world, "night")
    assert before.node is not None
    world.leave(before.node)
    world.wait(31)
    after = only(world, "night")
    assert after.node not in (None, before.node)


def test_an_older_session_is_closed_and_its_words_are_void(world: World) -> None:
    world.submit(job("shop", group()))
    alloc = only(world)
    assert alloc.node is not None
    old = world.agents[alloc.node].session
    world.join(world.agents[alloc.node].node)
    assert [command.session for command in world.commands if isinstance(command, CloseSession)] == [old]
    gone = AllocReport(alloc=alloc.id, status=AllocStatus.FAILED)
    world.send(AgentReported(session=SessionId(old or 0), node=alloc.node, reports=(gone,)))
    assert only(world).status is AllocStatus.RUNNING


def test_what_nobody_knows_is_kept_and_told_once(world: World) -> None:
    session = world.agents[NodeId("n1")].session
    assert session is not None
    report = AllocReport(alloc=AllocId("ffffffffff"), status=AllocStatus.RUNNING)
    world.commands.clear()
    for _ in range(2):
        world.send(AgentReported(session=session, node=NodeId("n1"), reports=(report,)))
    assert kinds(world).count(Kind.ALLOC_UNCLAIMED) == 1
    assert not [command for command in world.commands if isinstance(command, SendAssignments)]


def test_what_was_forgotten_and_still_runs_is_told_to_stop(world: World) -> None:
    world.submit(job("shop", group()))
    first = only(world)
    assert first.node is not None
    forgotten = world.agents[first.node].running[first.id]
    for _ in range(7):
        world.fail(only(world).id)
        world.wait(400)
    assert views.allocation(world.state, first.id) is None
    agent = world.agents[first.node]
    agent.running[first.id] = forgotten
    world.commands.clear()
    world.report(agent, agent.report(first.id))
    (told,) = [command for command in world.commands if isinstance(command, SendAssignments) and command.assignments]
    assert [(one.alloc, one.desired) for one in told.assignments] == [(first.id, Desired.STOP)]


def test_an_agent_that_claims_anothers_allocation_learns_nothing_and_changes_nothing(world: World) -> None:
    world.submit(job("shop", group()))
    alloc = only(world)
    other = world.agents[NodeId("n1" if alloc.node == "n2" else "n2")]
    world.commands.clear()
    world.report(other, AllocReport(alloc=alloc.id, status=AllocStatus.FAILED))
    world.report(other, AllocReport(alloc=alloc.id, status=AllocStatus.RUNNING))
    assert only(world).status is AllocStatus.RUNNING
    told = [command for command in world.commands if isinstance(command, SendAssignments)]
    assert [(one.desired, one.group.tasks) for command in told for one in command.assignments] == [(Desired.STOP, ())]


def test_an_agent_that_lost_its_memory_is_told_everything_again(world: World) -> None:
    world.submit(job("shop", group(services=[service("web")])))
    alloc = only(world)
    assert alloc.node is not None
    agent = world.agents[alloc.node]
    agent.running.clear()
    agent.obedient = False
    world.join(agent.node)
    assert only(world).status is AllocStatus.PENDING
    assert not only(world).healthy
    assert list(agent.running) == [alloc.id]


def test_a_restart_of_a_task_is_an_event_with_its_reason(world: World) -> None:
    world.submit(job("shop", group()))
    alloc = only(world)
    assert alloc.node is not None
    task = TaskReport(name=group().tasks[0].name, status=TaskStatus.BACKOFF, restarts=1, message="killed by signal 9")
    report = AllocReport(alloc=alloc.id, status=AllocStatus.RUNNING, tasks=(task,))
    world.report(world.agents[alloc.node], report)
    assert [event.message for event in world.events if event.kind == Kind.ALLOC_RESTARTED] == ["killed by signal 9"]


def test_no_deadline_runs_while_an_image_is_on_its_way(world: World) -> None:
    for agent in world.agents.values():
        agent.obedient = False
    world.submit(job("shop", group(update=UpdatePolicy(healthy_deadline_s=10.0))))
    alloc = only(world)
    assert alloc.node is not None

    def rollout() -> RolloutState:
        found = views.job_status(world.state, JobName("shop"))
        assert found is not None
        return found.rollout

    def says(*, pulling: bool) -> None:
        assert alloc.node is not None
        report = AllocReport(alloc=alloc.id, status=AllocStatus.STARTING, pulling=pulling)
        world.report(world.agents[alloc.node], report)

    world.wait(5)
    says(pulling=True)
    world.wait(60)
    assert rollout() is RolloutState.RUNNING
    says(pulling=False)
    world.wait(4)
    assert rollout() is RolloutState.RUNNING
    world.wait(2)
    assert rollout() is RolloutState.FAILED


def test_a_heartbeat_makes_a_suspect_ready_again(world: World) -> None:
    world.silence("n1")
    world.wait(1)
    assert status_of(world, "n1") is NodeStatus.SUSPECT
    assert not mesh_intent.registration(world.state, NodeId("n1")).passing
    world.agents[NodeId("n1")].silent = False
    world.wait(0.4)
    assert status_of(world, "n1") is NodeStatus.READY
    assert mesh_intent.registration(world.state, NodeId("n1")).passing


def test_a_controller_that_slept_blames_nobody(world: World) -> None:
    world.now_s += 20
    world.send(Tick())
    assert status_of(world, "n1") is NodeStatus.READY
    for agent in world.agents.values():
        assert agent.session is not None
        world.send(HeartbeatReceived(session=agent.session, node=agent.node.id))
    world.wait(2)
    assert status_of(world, "n1") is NodeStatus.READY


def test_a_node_that_was_down_comes_back_on_the_stream_that_never_closed(world: World) -> None:
    world.submit(job("shop", group()))
    alloc = only(world)
    assert alloc.node is not None
    world.silence(alloc.node)
    world.wait(40)
    assert status_of(world, alloc.node) is NodeStatus.DOWN
    world.agents[alloc.node].silent = False
    world.wait(1)
    assert status_of(world, alloc.node) is NodeStatus.READY
    world.report(world.agents[alloc.node], *world.agents[alloc.node].reports())
    assert alloc.id not in world.agents[alloc.node].running


def test_a_node_that_is_back_before_the_journal_knew_it_was_down_registers_again(world: World) -> None:
    world.leave("n1")
    world.wait(29.9)
    world.journal_works = False
    world.wait(0.2)
    world.join(node("n1"))
    world.journal_works = True
    world.write()
    assert status_of(world, "n1") is NodeStatus.READY
    assert not world.state.nodes.down[world.state.nodes.reference[NodeId("n1")]]


def test_a_fingerprint_that_grew_makes_room(world: World) -> None:
    world.submit(job("large", group(memory_mib=20_000)))
    assert only(world, "large").reason == "2 of 2 nodes: memory 19.5 GiB wanted, at most 8.0 GiB free"
    agent = world.agents[NodeId("n1")]
    grown = msgspec.structs.replace(agent.node.fingerprint, memory_bytes=1 << 40)
    assert agent.session is not None
    world.send(FingerprintChanged(session=agent.session, node=NodeId("n1"), fingerprint=grown))
    assert only(world, "large").status is AllocStatus.RUNNING


def test_the_first_step_tells_the_mesh_of_everything_that_was_replayed(world: World) -> None:
    world.submit(job("shop", group(services=[service("web", upstreams=["api"])])))
    alloc = only(world)
    world.begin()
    assert world.state.next_deadline_s == 0.0
    world.commands.clear()
    world.send(Tick())
    assert world.commands == [SyncMesh(nodes=(NodeId("n1"), NodeId("n2")), intentions=True)]
    assert alloc.node is not None
    wanted = mesh_intent.registration(world.state, alloc.node)
    assert wanted.assumed
    assert [(one.passing, one.upstreams) for one in wanted.services] == [(True, (ServiceName("api"),))]


def test_a_leaf_goes_only_where_the_service_is_placed(world: World) -> None:
    world.submit(job("shop", group(services=[service("web", upstreams=["api"])])))
    alloc = only(world)
    assert alloc.node is not None
    other = NodeId("n1" if alloc.node == "n2" else "n2")
    web, api = ServiceName("web"), ServiceName("api")
    assert mesh_intent.may_hold_leaf(world.state, alloc.node, web)
    assert not mesh_intent.may_hold_leaf(world.state, other, web)
    assert not mesh_intent.may_hold_leaf(world.state, alloc.node, api)
    assert mesh_intent.interests(world.state, alloc.node) == mesh_intent.Interests(
        called=frozenset({api}), placed=frozenset({web})
    )
    world.leave(alloc.node)
    world.wait(31)
    assert not mesh_intent.may_hold_leaf(world.state, alloc.node, web)


def test_ids_are_found_by_prefix(world: World) -> None:
    world.submit(job("shop", group(count=40)))
    found = views.allocations(world.state)
    assert views.allocation_by_prefix(world.state, found[0].id) == found[0]
    assert isinstance(views.allocation_by_prefix(world.state, ""), views.Ambiguous)
    assert views.allocation_by_prefix(world.state, "zz") is None
    unique = next(one.id for one in found if sum(other.id[:4] == one.id[:4] for other in found) == 1)
    by_prefix = views.allocation_by_prefix(world.state, unique[:4])
    assert isinstance(by_prefix, Allocation)
    assert by_prefix.id == unique


def test_summaries_count_what_operators_ask_for(world: World) -> None:
    world.submit(job("shop", group("web", 2, services=[service("web")]), group("large", memory_mib=99_999)))
    (summary,) = views.job_summaries(world.state)
    assert (summary.wanted, summary.running, summary.healthy, summary.pending, summary.failed) == (3, 2, 2, 1, 0)
    fleet = views.fleet_summary(world.state)
    assert (fleet.nodes_ready, fleet.nodes, fleet.jobs, fleet.allocations) == (2, 2, 1, 3)
    (one, two) = views.allocations_of_service(world.state, ServiceName("web"))
    assert {one.group, two.group} == {"web"}


def test_old_versions_are_dropped_unless_something_runs_from_them() -> None:
    world = World(Policy(versions_kept=3, ended_kept=1))
    world.join(node("n1"))
    for at in range(8):
        world.submit(job("shop", group(command=f"v{at}")))
        world.wait(3)
    assert len(world.state.jobs[JobName("shop")].versions) <= 4
    assert len(world.state.groups) <= 4


def test_large_placements_are_told_as_one_event_and_planned_in_parts() -> None:
    world = World(Policy(plan_placements_max=40, events_each_max=10))
    world.join(node("n1"), node("n2"))
    world.submit(job("many", group(count=100, cpu_millis=10, memory_mib=8), type=JobType.BATCH))
    placed = [event.message for event in world.events if event.kind == Kind.ALLOC_PLACED]
    assert placed == [f"{count} allocations of web placed, 0 pending" for count in (40, 40, 20)]
    assert len(views.allocations(world.state)) == 100


def test_a_step_depends_on_its_arguments_alone() -> None:
    def history() -> list[bytes]:
        world = World(seed=7)
        world.join(node("n1"), node("n2"), node("n3"))
        world.submit(job("shop", group(count=5, services=[service("web")])))
        world.leave("n2")
        world.wait(35)
        return [msgspec.msgpack.encode(record) for record in world.journal]

    assert history() == history()


def test_an_empty_state_asks_for_nothing() -> None:
    world = World()
    assert step(State.empty(), Tick(), 0.0, world.rng) == (SyncMesh(nodes=(), intentions=True),)
