"""A newer assignment of an allocation that goes on: checks and signals are taken up, restarts are carried out once."""

import random

import msgspec

from agent.core import commands, events
from agent.core.health import Probe
from agent.core.state import State
from agent.core.step import all_reports, step
from outrider.ids import AllocId, GroupName, JobName, ServiceName, TaskName
from outrider.model.allocation import AllocStatus, Assignment, Generation
from outrider.model.job import Check, CheckKind, Group, Network, Port, PortName, RestartPolicy, Service, Task

ALLOC = AllocId("00000000aa")
WEB, MAIN = ServiceName("web"), TaskName("main")


def group(check: Check | None, *, kill_signal: str = "SIGTERM") -> Group:
    return Group(
        name=GroupName("web"),
        tasks=(Task(name=MAIN, kill_signal=kill_signal),),
        network=Network(ports=(Port(name=PortName("http")),)),
        services=(Service(name=WEB, port=PortName("http"), check=check),),
        restart=RestartPolicy(attempts=0),
    )


def tcp(interval_s: float) -> Check:
    return Check(kind=CheckKind.TCP, interval_s=interval_s)


class Node:
    """An agent's core whose host does at once what it is asked. What it is asked to end, a test ends."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.disk: events.AllocRecord | None = None
        self.commands: list[commands.Command] = []
        self.counter = 0
        self.boot()

    def boot(self, *found: events.Found) -> None:
        self.state = State(allocs={}, strays={})
        self.tell(events.Recovered(found=found))

    def assign(self, wanted: Group, restarts: int = 0) -> None:
        self.counter += 1
        assignment = Assignment(
            alloc=ALLOC, job=JobName("j"), job_version=self.counter, group=wanted, index=0, restarts=restarts
        )
        generation = Generation(epoch=1, counter=self.counter)
        self.tell(events.Assigned(generation=generation, full=True, assignments=(assignment,)))

    def tell(self, event: events.Event) -> None:
        for command in step(self.state, event, self.now_s, random.Random(1)):  # noqa: S311 - jitter
            self.commands.append(command)
            match command:
                case commands.Save():
                    self.disk = command.record
                    if command.announce:
                        self.tell(events.Saved(alloc=ALLOC, ended=command.record.ended))
                case commands.CreateNetwork():
                    self.tell(events.NetworkReady(alloc=ALLOC, local_address="100.64.0.2"))
                case commands.StartSidecar() | commands.AdoptSidecar():
                    self.tell(events.SidecarReady(alloc=ALLOC))
                case commands.StartTask():
                    self.tell(events.TaskStarted(alloc=ALLOC, task=MAIN, started_at_s=1.0))
                case _:
                    pass

    def end(self) -> None:
        self.tell(events.TaskExited(alloc=ALLOC, task=MAIN, exit=events.TaskExit(code=0)))

    def check(self, *, passing: bool) -> None:
        self.tell(events.Tick())
        self.tell(events.CheckRan(alloc=ALLOC, service=WEB, passing=passing))

    def asked(self, kind: type[commands.Command]) -> int:
        return sum(isinstance(command, kind) for command in self.commands)

    @property
    def probe(self) -> Probe | None:
        return self.state.allocs[ALLOC].probes.get(WEB)

    @property
    def healthy(self) -> bool:
        (report,) = all_reports(self.state)
        return report.status is AllocStatus.RUNNING and all(check.passing for check in report.checks)


def running() -> Node:
    node = Node()
    node.assign(group(tcp(5.0)))
    node.check(passing=True)
    assert node.healthy
    return node


def test_another_check_is_run_from_now_on_and_the_task_goes_on() -> None:
    node = running()
    node.assign(group(tcp(1.0)))
    assert node.healthy, "it was until now"
    assert node.asked(commands.StopTask) == 0
    assert node.probe is not None
    assert node.probe.check == tcp(1.0)
    node.check(passing=False)
    node.now_s += 2
    node.check(passing=False)
    assert not node.healthy


def test_a_check_that_is_gone_is_not_asked_for_and_its_late_answer_means_nothing() -> None:
    node = running()
    node.now_s += 10
    node.tell(events.Tick())
    node.assign(group(None))
    node.tell(events.CheckRan(alloc=ALLOC, service=WEB, passing=False))
    assert node.healthy
    node.assign(group(tcp(5.0)))
    assert node.healthy
    assert node.asked(commands.StopTask) == 0


def test_another_signal_ends_it_when_it_ends() -> None:
    node = running()
    node.assign(group(tcp(5.0), kill_signal="SIGINT"))
    node.assign(group(tcp(5.0), kill_signal="SIGINT"), restarts=1)
    (stop,) = [command for command in node.commands if isinstance(command, commands.StopTask)]
    assert stop.task.kill_signal == "SIGINT"


def test_a_restart_is_carried_out_once_and_its_policy_does_not_count_it() -> None:
    node = running()
    for _ in range(2):
        node.assign(group(tcp(5.0)), restarts=1)
    assert node.asked(commands.StopTask) == 1
    node.end()
    assert node.asked(commands.StartTask) == 2
    node.assign(group(tcp(5.0)), restarts=1)
    assert node.asked(commands.StopTask) == 1


def test_a_new_allocation_has_nothing_to_make_up_for() -> None:
    node = Node()
    node.assign(group(None), restarts=3)
    assert node.asked(commands.StopTask) == 0


def test_an_agent_that_ends_during_a_restart_makes_up_for_it() -> None:
    node = running()
    node.assign(group(tcp(5.0)), restarts=1)
    record = node.disk
    assert record is not None
    assert record.restarts_done == 0
    still = events.Found(
        alloc=ALLOC,
        record=record,
        local_address="100.64.0.2",
        sidecar=True,
        tasks={MAIN: events.FoundTask(started_at_s=1.0)},
    )
    node.commands.clear()
    node.boot(still)
    assert node.asked(commands.StopTask) == 1
    node.end()
    assert node.disk is not None
    assert node.disk.restarts_done == 1
    node.commands.clear()
    node.boot(msgspec.structs.replace(still, record=node.disk))
    assert node.asked(commands.StopTask) == 0
