"""What the jobs of a namespace want together, and whether one more fits. Pure arithmetic over the state."""

from controller.core.entries import JobEntry
from controller.core.state import State
from outrider.ids import JobName, Namespace
from outrider.model.access import Quota
from outrider.model.fleet import RolloutState
from outrider.model.job import Job, JobType
from outrider.model.reservation import group_resources


def wanted(job: Job, nodes: int) -> Quota:
    """Of all its copies; a system job has one on each of `nodes`."""
    allocations = cpu_millis = memory_bytes = 0
    for group in job.groups:
        copies = nodes if job.type is JobType.SYSTEM else group.count
        need = group_resources(group)
        allocations += copies
        cpu_millis += copies * need.cpu_millis
        memory_bytes += copies * need.memory_bytes
    return Quota(jobs=1, allocations=allocations, cpu_millis=cpu_millis, memory_bytes=memory_bytes)


def used(state: State, namespace: Namespace, *, without: JobName | None = None) -> Quota:
    """By the newest versions of its jobs that are not stopped."""
    parts = [
        wanted(entry.job, _nodes_up(state))
        for name, entry in state.jobs.items()
        if name != without and entry.job.namespace == namespace and _counts(entry)
    ]
    return _sum(parts)


def touched(state: State, namespace: Namespace) -> frozenset[str]:
    """What two calls that take from the same quota must not both touch in one batch."""
    return frozenset({f"namespace {namespace}"} if limited(state, namespace) else ())


def limited(state: State, namespace: Namespace) -> bool:
    spec = state.access.namespaces.get(namespace)
    return spec is not None and spec.quota != Quota()


def excess(state: State, job: Job) -> str:
    """Why `job` would be too much for its namespace; "" where it fits."""
    if job.is_template or not limited(state, job.namespace):
        return ""
    spec = state.access.namespaces[job.namespace]
    total = _sum([used(state, job.namespace, without=job.name), wanted(job, _nodes_up(state))])
    for name in Quota.__struct_fields__:
        limit, would = getattr(spec.quota, name), getattr(total, name)
        if limit and would > limit:
            return (
                f"namespace {job.namespace} may have {_shown(name, limit)} and would have {_shown(name, would)}; "
                f"`outrider namespace ls` shows what it uses"
            )
    return ""


def _counts(entry: JobEntry) -> bool:
    """What other jobs are launched from runs nothing; a batch job that is over wants nothing any more."""
    over = entry.job.type is JobType.BATCH and entry.rollout is not RolloutState.RUNNING
    return not (entry.stopped or entry.job.is_template or over)


def _sum(parts: list[Quota]) -> Quota:
    totals = {name: sum(getattr(part, name) for part in parts) for name in Quota.__struct_fields__}
    return Quota(**totals)


def _nodes_up(state: State) -> int:
    return len(state.nodes) - int(state.nodes.down[: len(state.nodes)].sum())


def _shown(name: str, amount: int) -> str:
    match name:
        case "cpu_millis":
            return f"{amount / 1000:g} cores"
        case "memory_bytes":
            return f"{amount >> 20} MiB of memory"
        case _:
            return f"{amount} {name}"
