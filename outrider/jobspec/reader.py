"""A job file -> `Job`. Owns the job file's keys, shorthands and defaults; limits are `outrider.validate`'s.

Reads the job file and the `files:` it names, and nothing else.
"""

from pathlib import Path as FilePath

from outrider.errors import InputError
from outrider.ids import DEFAULT_NAMESPACE, GroupName, JobName, Namespace
from outrider.jobspec.document import BYTES_MAX, DocumentError, Mapping, Mark, Node, parse
from outrider.jobspec.fields import Fault, Faults, Fields, Path, named
from outrider.jobspec.kinds import read_depends_on, read_parameters, read_scaling, read_schedule
from outrider.jobspec.network import read_network
from outrider.jobspec.placement import read_affinities, read_constraints, read_spread
from outrider.jobspec.policies import read_disconnect, read_reschedule, read_restart, read_update
from outrider.jobspec.services import read_services
from outrider.jobspec.tasks import FilesBudget, read_tasks
from outrider.model.job import Group, Job, JobType, Packing
from outrider.model.sidecar import SidecarKind
from outrider.validate import Problem, problems

_TOLD_MAX = 50
_JOB_KEYS = (
    "job",
    "namespace",
    "type",
    "priority",
    "constraints",
    "affinities",
    "spread",
    "pool",
    "placement",
    "schedule",
    "parameters",
    "groups",
)
_GROUP_KEYS = (
    "scaling",
    "depends_on",
    "sidecar",
    "count",
    "update",
    "restart",
    "reschedule",
    "disconnect",
    "network",
    "services",
    "tasks",
    "constraints",
    "affinities",
    "spread",
)


class JobFileError(InputError):
    """All that is wrong with a job file, one line each: `FILE:LINE:COLUMN: field: what (did you mean ...?)`."""

    def __init__(self, file: str, faults: list[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: (fault.mark.line, fault.mark.column))
        lines = [_line(file, fault) for fault in self.faults[:_TOLD_MAX]]
        if len(faults) > _TOLD_MAX:
            lines.append(f"{file}: and {len(faults) - _TOLD_MAX} more")
        super().__init__("\n".join(lines))


def read_job(file: FilePath) -> Job:
    """The job in `file`. Raises JobFileError with every mistake in it."""
    try:
        with file.open("rb") as opened:
            content = opened.read(BYTES_MAX + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; give a job file's path") from error
    return parse_job(content, file)


def parse_job(content: bytes, file: FilePath) -> Job:
    """The job in `content`; `file` is told in errors, and `files:` are looked for beside it."""
    try:
        root = parse(content)
    except DocumentError as error:
        fault = Fault(mark=error.mark, path=(), message=error.message)
        raise JobFileError(str(file), [fault]) from error
    faults = Faults()
    job = job_of(root, file.parent, faults)
    told = list(faults.found)
    told.extend(_fault(problem, faults) for problem in problems(job) if not faults.told(problem.path))
    if told:
        raise JobFileError(str(file), told)
    return job


def job_of(root: Node, directory: FilePath, faults: Faults) -> Job:
    """What can be read of it, right or wrong; `faults` hears of the rest."""
    fields = Fields(root, (), faults, _JOB_KEYS)
    if isinstance(root, Mapping):
        fields.required("job", "shop")
    groups = fields.required("groups", "{web: {tasks: {server: {command: [...]}}}}")
    budget = FilesBudget(directory)
    launches = "schedule" in fields or "parameters" in fields  # which only batch jobs do
    return Job(
        name=JobName(fields.text("job", "")),
        type=fields.choice("type", JobType, JobType.BATCH if launches else JobType.SERVICE),
        schedule=read_schedule(fields, faults),
        parameters=read_parameters(fields, faults),
        priority=fields.integer("priority", 50),
        constraints=read_constraints(fields, faults),
        affinities=read_affinities(fields, faults),
        spread=read_spread(fields, faults),
        pool=fields.text("pool", "default"),
        placement=fields.choice("placement", Packing, Packing.SPREAD) if "placement" in fields else None,
        namespace=Namespace(fields.text("namespace", DEFAULT_NAMESPACE)),
        groups=tuple(
            _group(name, node, ("groups", name), budget, faults)
            for name, node in (named(groups, ("groups",), faults) if groups else ())
        ),
    )


def _group(name: str, node: Node, path: Path, budget: FilesBudget, faults: Faults) -> Group:
    fields = Fields(node, path, faults, _GROUP_KEYS)
    network = read_network(fields, budget, faults)
    services = read_services(fields, network, faults)
    needed = isinstance(node, Mapping) and not any(service.gateway for service in services)
    tasks = fields.required("tasks", "{server: {command: [...]}}") if needed else fields.node("tasks")
    scaling = read_scaling(fields, faults)
    return Group(
        name=GroupName(name),
        count=fields.integer("count", scaling.count_min if scaling else 1),
        update=read_update(fields, faults),
        restart=read_restart(fields, faults),
        reschedule=read_reschedule(fields, faults),
        disconnect=read_disconnect(fields, faults),
        network=network,
        services=services,
        constraints=read_constraints(fields, faults),
        affinities=read_affinities(fields, faults),
        spread=read_spread(fields, faults),
        scaling=scaling,
        depends_on=read_depends_on(fields),
        sidecar=fields.choice("sidecar", SidecarKind, SidecarKind.OWN),
        tasks=read_tasks(tasks, (*path, "tasks"), budget, faults) if tasks else (),
    )


def _fault(problem: Problem, faults: Faults) -> Fault:
    return Fault(mark=faults.mark(problem.path), path=problem.path, message=problem.message)


def _line(file: str, fault: Fault) -> str:
    mark: Mark = fault.mark
    where = Problem(path=fault.path, message="").where
    return f"{file}:{mark.line}:{mark.column}: {where + ': ' if where else ''}{fault.message}"
