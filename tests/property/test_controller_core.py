"""Whatever happens, in whatever order: after every step the controller's core keeps its promises."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.core import mesh_intent, views
from controller.core import table as columns
from controller.core.commands import Append, SendAssignments
from controller.core.events import (
    AllocSteerRequested,
    JobDispatchRequested,
    JobRestartRequested,
    JobRevertRequested,
    JobScaleRequested,
    NodeSteerRequested,
    RolloutSteerRequested,
)
from controller.core.policy import Policy
from controller.core.state import State
from outrider.ids import JobName, NodeId
from outrider.model.allocation import AllocAction, AllocStatus, Generation
from outrider.model.fleet import RolloutAction, RolloutState
from outrider.model.job import DisconnectPolicy, JobType, Parameters, ReschedulePolicy, Schedule, UpdatePolicy
from tests.scenarios.world import World, group, job, node, service

NODES = ("n1", "n2", "n3", "n4", "n5")
JOBS = ("shop", "api", "batch", "everywhere")


class CheckedWorld(World):
    """Looks at the state after each step."""

    def after_step(self) -> None:
        check_accounts(self.state)
        check_names(self.state)

    def check(self) -> None:
        """After each action, when the dust has settled."""
        check_generations(self)
        check_replay(self)
        for job_name in self.state.jobs:
            assert views.job_status(self.state, job_name) is not None
        for one in self.state.nodes.nodes:
            registered = mesh_intent.registration(self.state, one.id)
            ports = [service.port for service in registered.services if service.port]
            assert len(ports) == len(set(ports))


def check_accounts(state: State) -> None:
    """No node gives more than it has, and the accounts are the sum of what is placed."""
    table, nodes = state.table, state.nodes
    for ref, one in enumerate(nodes.nodes):
        groups = [state.group_of(row) for row in state.node_rows(ref).tolist()]
        cpu = sum(entry.need.cpu_millis for entry in groups)
        memory = sum(entry.need.memory_bytes for entry in groups)
        assert nodes.cpu_free[ref] == one.fingerprint.cpu_millis - cpu >= 0
        assert nodes.memory_free[ref] == one.fingerprint.memory_bytes - memory >= 0
        assert nodes.allocations[ref] == len(groups)
        serials = table.serial[state.node_rows(ref)].tolist()
        mesh_ports = [port for serial in serials for port in state.ports.get(serial, ())]
        ports = mesh_ports + [port for entry in groups for port in entry.static_ports]
        assert len(ports) == len(set(ports)), "a port twice"
        assert set(ports) == nodes.ports[ref]
        found = one.fingerprint
        size = found.port_last - found.port_first + 1
        in_range = sum(found.port_first <= port <= found.port_last for port in ports)
        assert nodes.ports_free[ref] == size - in_range


def check_names(state: State) -> None:
    """At most one allocation is to run as a given copy of a group; families know all that is not forgotten."""
    table = state.table
    kept = np.flatnonzero(table.status[: table.size] != columns.FORGOTTEN)
    known = sorted(serial for serials in state.families.values() for serial in serials.tolist())
    assert known == sorted(table.serial[kept].tolist())
    names = [
        (*state.group_of(row).family, int(table.index[row]), int(table.role[row]))
        for row in kept.tolist()
        if table.status[row] == columns.LIVE and table.desired[row] == columns.RUN
    ]
    assert len(names) == len(set(names)), "two live allocations of one name and role"


def check_generations(world: World) -> None:
    """Generations only grow: of plans, and of what each node is sent."""
    newest: dict[str, Generation] = {}
    for command in world.commands:
        if isinstance(command, SendAssignments):
            assert command.generation > newest.get(command.node, Generation())
            newest[command.node] = command.generation
    tickets = [command.ticket for command in world.commands if isinstance(command, Append)]
    restarts = sum(later <= earlier for earlier, later in itertools.pairwise(tickets))
    assert restarts <= world.restarts


def check_replay(world: World) -> None:
    """The journal alone gives the durable state; so does a snapshot of it."""
    replayed = State.empty(world.policy)
    for record in world.journal[: len(world.journal)]:
        replayed.apply(record)
    assert packed(replayed) == packed(world.state)
    compacted = State.empty(world.policy)
    for record in replayed.snapshot():
        compacted.apply(msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=type(record)))
    assert packed(compacted) == packed(replayed)
    assert (compacted.nodes.cpu_free == replayed.nodes.cpu_free).all()
    assert compacted.nodes.ports == replayed.nodes.ports
    assert compacted.nodes.serving == replayed.nodes.serving
    assert {key: list(value) for key, value in compacted.families.items() if len(value)} == {
        key: list(value) for key, value in replayed.families.items() if len(value)
    }


def packed(state: State) -> bytes:
    return msgspec.msgpack.encode(list(state.snapshot()))


names = st.sampled_from(NODES)
commands_of_job = st.sampled_from(["v1", "v2", "v3"])
actions = st.one_of(
    st.tuples(st.just("join"), names),
    st.tuples(st.just("leave"), names),
    st.tuples(st.just("silence"), names),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 0.5, 2.0, 6.0, 40.0])),
    st.tuples(
        st.just("submit"),
        st.sampled_from(JOBS),
        st.integers(0, 7),
        commands_of_job,
        st.sampled_from([64, 900, 5000]),
        st.sampled_from([None, None, 8080]),
        st.booleans(),
    ),
    st.tuples(st.just("stop"), st.sampled_from(JOBS)),
    st.tuples(st.just("fail"), st.integers(0, 20)),
    st.tuples(st.just("finish"), st.integers(0, 20)),
    st.tuples(st.just("sick"), names),
    st.tuples(st.just("journal"), st.booleans()),
    st.tuples(st.just("restart")),
    st.tuples(st.just("withdraw"), st.booleans()),
    st.tuples(st.just("template"), st.sampled_from(["*/10 * * * * *", "", ""]), st.booleans()),
    st.tuples(st.just("dispatch"), st.booleans()),
    st.tuples(st.just("revert"), st.sampled_from(JOBS), st.integers(0, 4)),
    st.tuples(st.just("scale"), st.sampled_from(JOBS), st.integers(0, 7)),
    st.tuples(st.just("steer"), st.sampled_from(JOBS), st.sampled_from(list(RolloutAction))),
    st.tuples(st.just("restart job"), st.sampled_from(JOBS)),
    st.tuples(st.just("steer alloc"), st.integers(0, 20), st.sampled_from(list(AllocAction))),
    st.tuples(st.just("drain"), names, st.sampled_from([None, 0.0, 5.0]), st.booleans()),
    st.tuples(st.just("open"), names, st.booleans()),
)
PRIORITIES = {"shop": 50, "api": 80, "batch": 10, "everywhere": 60}  # so some make room among others
UPDATES = {
    "shop": UpdatePolicy(canary=1, healthy_deadline_s=10.0, progress_deadline_s=30.0),
    "api": UpdatePolicy(blue_green=True, auto_promote=True, healthy_deadline_s=10.0),
}
TYPES = {"batch": JobType.BATCH, "everywhere": JobType.SYSTEM}


def act(world: CheckedWorld, action: tuple[object, ...]) -> None:  # noqa: C901, PLR0912  a list of what can happen
    match action:
        case ("join", str(name)):
            world.join(node(name))
        case ("leave", str(name)) if name in world.agents:
            world.leave(name)
        case ("silence", str(name)) if name in world.agents:
            world.silence(name)
        case ("wait", float(seconds)):
            world.wait(seconds)
        case ("submit", str(name), int(count), str(command), int(memory_mib), static, bool(meshed)):
            wanted = group(
                "web",
                count,
                services=[service(name, upstreams=["shop"])] if meshed else [],
                memory_mib=memory_mib,
                static=static if isinstance(static, int) else None,
                command=command,
                update=UPDATES.get(name, UpdatePolicy(max_parallel=2, auto_revert=True, healthy_deadline_s=10.0)),
                reschedule=ReschedulePolicy(delay_s=1.0, delay_max_s=10.0),
                disconnect=DisconnectPolicy(replace_after_s=5.0) if name == "shop" else DisconnectPolicy(),
            )
            submitted = job(name, wanted, type=TYPES.get(name, JobType.SERVICE))
            world.request(msgspec.structs.replace(submitted, priority=PRIORITIES[name]))
        case ("stop", str(name)):
            world.request(JobName(name))
        case ("fail" | "finish" as how, int(at)):
            running = sorted(alloc for agent in world.agents.values() if agent.session for alloc in agent.running)
            if running:
                (world.fail if how == "fail" else world.finish)(running[at % len(running)])
        case ("sick", str(name)) if name in world.agents:
            agent = next(one for key, one in world.agents.items() if key == name)
            agent.healthy = not agent.healthy
            world.report(agent, *agent.reports())
        case ("journal", bool(works)):
            world.journal_works = works
            if works:
                world.write()
        case ("restart",):
            world.begin()
        case ("withdraw", bool(acknowledged)):
            world.withdraw_acknowledged = acknowledged
        case ("steer" | "restart job" | "steer alloc" | "drain" | "open", *_):
            act_as_operator(world, action)
        case ("template" | "dispatch" | "revert" | "scale", *_):
            act_on_versions(world, action)


def act_on_versions(world: CheckedWorld, action: tuple[object, ...]) -> None:
    """What launches jobs from others, or changes a job without a file."""
    match action:
        case ("template", str(cron), bool(overlap)):
            wanted = job("launcher", group("main", 2), type=JobType.BATCH)
            schedule = Schedule(cron=cron, overlap=overlap) if cron else None
            parameters = None if cron else Parameters(optional=("who",))
            world.request(msgspec.structs.replace(wanted, schedule=schedule, parameters=parameters))
        case ("dispatch", bool(right)):
            world.call(JobDispatchRequested, job=JobName("launcher"), parameters={"who": "me"} if right else {})
        case ("revert", str(name), int(version)):
            world.call(JobRevertRequested, job=JobName(name), version=version)
        case ("scale", str(name), int(count)):
            world.call(JobScaleRequested, job=JobName(name), group=None, count=count)


def act_as_operator(world: CheckedWorld, action: tuple[object, ...]) -> None:
    """What operators say of what runs already."""
    match action:
        case ("steer", str(name), RolloutAction() as action):
            world.call(RolloutSteerRequested, job=JobName(name), action=action)
        case ("restart job", str(name)):
            world.call(JobRestartRequested, job=JobName(name))
        case ("steer alloc", int(at), AllocAction() as action):
            live = views.allocations(world.state)
            if live:
                world.call(AllocSteerRequested, alloc=live[at % len(live)].id, action=action)
        case ("drain", str(name), deadline_s, bool(keep)):
            wanted = {"eligible": False, "drain": True, "deadline_s": deadline_s, "keep_system": keep}
            world.call(NodeSteerRequested, node=NodeId(name), **wanted)
        case ("open", str(name), bool(eligible)):
            world.call(NodeSteerRequested, node=NodeId(name), eligible=eligible)


histories = st.lists(actions, min_size=4, max_size=30)
slow = [HealthCheck.too_slow]


@settings(max_examples=120, deadline=None, suppress_health_check=slow)
@given(histories, st.integers(0, 3))
def test_every_promise_holds_after_every_step(happenings: list[tuple[object, ...]], seed: int) -> None:
    keep_promises(happenings, seed)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=5000, deadline=None, suppress_health_check=slow)
@given(histories, st.integers(0, 1000))
def test_every_promise_holds_in_many_more_histories(happenings: list[tuple[object, ...]], seed: int) -> None:
    keep_promises(happenings, seed)


@settings(max_examples=60, deadline=None, suppress_health_check=slow)
@given(histories, st.integers(0, 3))
def test_what_is_wanted_runs_once_the_world_is_well_again(happenings: list[tuple[object, ...]], seed: int) -> None:
    recover(happenings, seed)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=3000, deadline=None, suppress_health_check=slow)
@given(histories, st.integers(0, 1000))
def test_what_is_wanted_runs_after_many_more_histories(happenings: list[tuple[object, ...]], seed: int) -> None:
    recover(happenings, seed)


def keep_promises(happenings: list[tuple[object, ...]], seed: int) -> None:
    world = CheckedWorld(
        Policy(ended_kept=2, versions_kept=3, children_kept=2, plan_placements_max=5, plan_jobs_max=2), seed
    )
    world.join(node("n1"), node("n2"))
    for happening in happenings:
        act(world, happening)
        world.check()


def recover(happenings: list[tuple[object, ...]], seed: int) -> None:
    world = CheckedWorld(Policy(), seed)
    for happening in happenings:
        act(world, happening)
    world.journal_works = world.withdraw_acknowledged = True
    world.write()
    for agent in world.agents.values():
        agent.healthy = True
    world.join(*(node(name, memory_mib=1_000_000, cpu_millis=1_000_000) for name in NODES))
    for name in NODES:
        world.call(NodeSteerRequested, node=NodeId(name), eligible=True)
    world.wait(90)
    for name, entry in world.state.jobs.items():
        status = views.job_status(world.state, name)
        assert status is not None
        running = [one for one in status.allocations if one.status is AllocStatus.RUNNING]
        pending = [one for one in status.allocations if one.status is AllocStatus.PENDING]
        wanted = entry.job.groups[0]
        pinned = any(port.static for port in wanted.network.ports)
        if entry.stopped:
            assert not running
            assert not pending
        elif entry.job.type is JobType.SERVICE and not pinned:
            assert len(running) == wanted.count
            assert status.rollout is RolloutState.SUCCESSFUL or stuck(world, name)
        elif entry.job.type is JobType.SYSTEM and not pinned:
            assert len(running) == len(NODES)
        for one in running:
            assert one.node is not None
            assert one.id in world.agents[one.node].running
    live = {one.id for one in views.allocations(world.state)}
    assert {alloc for agent in world.agents.values() for alloc in agent.running} <= live, "a copy too many runs"


def stuck(world: World, name: JobName) -> bool:
    """A failed rollout touches nothing more: copies of the version before stay until somebody submits again. One that
    an operator made fail stays so, however well its copies are."""
    entry = world.state.jobs[name]
    versions = {one.job_version for one in views.allocations(world.state, job=name)}
    return entry.rollout is RolloutState.FAILED and (entry.final or versions != {entry.latest})
