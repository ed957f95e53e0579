"""The agent's core against a host that fails, dies and answers in any order: what must hold at every step."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core import commands, events, exposed
from agent.core.lifecycle import Phase
from agent.core.state import State, next_deadline_s
from agent.core.step import all_reports, step
from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import TERMINAL, Assignment, Desired, Generation
from outrider.model.job import (
    PULLED,
    Check,
    CheckKind,
    Group,
    Image,
    ImageKind,
    Network,
    Port,
    RestartPolicy,
    Service,
    Task,
    TaskRole,
)

ALLOCS = tuple(AllocId(f"{number:010x}") for number in (0, 1, 2, 3, 4, 7))


def assignment(alloc: AllocId, desired: Desired = Desired.RUN) -> Assignment:
    """With and without a service, service and batch, two plain tasks or two init tasks, a main one and a helper.

    One task of each has its image fetched, which may have to say where it listens.
    """
    number = int(alloc, 16)
    check = Check(kind=CheckKind.TCP, interval_s=1.0)
    service = Service(name=ServiceName("web"), port=PortName("http"), check=check)
    fetched = Image(kind=ImageKind.OCI, reference="registry.test/app:1")
    plain = (Task(name=TaskName("a"), image=fetched), Task(name=TaskName("b")))
    roles = (
        Task(name=TaskName("first"), role=TaskRole.INIT),
        Task(name=TaskName("main"), image=fetched),
        Task(name=TaskName("second"), role=TaskRole.INIT),
        Task(name=TaskName("helper"), role=TaskRole.HELPER),
    )
    group = Group(
        name=GroupName("web"),
        tasks=roles if number >= 4 else plain,
        restart=RestartPolicy(attempts=2, interval_s=20.0, delay_s=0.5),
        network=Network(ports=(Port(name=PortName("http"), from_image=number % 4 == 3),)),
        services=(service,) if number % 2 else (),
    )
    return Assignment(
        alloc=alloc,
        job=JobName("shop"),
        job_version=1,
        group=group,
        index=number,
        batch=number % 4 >= 2,
        desired=desired,
    )


class Host:
    """What the edges would do, with every outcome drawn; checks the rules whenever something is asked of it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - no secret
        self.state = State(allocs={}, strays={})
        self.now_s = 1000.0
        self.disk: dict[AllocId, events.AllocRecord] = {}
        self.acknowledged = Generation()
        self.networks: set[AllocId] = set()
        self.images: set[AllocId] = set()  # kept on the node
        self.sidecars: dict[AllocId, bool] = {}  # whether it serves
        self.tasks: dict[tuple[AllocId, TaskName], events.TaskExit | None] = {}
        self.prepared: set[tuple[AllocId, str]] = set()  # init tasks that ended well
        self.pending: list[commands.Command] = []
        self.generation = Generation(epoch=1, counter=0)
        self.kind = True  # no failures from now on
        self.wanted: dict[AllocId, Desired] = {}

    def tell(self, event: events.Event) -> None:
        for command in step(self.state, event, self.now_s, self.rng):
            self.take(command)

    def take(self, command: commands.Command) -> None:
        if isinstance(
            command, commands.CreateNetwork | commands.StartSidecar | commands.CreateTask | commands.StartTask
        ):
            assert not exposed.is_open(command.assignment), "nobody knows where it listens"
        match command:
            case commands.StartTask():
                alloc = command.assignment.alloc
                assert alloc in self.networks
                assert alloc in self.disk, "a restarted agent would not know it"
                assert not command.assignment.group.services or self.sidecars.get(alloc), "before its sidecar serves"
                assert self.tasks.get((alloc, command.task.name), 0) is not None, "it runs already"
                self.may_start(alloc, command.task)
                assert alloc in self.images or command.task.image.kind not in PULLED, "its image may be gone"
            case commands.CreateTask():
                alloc = command.assignment.alloc
                assert alloc in self.networks
                assert (alloc, command.task.name) not in self.tasks, "it has run already"
                self.may_start(alloc, command.task)
                assert alloc in self.images or command.task.image.kind not in PULLED, "its image may be gone"
            case commands.StartSidecar():
                assert command.assignment.alloc in self.networks
                assert command.assignment.alloc not in self.sidecars, "a second sidecar"
            case commands.StopTask(alloc=alloc, task=Task(role=TaskRole.HELPER)):
                others = [name for owner, name in self.tasks if owner == alloc and name != "helper"]
                assert all(self.tasks[alloc, name] for name in others), "helpers end last"
            case commands.StopSidecar():
                assert not self.running(command.alloc), "the sidecar ends last"
            case commands.Report(report=report) if report.status in TERMINAL:
                assert not self.has_anything(report.alloc), "ended, yet something is left"
                assert self.disk[report.alloc].ended, "a restarted agent would begin it again"
            case _:
                pass
        if isinstance(command, commands.Save | commands.Acknowledge) and self.rng.random() < 0.7:
            self.perform(command)
        elif not isinstance(command, commands.Report | commands.Note):
            self.pending.append(command)

    def may_start(self, alloc: AllocId, task: Task) -> None:
        if int(alloc, 16) >= 4:
            before = {"first": (), "second": ("first",)}.get(task.name, ("first", "second"))
            assert all((alloc, name) in self.prepared for name in before), "out of turn"

    def running(self, alloc: AllocId) -> bool:
        return any(key[0] == alloc and exit_ is None for key, exit_ in self.tasks.items())

    def has_anything(self, alloc: AllocId) -> bool:
        return alloc in self.networks or alloc in self.sidecars or any(key[0] == alloc for key in self.tasks)

    def fails(self) -> bool:
        return not self.kind and self.rng.random() < 0.2

    def perform(self, command: commands.Command) -> None:  # noqa: C901, PLR0912 - one arm per command
        match command:
            case commands.Save(record=record):
                self.disk[record.assignment.alloc] = record
                if command.announce:
                    self.tell(events.Saved(alloc=record.assignment.alloc, ended=record.ended))
            case commands.Acknowledge(generation=generation):
                self.acknowledged = max(generation, self.acknowledged)
            case commands.Forget(alloc=alloc):
                self.disk.pop(alloc, None)
            case commands.CreateNetwork():
                alloc = command.assignment.alloc
                self.networks.add(alloc)
                if self.fails():
                    self.tell(events.StepFailed(alloc=alloc, message="no", retry=self.rng.random() < 0.9))
                else:
                    self.tell(events.NetworkReady(alloc=alloc, local_address="100.64.0.2"))
            case commands.PullImages(assignment=assignment):
                if self.rng.random() < 0.5:
                    self.tell(events.ImagesOnTheirWay(alloc=assignment.alloc, message="pulling"))
                if self.fails():
                    retry = self.rng.random() < 0.9
                    self.tell(events.ImagesFailed(alloc=assignment.alloc, message="no", retry=retry))
                else:
                    self.images.add(assignment.alloc)
                    number = self.rng.choice((80, 443))
                    self.tell(events.ImagesReady(alloc=assignment.alloc, exposed={TaskName("a"): (number,)}))
            case commands.StartSidecar() | commands.AdoptSidecar():
                alloc = command.assignment.alloc
                if isinstance(command, commands.StartSidecar) and self.fails():
                    self.sidecars.pop(alloc, None)
                    self.tell(events.StepFailed(alloc=alloc, message="no"))
                elif isinstance(command, commands.StartSidecar) or alloc in self.sidecars:
                    self.sidecars[alloc] = True
                    self.tell(events.SidecarReady(alloc=alloc))
                else:
                    self.tell(events.SidecarExited(alloc=alloc, message="it died meanwhile"))
            case commands.StartTask():
                alloc, name = command.assignment.alloc, command.task.name
                if self.fails():
                    self.tell(
                        events.TaskStartFailed(alloc=alloc, task=name, message="no", retry=self.rng.random() < 0.9)
                    )
                else:
                    self.tasks[alloc, name] = None
                    self.tell(events.TaskStarted(alloc=alloc, task=name, started_at_s=1.0))
            case commands.AdoptTask():
                pass  # `end` tells
            case commands.CreateTask():
                pass  # nothing of it runs
            case commands.StopTask(alloc=alloc, task=task):
                self.end(alloc, task.name, events.TaskExit(code=143, signal=15))
            case commands.RunCheck():
                passing = self.rng.random() < 0.8
                self.tell(events.CheckRan(alloc=command.alloc, service=command.service, passing=passing))
            case commands.DrainSidecar(alloc=alloc):
                self.tell(events.SidecarDrained(alloc=alloc))
            case commands.StopSidecar(alloc=alloc):
                self.sidecars.pop(alloc, None)
                self.drop_pending(alloc, commands.StartSidecar)
                self.tell(events.SidecarStopped(alloc=alloc))
            case commands.Clean(alloc=alloc):
                if self.fails():
                    self.tell(events.StepFailed(alloc=alloc, message="busy"))
                    return
                self.networks.discard(alloc)
                self.images.discard(alloc)
                self.drop_pending(alloc, commands.PullImages)
                self.drop_pending(alloc, commands.CreateTask)
                self.sidecars.pop(alloc, None)
                for key in [key for key in self.tasks if key[0] == alloc]:
                    del self.tasks[key]
                self.tell(events.Cleaned(alloc=alloc))
            case _:
                raise AssertionError(command)

    def drop_pending(self, alloc: AllocId, kind: type) -> None:
        """The edge cancels a start that it is told to stop."""
        self.pending = [
            command for command in self.pending if not (isinstance(command, kind) and command.assignment.alloc == alloc)
        ]

    def end(self, alloc: AllocId, task: TaskName, exit_: events.TaskExit) -> None:
        if self.tasks.get((alloc, task), exit_) is None:
            self.tasks[alloc, task] = exit_
            if exit_.code == 0:
                self.prepared.add((alloc, task))
            self.tell(events.TaskExited(alloc=alloc, task=task, exit=exit_))

    def answer_one(self) -> None:
        if not self.pending:
            return
        # What is written is written in order; all else overtakes.
        index = self.rng.randrange(len(self.pending))
        disk = (commands.Save, commands.Acknowledge, commands.Forget)
        if isinstance(self.pending[index], disk):
            index = next(number for number, command in enumerate(self.pending) if isinstance(command, disk))
        self.perform(self.pending.pop(index))

    def assign(self, *, full: bool) -> None:
        self.generation = Generation(epoch=1, counter=self.generation.counter + 1)
        for alloc in ALLOCS:
            draw = self.rng.random()
            if draw < 0.3:
                self.wanted.setdefault(alloc, Desired.RUN)
            elif draw < 0.4 and alloc in self.wanted:
                self.wanted[alloc] = Desired.STOP
        given = tuple(assignment(alloc, desired) for alloc, desired in self.wanted.items())
        self.tell(events.Assigned(generation=self.generation, full=full, assignments=given))

    def kill_agent(self) -> None:
        """kill -9: what was under way may or may not have happened; a new agent looks around."""
        for command in self.pending:
            if isinstance(command, commands.CreateNetwork) and self.rng.random() < 0.5:
                self.networks.add(command.assignment.alloc)
        self.pending = []
        self.state = State(allocs={}, strays={})
        self.tell(events.Recovered(acknowledged=self.acknowledged, found=self.found()))

    def found(self) -> tuple[events.Found, ...]:
        allocs = self.disk.keys() | self.networks | self.sidecars.keys() | {alloc for alloc, _ in self.tasks}
        return tuple(
            events.Found(
                alloc=alloc,
                record=self.disk.get(alloc),
                local_address="100.64.0.2" if alloc in self.networks else None,
                sidecar=alloc in self.sidecars,
                tasks={
                    name: events.FoundTask(exit=exit_, started_at_s=1.0)
                    for (owner, name), exit_ in self.tasks.items()
                    if owner == alloc
                },
            )
            for alloc in sorted(allocs)
        )

    def pass_time(self) -> None:
        deadline_s = next_deadline_s(self.state)
        if deadline_s != float("inf"):
            self.now_s = max(self.now_s, deadline_s)
            self.tell(events.Tick())

    def something_happens(self) -> None:
        draw = self.rng.random()
        running = [key for key, exit_ in self.tasks.items() if exit_ is None]
        if draw < 0.6:
            self.answer_one()
        elif draw < 0.75:
            self.pass_time()
        elif draw < 0.85:
            self.assign(full=self.rng.random() < 0.3)
        elif draw < 0.92 and running:
            code = self.rng.choice((0, 1, None))
            self.end(*self.rng.choice(running), events.TaskExit(code=code, signal=None if code is not None else 9))
        elif draw < 0.96 and self.sidecars:
            alloc = self.rng.choice(list(self.sidecars))
            del self.sidecars[alloc]
            self.drop_pending(alloc, commands.AdoptSidecar)
            self.tell(events.SidecarExited(alloc=alloc, message="envoy died"))
        elif draw > 0.985:
            self.kill_agent()

    def settle(self) -> None:
        """No faults any more: everything asked is done, and due times come."""
        self.kind = True
        for _ in range(3000):
            initial = [(alloc, name) for (alloc, name), exit_ in self.tasks.items()
                       if exit_ is None and name in {"first", "second"}]  # fmt: skip
            if self.pending:
                self.answer_one()
            elif initial:
                self.end(*initial[0], events.TaskExit(code=0))
            elif next_deadline_s(self.state) != float("inf"):
                self.pass_time()
            else:
                return
            if all(alloc.phase is Phase.RUNNING for alloc in self.state.allocs.values()) and not self.pending:
                return


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_rules_hold_whatever_the_host_does(seed: int) -> None:
    host = Host(seed)
    host.kind = False
    host.tell(events.Recovered())
    for _ in range(150):
        host.something_happens()
    host.settle()
    host.generation = Generation(epoch=1, counter=host.generation.counter + 1)
    host.tell(events.Assigned(generation=host.generation, full=True))
    host.settle()
    assert not host.state.allocs
    assert not host.state.strays
    assert not all_reports(host.state)
    assert not any(host.has_anything(alloc) for alloc in ALLOCS)
    assert not host.disk


@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_killed_agent_neither_restarts_nor_doubles_what_runs(seed: int) -> None:
    host = Host(seed)
    host.tell(events.Recovered())
    host.wanted = dict.fromkeys((ALLOCS[0], ALLOCS[1]), Desired.RUN)
    host.assign(full=True)
    host.settle()
    before = dict(host.tasks)
    host.kill_agent()
    host.assign(full=False)
    started = [command for command in host.pending if isinstance(command, commands.StartTask)]
    assert not [c for c in started if c.assignment.alloc in (ALLOCS[0], ALLOCS[1])]
    assert {key: exit_ for key, exit_ in host.tasks.items() if key in before} == before
