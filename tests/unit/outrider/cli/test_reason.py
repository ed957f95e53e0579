from outrider.cli.rollout import reason
from outrider.ids import AllocId, GroupName, JobName, NodeId, TaskName
from outrider.model.allocation import Allocation, AllocReport, AllocStatus, Desired, TaskReport, TaskStatus


def said(*messages: str, of_all: str = "") -> str:
    tasks = tuple(TaskReport(name=TaskName("main"), status=TaskStatus.FAILED, message=each) for each in messages)
    report = AllocReport(alloc=AllocId("a1"), status=AllocStatus.FAILED, message=of_all, tasks=tasks)
    return reason(
        Allocation(
            id=AllocId("a1"),
            job=JobName("shop"),
            group=GroupName("web"),
            node=NodeId("n1"),
            status=AllocStatus.FAILED,
            job_version=1,
            index=0,
            desired=Desired.RUN,
            report=report,
        )
    )


def test_each_thing_is_said_once_with_the_task_it_is_of() -> None:
    assert said("main was killed by SIGTERM") == "main was killed by SIGTERM"
    assert said("started again: unhealthy") == "main: started again: unhealthy"
    assert said("main cannot start: no", of_all="main cannot start: no") == "main cannot start: no"
