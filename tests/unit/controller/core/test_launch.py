"""Jobs launched from others: how they are made, how many are kept, and that nothing of them is lost or left."""

import msgspec
import pytest

from controller.core import views
from controller.core.child import child
from controller.core.policy import Policy
from controller.core.state import State
from outrider.ids import JobName, NodeId, ServiceName
from outrider.model.job import File, Job, JobType, Parameters, Payload, Schedule
from tests.scenarios.world import World, group, job, node, service


def template(**parameters: object) -> Job:
    made = job("resize", group("main", command="get ${param.url} ${param.width} $${param.url}"), type=JobType.BATCH)
    return msgspec.structs.replace(
        made, parameters=Parameters(**{"required": ("url",), "optional": ("width",), **parameters})
    )


def world(policy: Policy | None = None) -> World:
    made = World(policy)
    made.join(node("n1"))
    return made


def test_a_child_is_its_template_with_arguments() -> None:
    made = child(template(), JobName("resize-7"), {"url": "http://a"}, b"bytes")
    (task,) = made.groups[0].tasks
    assert (made.name, made.parent, made.parameters, made.is_template) == ("resize-7", "resize", None, False)
    assert made.arguments == {"url": "http://a", "width": ""}
    assert task.files == (File(path="payload", content=b"bytes"),)


def test_a_payload_goes_before_a_file_of_that_name() -> None:
    plain = template()
    (only,) = plain.groups
    task = msgspec.structs.replace(only.tasks[0], files=(File(path="payload", content=b"x"),))
    wanted = msgspec.structs.replace(plain, groups=(msgspec.structs.replace(only, tasks=(task,)),))
    (made,) = child(wanted, JobName("resize-1"), {"url": "a"}, b"y").groups[0].tasks
    assert made.files == (File(path="payload", content=b"y"),)


def test_the_agent_is_told_the_arguments() -> None:
    made = world()
    made.submit(template())
    made.dispatch("resize", url="http://a")
    (assignment,) = made.agents[NodeId("n1")].running.values()
    assert assignment.arguments == {"url": "http://a", "width": ""}


def test_a_payload_that_is_required_or_forbidden_is_missed_or_refused() -> None:
    made = world()
    made.submit(template(payload=Payload.REQUIRED))
    assert made.dispatch("resize", url="a").message == "job resize: a payload is required; --payload FILE"
    made.submit(template(payload=Payload.FORBIDDEN))
    assert made.dispatch("resize", b"", url="a").message == "job resize: it takes no payload"
    assert made.dispatch("resize", url="a").job == "resize-1"


def test_only_the_newest_that_are_over_are_kept_and_what_runs_always_is() -> None:
    made = world(Policy(children_kept=2))
    made.submit(template())
    running = made.dispatch("resize", url="stays").job
    for number in range(5):
        made.dispatch("resize", url=str(number))
        (alloc,) = views.allocations(made.state, job=JobName(f"resize-{number + 2}"))
        made.finish(alloc.id)
    status = views.job_status(made.state, JobName("resize"))
    assert status is not None
    assert [one.name for one in status.children] == [running, "resize-5", "resize-6"]
    assert made.dispatch("resize", url="again").job == "resize-7", "a number is never given twice"
    assert not [key for key in made.state.group_keys if key[0] == "resize-2"]
    replayed = State.empty(made.policy)
    for record in made.journal:
        replayed.apply(record)
    assert list(replayed.snapshot()) == list(made.state.snapshot())


def test_a_name_that_somebody_took_is_passed_over() -> None:
    made = world()
    made.submit(job("resize-1", group()))
    made.submit(template())
    assert made.dispatch("resize", url="a").job == "resize-2"


def test_an_agent_that_still_has_a_forgotten_one_is_told_to_let_go() -> None:
    made = world(Policy(children_kept=0))
    made.submit(template())
    made.dispatch("resize", url="a")
    (alloc,) = views.allocations(made.state)
    made.leave("n1")
    made.wait(60)
    made.stop("resize")
    made.wait(60)
    made.join(node("n1"))
    assert made.agents[NodeId("n1")].running == {}
    assert views.allocation(made.state, alloc.id) is None


@pytest.mark.parametrize(("overlap", "launched"), [(False, 1), (True, 3)])
def test_overlap_is_as_the_job_says(overlap: bool, launched: int) -> None:
    made = world()
    wanted = job("report", group(), type=JobType.BATCH)
    made.submit(msgspec.structs.replace(wanted, schedule=Schedule(cron="* * * * *", overlap=overlap)))
    made.wait(180)
    assert len(views.allocations(made.state)) == launched


def test_a_templates_services_are_its_childrens_to_offer() -> None:
    made = world()
    made.submit(msgspec.structs.replace(template(), groups=(group(services=[service("web")]),)))
    assert not made.state.providers
    made.dispatch("resize", url="a")
    assert list(made.state.providers[ServiceName("web")]) == ["resize-1"]
