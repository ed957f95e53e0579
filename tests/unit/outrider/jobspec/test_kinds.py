"""Schedules, parameters, scaling, roles and waiting, as a job file has them; and what is wrong with them."""

from pathlib import Path

import pytest

from outrider.jobspec.reader import JobFileError, parse_job
from outrider.model.job import (
    MIB,
    Job,
    JobType,
    Parameters,
    Payload,
    ScalingMetric,
    ScalingPolicy,
    Schedule,
    TaskRole,
    main_task,
)
from outrider.model.reservation import group_resources


def read(text: str) -> Job:
    return parse_job(text.encode(), Path("job.yaml"))


def faults(text: str) -> str:
    with pytest.raises(JobFileError) as caught:
        read(text)
    return str(caught.value)


GROUP = "groups: {main: {tasks: {main: {command: [work]}}}}\n"


def served(rest: str) -> str:
    return (
        "job: web\ngroups:\n  web:\n    network: {ports: {http: {}}}\n    services: [{name: web, port: http}]\n"
        f"    tasks: {{main: {{command: [serve]}}}}\n{rest}"
    )


def test_a_schedule_is_a_line_or_says_more_and_makes_a_batch_job() -> None:
    short = read('job: report\nschedule: "*/5 * * * *"\n' + GROUP)
    assert short.schedule == Schedule(cron="*/5 * * * *")
    assert short.type is JobType.BATCH
    assert short.is_template
    whole = 'job: report\nschedule: {cron: "0 6 * * *", time_zone: Europe/Berlin, overlap: allow}\n' + GROUP
    assert read(whole).schedule == Schedule(cron="0 6 * * *", time_zone="Europe/Berlin", overlap=True)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ('"0 0 30 2 *"', "job.yaml:2:1: schedule.cron: '0 0 30 2 *' never fires"),
        ("hourly", "schedule.cron: 'hourly' is no cron line: wrong number of fields"),
        ('{cron: "* * * * *", time_zone: Mars/Base}', "job.yaml:2:31: schedule.time_zone: 'Mars/Base' is no time zone"),
        ('{cron: "* * * * *", overlap: maybe}', "schedule.overlap: 'maybe' is neither forbid nor allow"),
        ("{time_zone: UTC}", "schedule.cron: missing"),
        ('{cron: "* * * * *", zone: UTC}', "schedule.zone: unknown key; did you mean 'time_zone'?"),
        ("[a]", "schedule: expected keys and values, found a list"),
    ],
)
def test_a_bad_schedule_says_what_is_wrong(schedule: str, text: str) -> None:
    assert text in faults(f"job: report\nschedule: {schedule}\n{GROUP}")


def test_what_launches_jobs_is_a_batch_job_with_room_in_its_name() -> None:
    assert "only a batch job can have schedule; this is a service job" in faults(
        'job: report\ntype: service\nschedule: "* * * * *"\n' + GROUP
    )
    assert "more than 47 characters" in faults(f'job: {"r" * 48}\nschedule: "* * * * *"\n{GROUP}')
    both = 'job: report\nschedule: "* * * * *"\nparameters: {required: [a]}\n' + GROUP
    assert "launched by nobody who could give parameters" in faults(both)


def test_parameters_are_read() -> None:
    job = read("job: resize\nparameters: {required: [url], optional: [width], payload: required}\n" + GROUP)
    assert job.parameters == Parameters(required=("url",), optional=("width",), payload=Payload.REQUIRED)
    assert job.type is JobType.BATCH


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("{required: [Url]}", "parameters.required[0]: 'Url' is no parameter's name"),
        ("{required: [a], optional: [a]}", "parameters.optional[0]: 'a' stands here 2 times"),
        ("{payload: no}", "parameters.payload: 'no' is none of optional, required, forbidden"),
    ],
)
def test_bad_parameters_say_what_is_wrong(parameters: str, text: str) -> None:
    assert text in faults(f"job: resize\nparameters: {parameters}\n{GROUP}")


def test_a_parameter_that_nobody_fills_in_is_found() -> None:
    task = "groups: {main: {tasks: {main: {command: [work, '${param.ulr}', '$${param.x}']}}}}\n"
    found = faults("job: resize\nparameters: {required: [url]}\n" + task)
    assert "groups.main.tasks.main.command[1]: the job has no parameter 'ulr'; known: url" in found
    assert "param.x" not in found
    assert "the job has no parameter 'ulr'; known: none" in faults("job: resize\n" + task)


def test_scaling_is_read_and_gives_the_first_count() -> None:
    job = read(served("    scaling: {min: 2, max: 20, target: {requests: 100}, cooldown: 30s}\n"))
    wanted = ScalingPolicy(count_min=2, count_max=20, metric=ScalingMetric.REQUESTS, target=100.0, cooldown_s=30.0)
    assert job.groups[0].scaling == wanted
    assert job.groups[0].count == 2
    by_cpu = read("job: w\ngroups: {w: {scaling: {max: 3, target: {cpu: 70%}}, tasks: {m: {command: [w]}}}}\n")
    assert by_cpu.groups[0].scaling == ScalingPolicy(count_max=3, metric=ScalingMetric.CPU, target=70.0)


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        ("{min: 0, max: 3, target: {cpu: 70%}}", "scaling.min: 0 is not within 1 and 1000000: without a copy"),
        ("{min: 4, max: 3, target: {cpu: 70%}}", "scaling.max: 3 is not within min, 4, and 1000000"),
        ("{max: 3}", "scaling.target: missing; for example `target: {cpu: 70%}`"),
        ("{max: 3, target: {cpu: 70}}", "scaling.target.cpu: '70' is no share of what the group reserves; write 70%"),
        ("{max: 3, target: {requests: 0}}", "scaling.target.requests: must be more than 0"),
        ("{max: 3, target: {requests: many}}", "scaling.target.requests: 'many' is no number"),
        ("{max: 3, target: {cpu: 1%, requests: 1}}", "expected exactly one of requests, concurrency, cpu, found"),
        ("{max: 3, target: {}}", "expected exactly one of requests, concurrency, cpu, found none"),
        ("{max: 3, target: {cpu: 70%}, cooldown: 10ms}", "scaling.cooldown: 0.01 s is not within 1 s and 1 d"),
        ("{target: {cpu: 70%}}", "scaling.max: missing"),
    ],
)
def test_bad_scaling_says_what_is_wrong(scaling: str, text: str) -> None:
    assert text in faults(served(f"    scaling: {scaling}\n"))


def test_scaling_needs_a_service_job_and_something_to_count() -> None:
    task = "tasks: {m: {command: [w]}}"
    batch = f"job: w\ntype: batch\ngroups: {{w: {{scaling: {{max: 3, target: {{cpu: 70%}}}}, {task}}}}}\n"
    assert "only a service is scaled; this is a batch job" in faults(batch)
    unserved = f"job: w\ngroups: {{w: {{scaling: {{max: 3, target: {{requests: 5}}}}, {task}}}}}\n"
    assert "no service whose sidecar could count it; scale by cpu" in faults(unserved)
    assert "count, 9, is not within min, 1, and max, 3" in faults(
        served("    count: 9\n    scaling: {max: 3, target: {cpu: 70%}}\n")
    )


def test_a_dependency_is_a_service_of_others() -> None:
    assert read(served("    depends_on: [db, cache]\n")).groups[0].depends_on == ("db", "cache")
    assert "groups.web.depends_on: 'web' is the group's own: it would wait for itself" in faults(
        served("    depends_on: [web]\n")
    )
    assert "'No_Name' is no service's name" in faults(served("    depends_on: [No_Name]\n"))
    assert "a service stands here twice" in faults(served("    depends_on: [db, db]\n"))
    assert "expected a list, found 'db'; write [db, cache]" in faults(served("    depends_on: db\n"))


def test_groups_that_wait_for_each_other_are_found() -> None:
    group = (
        "  {0}: {{network: {{ports: {{p: {{}}}}}}, services: [{{name: {0}, port: p}}], depends_on: [{1}], "
        "tasks: {{m: {{command: [w]}}}}}}\n"
    )
    text = "job: ring\ngroups:\n" + group.format("a", "b") + group.format("b", "c") + group.format("c", "a")
    assert "groups.a.depends_on: a -> b -> c -> a: each waits for the next" in faults(text)


TASKS = """
job: web
groups:
  web:
    tasks:
      migrate: {command: [m], role: init, resources: {memory: 512Mi}}
      server: {command: [s], resources: {memory: 100Mi}}
      shipper: {command: [l], role: helper, resources: {memory: 50Mi}}
"""


def test_roles_are_read_and_init_tasks_are_never_counted_beside_the_others() -> None:
    (group,) = read(TASKS).groups
    assert [task.role for task in group.tasks] == [TaskRole.INIT, TaskRole.MAIN, TaskRole.HELPER]
    assert main_task(group).name == "server"
    assert group_resources(group).memory_bytes == 512 * MIB
    assert group_resources(group).cpu_millis == 200


def test_a_group_needs_a_main_task() -> None:
    found = faults(
        "job: web\ngroups: {web: {tasks: {a: {command: [a], role: init}, b: {command: [b], role: helper}}}}\n"
    )
    assert "groups.web.tasks: all tasks are init tasks or helpers" in found
    assert "role: 'first' is none of main, init, helper" in faults(
        "job: web\ngroups: {web: {tasks: {a: {command: [a], role: first}}}}\n"
    )
