"""What makes a job's kind impossible: schedules, parameters, scaling, roles of tasks, what waits for what.

Pure; `outrider.validate` makes problems of what is found here. Each is a path within the job, or the group, and a text.
"""

import math
import re
from collections.abc import Iterator

from outrider.cron import next_launch_s, zone
from outrider.ids import is_name
from outrider.model.dependencies import circle, waits
from outrider.model.job import Group, Job, JobType, Parameters, ScalingMetric, ScalingPolicy, Schedule, TaskRole

Finding = tuple[tuple[str | int, ...], str]

PARAMETERS_MAX = 64
# A launched job is named after the one that it comes from, and when or how often it was launched.
TEMPLATE_NAME_CHARS_MAX = 47
COOLDOWN_S_MIN, COOLDOWN_S_MAX = 1.0, 24 * 3600.0
_PARAMETER = re.compile(r"^[a-z][a-z0-9_]{0,62}$")
_REFERENCE = re.compile(r"\$\$\{|\$\{param\.([^}]*)\}")


def job_findings(job: Job) -> Iterator[Finding]:
    yield from _template(job)
    if job.schedule is not None:
        yield from _schedule(job.schedule)
    if job.parameters is not None:
        yield from _parameters(job.parameters)
    yield from _references(job)
    yield from _circles(job)


def group_findings(job: Job, group: Group) -> Iterator[Finding]:
    roles = [task.role for task in group.tasks]
    if roles and TaskRole.MAIN not in roles:
        yield ("tasks",), "all tasks are init tasks or helpers; one must be the main one (leave its role out)"
    for service in group.depends_on:
        if not is_name(service):
            yield ("depends_on",), f"{service[:80]!r} is no service's name"
        if service in {own.name for own in group.services}:
            yield ("depends_on",), f"{service!r} is the group's own: it would wait for itself"
    if len(set(group.depends_on)) != len(group.depends_on):
        yield ("depends_on",), "a service stands here twice"
    if group.scaling is not None:
        if job.type is not JobType.SERVICE:
            yield ("scaling",), f"only a service is scaled; this is a {job.type} job"
        for at, message in _scaling(group, group.scaling):
            yield ("scaling", *at), message


def _template(job: Job) -> Iterator[Finding]:
    key = "schedule" if job.schedule is not None else "parameters"
    if job.schedule is not None and job.parameters is not None:
        yield ("parameters",), "a job with a schedule is launched by nobody who could give parameters; leave one out"
    if job.is_template and job.type is not JobType.BATCH:
        yield (key,), f"only a batch job can have {key}; this is a {job.type} job (write `type: batch`)"
    if job.is_template and len(job.name) > TEMPLATE_NAME_CHARS_MAX:
        message = f"more than {TEMPLATE_NAME_CHARS_MAX} characters: jobs launched from it are named after it"
        yield ("job",), message
    if job.parent is not None or job.arguments:
        yield ("parent",), "only the fleet launches jobs from others: `outrider job dispatch`"


def _schedule(schedule: Schedule) -> Iterator[Finding]:
    try:
        zone(schedule.time_zone)
    except ValueError as error:
        yield ("schedule", "time_zone"), str(error)
        return
    try:
        next_launch_s(schedule.cron, schedule.time_zone, 0.0)
    except ValueError as error:
        yield ("schedule", "cron"), str(error)


def _parameters(parameters: Parameters) -> Iterator[Finding]:
    names = (*parameters.required, *parameters.optional)
    if len(names) > PARAMETERS_MAX:
        yield ("parameters",), f"{len(names)} parameters; at most {PARAMETERS_MAX}"
    for key in ("required", "optional"):
        for index, name in enumerate(getattr(parameters, key)):
            at = ("parameters", key, index)
            if not _PARAMETER.match(name):
                yield (
                    at,
                    f"{name[:80]!r} is no parameter's name: a letter, then letters, digits and underscores, all small",
                )
            if names.count(name) > 1:
                yield at, f"{name!r} stands here {names.count(name)} times"


def _references(job: Job) -> Iterator[Finding]:
    """`${param.NAME}` that nobody will ever fill in."""
    known = set(job.parameters.required + job.parameters.optional) if job.parameters is not None else set()
    for group in job.groups:
        for task in group.tasks:
            texts: list[tuple[tuple[str | int, ...], str]] = [
                (("command", index), word) for index, word in enumerate(task.command)
            ]
            texts += [(("args", index), word) for index, word in enumerate(task.args)]
            texts += [(("env", name), text) for name, text in task.env.items()]
            for at, text in texts:
                for match in _REFERENCE.finditer(text):
                    if match[1] is not None and match[1] not in known:
                        listed = ", ".join(sorted(known)) or "none"
                        message = f"the job has no parameter {match[1][:80]!r}; known: {listed}"
                        yield ("groups", group.name, "tasks", task.name, *at), message


def _circles(job: Job) -> Iterator[Finding]:
    found = circle(waits(job.groups))
    if found:
        names = " -> ".join(found)
        owner = next(group.name for group in job.groups if found[0] in {service.name for service in group.services})
        yield ("groups", owner, "depends_on"), f"{names}: each waits for the next, so none would ever start"


def _scaling(group: Group, scaling: ScalingPolicy) -> Iterator[Finding]:
    if not 1 <= scaling.count_min <= 1_000_000:
        yield ("min",), f"{scaling.count_min} is not within 1 and 1000000: without a copy there is nothing to measure"
    if not scaling.count_min <= scaling.count_max <= 1_000_000:
        yield ("max",), f"{scaling.count_max} is not within min, {scaling.count_min}, and 1000000"
    elif not scaling.count_min <= group.count <= scaling.count_max:
        message = f"count, {group.count}, is not within min, {scaling.count_min}, and max, {scaling.count_max}"
        yield (), message
    if not (math.isfinite(scaling.target) and 0 < scaling.target <= 1e9):
        yield ("target", scaling.metric), "must be more than 0"
    if not COOLDOWN_S_MIN <= scaling.cooldown_s <= COOLDOWN_S_MAX:
        yield ("cooldown",), f"{scaling.cooldown_s:g} s is not within 1 s and 1 d"
    served = [service for service in group.services if service.port is not None]
    if scaling.metric is not ScalingMetric.CPU and not served:
        yield ("target", scaling.metric), "the group has no service whose sidecar could count it; scale by cpu"
