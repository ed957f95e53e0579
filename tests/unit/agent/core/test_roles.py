"""Init tasks run first and one by one, helpers end last, and a batch job does not wait for its helpers."""

import random

import pytest

from agent.core import commands, events
from agent.core.state import State
from agent.core.step import all_reports, step
from outrider.ids import AllocId, GroupName, JobName, TaskName
from outrider.model.allocation import AllocStatus, Assignment, Desired, Generation
from outrider.model.job import Group, RestartPolicy, Task, TaskRole

ALLOC = AllocId("00000000aa")
TASKS = (
    Task(name=TaskName("shipper"), role=TaskRole.HELPER),
    Task(name=TaskName("fetch"), role=TaskRole.INIT),
    Task(name=TaskName("main")),
    Task(name=TaskName("migrate"), role=TaskRole.INIT),
)


class Node:
    """An agent's core whose host does at once what it is asked; tasks run until a test ends them."""

    def __init__(self, *, batch: bool, attempts: int = 3, network_fails: int = 0) -> None:
        self.state = State(allocs={}, strays={})
        self.now_s = 100.0
        self.batch = batch
        self.network_fails = network_fails
        restart = RestartPolicy(attempts=attempts, delay_s=1.0)
        self.group = Group(name=GroupName("web"), tasks=TASKS, restart=restart)
        self.running: list[str] = []
        self.asked: list[str] = []
        self.tell(events.Recovered())
        self.assign(Desired.RUN)

    def assign(self, desired: Desired) -> None:
        wanted = Assignment(
            alloc=ALLOC,
            job=JobName("j"),
            job_version=1,
            group=self.group,
            index=0,
            batch=self.batch,
            desired=desired,
        )
        generation = Generation(epoch=1, counter=int(desired is Desired.STOP))
        self.tell(events.Assigned(generation=generation, full=True, assignments=(wanted,)))

    def tell(self, event: events.Event) -> None:
        for command in step(self.state, event, self.now_s, random.Random(1)):  # noqa: S311 - jitter
            match command:
                case commands.Save(announce=True):
                    self.tell(events.Saved(alloc=ALLOC, ended=command.record.ended))
                case commands.CreateNetwork() if self.network_fails:
                    self.network_fails -= 1
                    self.tell(events.StepFailed(alloc=ALLOC, message="no network"))
                case commands.CreateNetwork():
                    self.tell(events.NetworkReady(alloc=ALLOC, local_address="100.64.0.2"))
                case commands.StartTask():
                    self.running.append(command.task.name)
                    self.tell(events.TaskStarted(alloc=ALLOC, task=command.task.name, started_at_s=1.0))
                case commands.StopTask():
                    self.asked.append(command.task.name)
                case commands.Clean():
                    self.tell(events.Cleaned(alloc=ALLOC))
                case _:
                    pass

    def end(self, task: str, code: int = 0) -> None:
        self.running.remove(task)
        self.tell(events.TaskExited(alloc=ALLOC, task=TaskName(task), exit=events.TaskExit(code=code)))

    @property
    def told(self) -> tuple[AllocStatus, str]:
        (report,) = all_reports(self.state)
        return report.status, report.message


def started(*, batch: bool) -> Node:
    node = Node(batch=batch)
    node.end("fetch")
    node.end("migrate")
    return node


def test_init_tasks_run_first_one_by_one_in_their_order() -> None:
    node = Node(batch=False)
    assert node.running == ["fetch"]
    assert node.told == (AllocStatus.STARTING, "init task fetch runs")
    node.end("fetch")
    assert node.running == ["migrate"]
    assert node.told == (AllocStatus.STARTING, "init task migrate runs")
    node.end("migrate")
    assert node.running == ["shipper", "main"]
    assert node.told == (AllocStatus.RUNNING, "")


def test_an_init_task_that_fails_is_tried_again_and_the_others_wait() -> None:
    node = Node(batch=False)
    node.end("fetch", code=1)
    assert node.running == []
    node.now_s += 5
    node.tell(events.Tick())
    assert node.running == ["fetch"]


def test_one_that_fails_for_good_fails_the_allocation() -> None:
    node = Node(batch=False, attempts=0)
    node.end("fetch", code=1)
    status, message = node.told
    assert status is AllocStatus.FAILED
    assert "fetch exited with code 1" in message


def test_a_restart_of_the_main_task_runs_no_init_task_again() -> None:
    node = started(batch=False)
    node.end("main", code=1)
    node.now_s += 5
    node.tell(events.Tick())
    assert node.running == ["shipper", "main"]


def test_helpers_are_asked_to_end_after_the_main_tasks_have() -> None:
    node = started(batch=False)
    node.assign(Desired.STOP)
    assert node.asked == ["main"]
    node.end("main")
    assert node.asked == ["main", "shipper"]
    node.end("shipper")
    assert node.told[0] is AllocStatus.COMPLETE


def test_batch_work_is_done_when_its_main_tasks_are() -> None:
    node = started(batch=True)
    node.end("main")
    assert node.asked == ["shipper"]
    assert node.told[0] is AllocStatus.STOPPING
    node.end("shipper", code=143)
    assert node.told == (AllocStatus.COMPLETE, "")


def test_a_helper_of_batch_work_that_ends_by_itself_ends_nothing() -> None:
    node = started(batch=True)
    node.end("shipper")
    assert node.running == ["main"]
    assert node.told[0] is AllocStatus.RUNNING


@pytest.mark.parametrize("at", ["fetch", "migrate"])
def test_a_stop_during_an_init_task_starts_nothing_more(at: str) -> None:
    node = Node(batch=False)
    if at == "migrate":
        node.end("fetch")
    node.assign(Desired.STOP)
    assert node.asked == [at]
    node.end(at, code=143)
    assert node.running == []
    assert node.told[0] is AllocStatus.COMPLETE


def test_what_was_tried_in_vain_is_not_told_of_one_that_runs() -> None:
    node = Node(batch=False, network_fails=1)
    assert "no network" in node.told[1]
    node.now_s += 5
    node.tell(events.Tick())
    node.end("fetch")
    node.end("migrate")
    assert node.told == (AllocStatus.RUNNING, "")
