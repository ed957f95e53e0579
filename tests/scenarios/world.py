"""A controller's core with an obedient world around it: a journal in a list, and agents that do as they are told.

Honest, not clever: every command is executed as the real edge would, at once and in order. A test that wants the
journal or an agent to be slow switches `journal_works` or the agent's `obedient` off.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from controller.core.commands import (
    Append,
    CloseSession,
    Command,
    PlanLaunch,
    Publish,
    Reply,
    SendAssignments,
    SyncMesh,
    WithdrawEndpoints,
)
from controller.core.events import (
    AgentApplied,
    AgentConnected,
    AgentDisconnected,
    AgentReported,
    Appended,
    EndpointsWithdrawn,
    Event,
    FiguresReported,
    HeartbeatReceived,
    JobDispatchRequested,
    JobRevertRequested,
    JobScaleRequested,
    JobStopRequested,
    JobSubmitted,
    RequestId,
    SessionId,
    Tick,
    Ticket,
)
from controller.core.policy import Policy
from controller.core.records import Record
from controller.core.state import State
from controller.core.step import step
from controller.launches import planned
from outrider.ids import AllocId, GroupName, JobName, NodeId, PortName, ServiceName, TaskName
from outrider.model.allocation import (
    TERMINAL,
    AllocFigures,
    AllocReport,
    AllocStatus,
    Assignment,
    CheckReport,
    Desired,
    Generation,
)
from outrider.model.fleet import FleetEvent
from outrider.model.job import (
    MIB,
    Group,
    Job,
    JobType,
    Network,
    Port,
    Protocol,
    Resources,
    RestartPolicy,
    Service,
    Task,
    UpdatePolicy,
    Upstream,
)
from outrider.model.node import Fingerprint, Node

START_S = 1_000.0


def node(name: str, cpu_millis: int = 4000, memory_mib: int = 8192, **found: object) -> Node:
    fingerprint = Fingerprint(
        cpu_millis=cpu_millis,
        memory_bytes=memory_mib * MIB,
        disk_bytes=100_000 * MIB,
        **{"runtimes": {"crun": "1.8.1", "conmon": "2.1.6"}, "host_image": True, **found},  # type: ignore[arg-type]
    )
    return Node(id=NodeId(name), address=f"10.0.0.{sum(name.encode()) % 250}", fingerprint=fingerprint)


def service(
    name: str,
    *,
    upstreams: Sequence[str] = (),
    allow: Sequence[str] = (),
    port: str | None = "http",
    protocol: Protocol = Protocol.TCP,
) -> Service:
    return Service(
        name=ServiceName(name),
        port=PortName(port) if port else None,
        protocol=protocol,
        upstreams=tuple(Upstream(service=ServiceName(one)) for one in upstreams),
        allow=tuple(ServiceName(one) for one in allow),
    )


def group(
    name: str = "web",
    count: int = 1,
    *,
    services: Sequence[Service] = (),
    cpu_millis: int = 100,
    memory_mib: int = 64,
    static: int | None = None,
    command: str = "serve",
    update: UpdatePolicy | None = None,
    restart: RestartPolicy | None = None,
    **policies: object,
) -> Group:
    ports = [Port(name=PortName("http"))] if services else []
    if static is not None:
        ports = [Port(name=PortName("http"), static=static)]
    task = Task(
        name=TaskName("main"),
        command=(command,),
        resources=Resources(cpu_millis=cpu_millis, memory_bytes=memory_mib * MIB),
    )
    return Group(
        name=GroupName(name),
        tasks=(task,),
        count=count,
        services=tuple(services),
        network=Network(ports=tuple(ports)),
        update=update or UpdatePolicy(),
        restart=restart or RestartPolicy(),
        **policies,  # type: ignore[arg-type]
    )


def job(name: str, *groups: Group, type: JobType = JobType.SERVICE) -> Job:  # noqa: A002  the model's own name
    return Job(name=JobName(name), groups=groups, type=type)


@dataclass
class Agent:
    """Takes up every assignment at once: what is to run is running and healthy, what is to stop has stopped."""

    node: Node
    session: SessionId | None = None
    running: dict[AllocId, Assignment] = field(default_factory=dict)
    acknowledged: Generation = field(default_factory=Generation)
    obedient: bool = True
    healthy: bool = True
    silent: bool = False

    def report(self, alloc: AllocId) -> AllocReport:
        assignment = self.running[alloc]
        return AllocReport(
            alloc=alloc,
            status=AllocStatus.RUNNING,
            checks=tuple(
                CheckReport(service=one.name, passing=self.healthy, output="" if self.healthy else "refused")
                for one in assignment.group.services
            ),
            local_address="10.9.0.2",
        )

    def reports(self) -> tuple[AllocReport, ...]:
        return tuple(self.report(alloc) for alloc in self.running)


class World:
    def __init__(self, policy: Policy | None = None, seed: int = 1) -> None:
        self.rng = random.Random(seed)  # noqa: S311  a seeded simulation
        self.policy = policy or Policy()
        self.now_s = START_S
        self.journal: list[Record] = []
        self.journal_works = True
        self.waiting: list[Append] = []
        self.commands: list[Command] = []
        self.agents: dict[NodeId, Agent] = {}
        self.replies: dict[RequestId, Reply] = {}
        self.events: list[FleetEvent] = []
        self.withdraw_acknowledged = True
        self.loads: dict[str, float] = {}  # of each job: what its copies share
        self._queue: deque[Event] = deque()
        self._sessions = 0
        self._requests = 0
        self.restarts = -1
        self.begin()

    def begin(self) -> None:
        """A controller starts on the journal as it is."""
        self.restarts += 1
        self._queue.clear()
        self.state = State.empty(self.policy)
        self.waiting.clear()
        for record in self.journal:
            self.state.apply(record)
        epoch = self.state.next_epoch(salt=0x5EED)
        self.journal.append(epoch)
        self.state.apply(epoch)
        for agent in self.agents.values():
            agent.session = None

    def send(self, event: Event) -> None:
        """One step, then all that follows from it: events queue as they do at the engine."""
        self._queue.append(event)
        if len(self._queue) > 1:
            return  # whoever sent the first is at it
        while self._queue:
            commands = step(self.state, self._queue[0], self.now_s, self.rng)
            self.after_step()
            self.commands.extend(commands)
            for command in commands:
                self._execute(command)
            self._queue.popleft()

    def after_step(self) -> None:
        """For tests that look at every state."""

    def _execute(self, command: Command) -> None:
        match command:
            case Append():
                self.waiting.append(command)
                if self.journal_works:
                    self.write()
            case Reply():
                self.replies[command.request] = command
            case Publish():
                self.events.append(command.event)
            case PlanLaunch():
                self.send(planned(command))
            case WithdrawEndpoints():
                if self.withdraw_acknowledged:
                    self.send(EndpointsWithdrawn(allocs=command.allocs))
            case SendAssignments():
                self._assign(self.agents[command.node], command)
            case CloseSession() | SyncMesh():
                pass
            case _:
                pass

    def write(self) -> None:
        """The journal does what it was asked."""
        while self.waiting:
            append = self.waiting.pop(0)
            self.journal.extend(append.records)
            self.send(Appended(ticket=Ticket(append.ticket)))

    def _assign(self, agent: Agent, command: SendAssignments) -> None:
        if agent.silent or agent.session != command.session:
            return
        assert command.generation > agent.acknowledged, "an agent rejects what is older than it acknowledged"
        agent.acknowledged = command.generation
        for assignment in command.assignments:
            if assignment.desired is Desired.RUN:
                agent.running[assignment.alloc] = assignment
        ended = tuple(
            AllocReport(alloc=one.alloc, status=AllocStatus.COMPLETE)
            for one in command.assignments
            if one.desired is Desired.STOP and agent.running.pop(one.alloc, None) is not None
        )
        session = command.session
        self.send(AgentApplied(session=session, node=command.node, generation=command.generation))
        if agent.obedient:
            started = tuple(
                agent.report(one.alloc)
                for one in command.assignments
                if one.desired is Desired.RUN and one.alloc in agent.running
            )
            self.report(agent, *started, *ended)
        else:
            self.report(agent, *ended)

    def report(self, agent: Agent, *reports: AllocReport) -> None:
        for report in reports:
            if report.status in TERMINAL:
                agent.running.pop(report.alloc, None)
        if reports and agent.session is not None:
            self.send(AgentReported(session=agent.session, node=agent.node.id, reports=reports))

    def join(self, *nodes: Node) -> None:
        for one in nodes:
            agent = self.agents.setdefault(one.id, Agent(node=one))
            agent.node = one
            self._sessions += 1
            agent.session = SessionId(self._sessions)
            agent.silent = False
            self.send(
                AgentConnected(
                    session=agent.session, node=one, acknowledged=agent.acknowledged, reports=agent.reports()
                )
            )

    def leave(self, name: str) -> None:
        """The stream ends; what runs keeps running."""
        agent = self.agents[NodeId(name)]
        session, agent.session = agent.session, None
        if session is not None:
            self.send(AgentDisconnected(session=session, node=agent.node.id, reason="stream reset"))

    def silence(self, name: str) -> None:
        """No heartbeat arrives any more, and nothing sent to it."""
        self.agents[NodeId(name)].silent = True

    def submit(self, wanted: Job) -> Reply:
        return self.replies[self.request(wanted)]

    def stop(self, name: str) -> Reply:
        return self.replies[self.request(JobName(name))]

    def dispatch(self, name: str, payload: bytes | None = None, **parameters: str) -> Reply:
        return self.replies[self.call(JobDispatchRequested, job=JobName(name), parameters=parameters, payload=payload)]

    def revert(self, name: str, version: int = 0) -> Reply:
        return self.replies[self.call(JobRevertRequested, job=JobName(name), version=version)]

    def scale(self, name: str, count: int, group_name: str | None = None) -> Reply:
        wanted = GroupName(group_name) if group_name is not None else None
        return self.replies[self.call(JobScaleRequested, job=JobName(name), group=wanted, count=count)]

    def _measure(self, agent: Agent) -> None:
        """The load of each job is shared by its copies, wherever they run."""
        copies = Counter(one.job for each in self.agents.values() for one in each.running.values())
        figures = tuple(
            AllocFigures(alloc=one.alloc, load=self.loads[one.job] / copies[one.job])
            for one in agent.running.values()
            if one.job in self.loads and one.group.scaling is not None
        )
        if figures and agent.session is not None:
            self.send(FiguresReported(session=agent.session, node=agent.node.id, figures=figures))

    def call(self, kind: Callable[..., Event], **values: object) -> RequestId:
        """An operator's; the reply comes when the journal works."""
        request = RequestId(self._requests)
        self._requests += 1
        self.send(kind(request=request, **values))
        return request

    def request(self, wanted: Job | JobName) -> RequestId:
        """A job to submit, or the name of one to stop; the reply comes when the journal works."""
        return self.call(JobSubmitted if isinstance(wanted, Job) else JobStopRequested, job=wanted)

    def ask(self, make: Callable[[RequestId], Event]) -> Reply:
        """Any other call that waits for the journal."""
        request = RequestId(self._requests)
        self._requests += 1
        self.send(make(request))
        return self.replies[request]

    def fail(self, alloc: AllocId, message: str = "exit code 1") -> None:
        """The agent gives the allocation up."""
        agent = next(one for one in self.agents.values() if alloc in one.running)
        self.report(agent, AllocReport(alloc=alloc, status=AllocStatus.FAILED, message=message, log_tail="boom"))

    def finish(self, alloc: AllocId) -> None:
        agent = next(one for one in self.agents.values() if alloc in one.running)
        self.report(agent, AllocReport(alloc=alloc, status=AllocStatus.COMPLETE))

    def wait(self, seconds: float) -> None:
        """Time passes: heartbeats arrive and timers fire when they are due."""
        end_s = self.now_s + seconds
        beat_s = self.now_s + self.policy.heartbeat_interval_s
        while True:
            deadline_s = self.state.next_deadline_s
            next_s = min(beat_s, end_s, max(deadline_s, self.now_s) if deadline_s is not None else end_s)
            self.now_s = next_s
            if next_s >= beat_s:
                beat_s += self.policy.heartbeat_interval_s
                for agent in self.agents.values():
                    if agent.session is not None and not agent.silent:
                        self.send(HeartbeatReceived(session=agent.session, node=agent.node.id))
                        self._measure(agent)
            if deadline_s is not None and deadline_s <= next_s:
                self.send(Tick())
            if next_s >= end_s:
                return
