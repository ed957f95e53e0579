"""One run: a fleet, operators, faults at random, then peace, and what must be true in the end. One seed, one run.

The production cores of controller and agents decide; network, clocks, disks and hosts are simulated. `run(seed)` raises
BrokenError where a promise does not hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from agent.core.events import TaskExit
from controller.core.commands import Reply
from controller.core.events import (
    AllocSteerRequested,
    Event,
    JobRestartRequested,
    NodeSteerRequested,
    RequestId,
    RolloutSteerRequested,
)
from controller.core.policy import Policy
from outrider.ids import JobName
from outrider.model.allocation import AllocAction
from outrider.model.fleet import RolloutAction
from outrider.model.job import DisconnectPolicy, Job, JobType, ReschedulePolicy, RestartPolicy, Survivor, UpdatePolicy
from tests.scenarios.world import group, job, node, service
from tests.sim import invariants
from tests.sim.agents import AgentProcess
from tests.sim.controllers import ControllerProcess
from tests.sim.host import Host
from tests.sim.kernel import BrokenError, Kernel
from tests.sim.network import Network
from tests.sim.store import NAME as KV
from tests.sim.store import Store

FAULTS_S = 30.0
CALM_S = 20.0  # until somebody leads for certain, and hears operators
SETTLE_S = 110.0
QUIET_S = 20.0
# The fleet's numbers, in proportion: what takes minutes there takes seconds here.
POLICY = Policy(
    heartbeat_interval_s=0.7,
    suspect_after_s=1.9,
    disconnect_grace_s=5.0,
    ended_kept=2,
    versions_kept=3,
    plan_placements_max=6,
    plan_jobs_max=2,
)
TYPES = {"batch": JobType.BATCH, "everywhere": JobType.SYSTEM}
JOBS = ("shop", "api", "single", "batch", "everywhere")


@dataclass
class Result:
    seed: int
    digest: str
    events: int
    records: int
    trace: list[str]


def run(seed: int, *, tracing: bool = False) -> Result:
    """Raises BrokenError, whose text ends with how to replay it."""
    fleet = Fleet(seed, tracing=tracing)
    try:
        fleet.live()
    except AssertionError as error:
        fleet.kernel.note("----", f"BROKEN: {error}")
        broken = BrokenError(
            f"seed {seed} at {fleet.kernel.now_s:.4f} s: {error}; `make sim SEED={seed}` shows how it came"
        )
        broken.trace = tuple(fleet.kernel.trace)
        raise broken from error
    kernel = fleet.kernel
    return Result(seed, kernel.digest, kernel.events, len(fleet.store.records), kernel.trace)


class Fleet:
    def __init__(self, seed: int, *, tracing: bool) -> None:
        self.kernel = Kernel(seed, tracing=tracing)
        rng = self.kernel.rng
        self.network = Network(self.kernel)
        self.store = Store(self.kernel, self.network)
        names = [f"c{number}" for number in range(1, rng.choice((1, 3, 3)) + 1)]
        self.controllers = [ControllerProcess(self.kernel, self.network, self.store, name, POLICY) for name in names]
        self.hosts: list[Host] = []
        self.agents = [self._agent(f"n{number}") for number in range(1, rng.randint(3, 6))]
        self._troubles: list[tuple[int, Callable[[], None]]] = [
            (4, self._kill_controller),
            (3, self._freeze_controller),
            (3, self._cut_controller_from_store),
            (5, self._cut_agent),
            (4, self._kill_agent),
            (3, self._lose_power),
            (6, self._end_task),
            (3, self._kill_sidecar),
            (2, self._fill_disk),
            (2, self._lose_store),
            (4, self._reset_stream),
            (1, self._slow_network),
            (2, self._last_will),
            (3, self._sicken),
            (2, self._fail_steps),
            (12, self._submit),
            (3, self._stop),
            (3, self._steer_rollout),
            (1, self._restart_job),
            (3, self._steer_alloc),
            (3, self._drain),
            (2, self._open_nodes),
        ]

    def _agent(self, name: str) -> AgentProcess:
        host = Host(self.kernel, name, self.hosts)
        self.hosts.append(host)
        return AgentProcess(self.kernel, self.network, host, node(name), self.controllers)

    def live(self) -> None:
        for process in (*self.controllers, *self.agents):
            self.kernel.at(self.kernel.rng.uniform(0.0, 2.0), process.start)
        self._submit()
        self._trouble_next()
        self.kernel.run(FAULTS_S)
        self._heal()
        self.kernel.run(FAULTS_S + CALM_S)
        self._open_nodes()
        self._resume_all()
        self.kernel.run(FAULTS_S + SETTLE_S)
        leader = self._leader()
        invariants.check_replay(self.store.records, leader.state)
        invariants.check_acknowledged(leader.state, self.store.acknowledged)
        invariants.check_converged(leader.state, {agent.node.id: agent.host for agent in self.agents})
        self._check_quiet(leader)

    def _leader(self) -> ControllerProcess:
        leaders = [one for one in self.controllers if one.leads]
        if len(leaders) != 1:
            raise BrokenError(f"{[one.name for one in leaders]} lead once all is well again")
        return leaders[0]

    def _check_quiet(self, leader: ControllerProcess) -> None:
        before = (self.store.index, sum(host.starts for host in self.hosts))
        self.kernel.run(FAULTS_S + SETTLE_S + QUIET_S)
        after = (self.store.index, sum(host.starts for host in self.hosts))
        if after != before or self._leader() is not leader:
            raise BrokenError(f"it does not come to rest: index and starts went from {before} to {after}")

    # Operators.

    def _submit(self) -> None:
        rng = self.kernel.rng
        name = rng.choice(JOBS)
        wanted = _job(name, rng.randint(0, 4), rng.choice(("v1", "v2", "v3")), rng.choice((64, 300, 900)))
        self.kernel.note("op", f"submits {name}: {wanted.groups[0].count} of {wanted.groups[0].tasks[0].command[0]}")
        self._call(wanted, lambda reply: self._told(name, reply))

    def _stop(self) -> None:
        name = self.kernel.rng.choice(JOBS)
        self.kernel.note("op", f"stops {name}")
        self._call(JobName(name), lambda _reply: None)

    def _told(self, name: str, reply: Reply) -> None:
        self.kernel.note("op", f"is told: {name} version {reply.version} {reply.code}")
        if not reply.code:
            self.store.acknowledge(name, reply.version)

    def _steer_rollout(self) -> None:
        name, action = JobName(self.kernel.rng.choice(JOBS)), self.kernel.rng.choice(list(RolloutAction))
        self.kernel.note("op", f"{action}s {name}")
        self._call(lambda request: RolloutSteerRequested(request=request, job=name, action=action), lambda _reply: None)

    def _resume_all(self) -> None:
        for name in JOBS:
            resume = partial(RolloutSteerRequested, job=JobName(name), action=RolloutAction.RESUME)
            self._call(lambda request, resume=resume: resume(request=request), lambda _reply: None)

    def _restart_job(self) -> None:
        name = JobName(self.kernel.rng.choice(JOBS))
        self.kernel.note("op", f"restarts {name}")
        self._call(lambda request: JobRestartRequested(request=request, job=name), lambda _reply: None)

    def _steer_alloc(self) -> None:
        allocs = sorted(alloc for agent in self.agents for alloc in agent.state.allocs)
        if allocs:
            alloc, action = self.kernel.rng.choice(allocs), self.kernel.rng.choice(list(AllocAction))
            self.kernel.note("op", f"{action}s {alloc}")
            self._call(lambda request: AllocSteerRequested(request=request, alloc=alloc, action=action),
                       lambda _reply: None)  # fmt: skip

    def _drain(self) -> None:
        node, deadline_s = self.kernel.rng.choice(self.agents).node.id, self.kernel.rng.choice((None, 0.0, 3.0, 10.0))
        drain = partial(NodeSteerRequested, node=node, eligible=False, drain=True, deadline_s=deadline_s)
        self.kernel.note("op", f"drains {node} within {deadline_s}")
        self._call(lambda request: drain(request=request), lambda _reply: None)

    def _open_nodes(self) -> None:
        for agent in self.agents:
            steer = partial(NodeSteerRequested, node=agent.node.id, eligible=True)
            self._call(lambda request, steer=steer: steer(request=request), lambda _reply: None)

    def _call(self, wanted: Job | JobName | Callable[[RequestId], Event], answered: Callable[[Reply], None]) -> None:
        leaders = [one for one in self.controllers if one.leads]
        if leaders:
            leader = self.kernel.rng.choice(leaders)
            leader.later(self.network.delay_s(), lambda: leader.call(wanted, answered))

    # Faults.

    def _trouble_next(self) -> None:
        rng = self.kernel.rng

        def trouble() -> None:
            if self.kernel.now_s < FAULTS_S:
                weights = [weight for weight, _ in self._troubles]
                rng.choices([make for _, make in self._troubles], weights)[0]()
                self._trouble_next()

        self.kernel.at(rng.expovariate(1.2), trouble)

    def _later(self, longest_s: float, act: Callable[[], None]) -> None:
        self.kernel.at(self.kernel.rng.uniform(0.05, longest_s), act)

    def _kill_controller(self) -> None:
        controller = self.kernel.rng.choice(self.controllers)
        controller.kill()
        self._later(4.0, controller.start)

    def _freeze_controller(self) -> None:
        controller = self.kernel.rng.choice(self.controllers)
        controller.note("is stopped")
        controller.freeze()
        self._later(6.0, controller.thaw)

    def _cut_controller_from_store(self) -> None:
        controller = self.kernel.rng.choice(self.controllers)
        self._cut([(controller.name, KV), (KV, controller.name)])

    def _cut_agent(self) -> None:
        agent, controller = self.kernel.rng.choice(self.agents), self.kernel.rng.choice(self.controllers)
        if self.kernel.chance(0.5):  # from all of them
            self._cut([pair for one in self.controllers for pair in ((agent.name, one.name), (one.name, agent.name))])
        else:
            self._cut([(agent.name, controller.name), (controller.name, agent.name)])

    def _cut(self, pairs: list[tuple[str, str]]) -> None:
        if self.kernel.chance(0.3):  # one way alone
            pairs = [self.kernel.rng.choice(pairs)]
        self.kernel.note("net", f"cuts {pairs}")
        for pair in pairs:
            self.network.cut(*pair)

        def heal() -> None:
            for pair in pairs:
                self.network.heal(*pair)

        self._later(12.0, heal)

    def _kill_agent(self) -> None:
        agent = self.kernel.rng.choice(self.agents)
        agent.kill()
        self._later(8.0, agent.start)

    def _lose_power(self) -> None:
        agent = self.kernel.rng.choice(self.agents)
        agent.lose_power()
        self._later(15.0, agent.start)

    def _end_task(self) -> None:
        running = sorted((host.name, key) for host in self.hosts for key in host.running())
        if running:
            name, key = self.kernel.rng.choice(running)
            code = self.kernel.rng.choice((0, 1, None))
            host = next(one for one in self.hosts if one.name == name)
            host.end(key, TaskExit(code=code, signal=9 if code is None else None))

    def _kill_sidecar(self) -> None:
        found = sorted((host.name, alloc) for host in self.hosts for alloc in host.sidecars)
        if found:
            name, alloc = self.kernel.rng.choice(found)
            next(one for one in self.hosts if one.name == name).kill_sidecar(alloc)

    def _fill_disk(self) -> None:
        disk = self.kernel.rng.choice(self.hosts).disk
        disk.full = True
        self._later(6.0, lambda: setattr(disk, "full", False))

    def _lose_store(self) -> None:
        self.kernel.note(KV, "has no leader")
        self.store.up = False
        self._later(3.0, lambda: setattr(self.store, "up", True))

    def _reset_stream(self) -> None:
        self.kernel.rng.choice(self.agents).reset_stream()

    def _slow_network(self) -> None:
        self.network.slow = self.kernel.rng.uniform(0.1, 1.0)
        self._later(5.0, lambda: setattr(self.network, "slow", 0.0))

    def _last_will(self) -> None:
        agent = self.kernel.rng.choice(self.agents)
        for controller in self.controllers:
            if controller.alive:
                controller.now(lambda one=controller: one.last_will(agent.node.id))

    def _sicken(self) -> None:
        agent = self.kernel.rng.choice(self.agents)
        allocs = sorted(agent.state.allocs)
        if allocs:
            alloc = self.kernel.rng.choice(allocs)
            agent.sick.add(alloc)
            self._later(10.0, lambda: agent.sick.discard(alloc))

    def _fail_steps(self) -> None:
        agent = self.kernel.rng.choice(self.agents)
        agent.failing = 0.3
        self._later(6.0, lambda: setattr(agent, "failing", 0.0))

    def _heal(self) -> None:
        """From here on nothing goes wrong any more."""
        self.kernel.note("----", "all faults heal")
        self.network.heal_all()
        self.store.up = True
        for host in self.hosts:
            host.disk.full = False
        for agent in self.agents:
            agent.failing = 0.0
            agent.sick.clear()
            agent.start()
        for controller in self.controllers:
            controller.thaw()
            controller.start()
            controller.compacts = False


def _job(name: str, count: int, command: str, memory_mib: int) -> Job:
    meshed = name in ("shop", "api")
    wanted = group(
        "web",
        count,
        services=[service(name, upstreams=["shop"])] if meshed else [],
        memory_mib=memory_mib,
        command=command,
        update=UpdatePolicy(
            max_parallel=2,
            auto_revert=name == "shop",
            healthy_deadline_s=8.0,
            min_healthy_s=0.3,
            canary=1 if name == "api" else 0,
            auto_promote=name == "api",
        ),
        disconnect=DisconnectPolicy(replace_after_s=2.0, survivor=Survivor.HEALTHY) if meshed else DisconnectPolicy(),
        restart=RestartPolicy(attempts=2, interval_s=10.0, delay_s=0.1, delay_max_s=1.0),
        reschedule=ReschedulePolicy(delay_s=0.5, delay_max_s=4.0, interval_s=20.0),
    )
    if name == "single":
        wanted = msgspec.structs.replace(wanted, disconnect=DisconnectPolicy(stop_after_s=3.0))
    return job(name, wanted, type=TYPES.get(name, JobType.SERVICE))
