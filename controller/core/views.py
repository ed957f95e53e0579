"""State -> what operators read: values made on demand. Owns how things are told; changes nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from controller.core import retry, scaling
from controller.core import table as columns
from controller.core.groups import FamilyKey
from controller.core.remedies import would_fit
from controller.core.state import State
from controller.core.submit import job_warnings
from controller.core.table import ENDED_STATUSES, OBSERVED, Ints
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.allocation import TERMINAL, Allocation, AllocStatus, Desired, Generation
from outrider.model.fleet import JobState, JobStatus, JobSummary, NodeState, RolloutState, VersionStatus
from outrider.model.job import JobType, JobVersion, Value, published_ports
from outrider.model.node import NodeStatus

_AMBIGUOUS_SHOWN = 10


class FleetSummary(Value, frozen=True, kw_only=True):
    generation: Generation
    nodes_ready: int
    nodes: int
    jobs: int
    allocations: int  # that have not ended
    rollout_s_max: float = 0.0  # the longest that a rollout has gone on
    braked: str = ""  # why nothing is ejected or replaced; "" where all is normal


class Ambiguous(Value, frozen=True, kw_only=True):
    """A prefix that more than one allocation's id begins with."""

    matches: tuple[AllocId, ...]  # the first few


def fleet_summary(state: State) -> FleetSummary:
    return FleetSummary(
        generation=state.generation,
        nodes_ready=sum(link.status is NodeStatus.READY for link in state.live.links),
        nodes=len(state.nodes),
        jobs=len(state.jobs),
        allocations=int((state.table.status[: state.table.size] == columns.LIVE).sum()),
        rollout_s_max=max(_rollouts_s(state), default=0.0),
        braked=state.live.braked,
    )


def _rollouts_s(state: State) -> Iterator[float]:
    """For how long each rollout that has not ended has gone on."""
    for entry in state.jobs.values():
        rolling = entry.rollout is RolloutState.RUNNING and not entry.stopped and not entry.job.is_template
        if rolling and entry.job.type is not JobType.BATCH:
            yield max(0.0, state.live.now_s - entry.versions[entry.latest].submitted_at_s)


def job_summaries(state: State) -> tuple[JobSummary, ...]:
    return tuple(_job_summary(state, job) for job in sorted(state.jobs))


def job_status(state: State, job: JobName) -> JobStatus | None:
    entry = state.jobs.get(job)
    if entry is None:
        return None
    added = entry.versions[entry.latest]
    return JobStatus(
        job=JobVersion(job=added.job, version=entry.latest, submitted_at_s=added.submitted_at_s, stopped=entry.stopped),
        allocations=allocations(state, job=job, terminal=True),
        warnings=()
        if entry.stopped
        else (*job_warnings(state, added.job), *_held_back(state, job), *_would_fit(state, job)),
        rollout=_rollout(state, job),
        rollout_reason=entry.rollout_reason,
        state=_job_state(state, job),
        next_launch_s=_next_launch_s(state, job),
        scaling=scaling.statuses(state, job),
        children=tuple(_job_summary(state, child) for child in entry.children),
    )


def job_history(state: State, job: JobName) -> tuple[VersionStatus, ...] | None:
    """The versions that are kept, the oldest first."""
    entry = state.jobs.get(job)
    if entry is None:
        return None
    return tuple(
        VersionStatus(
            version=JobVersion(
                job=added.job,
                version=version,
                submitted_at_s=added.submitted_at_s,
                stopped=entry.stopped and version == entry.latest,
            ),
            rollout=entry.outcomes[version].state if version in entry.outcomes else _unended(state, job, version),
            reason=entry.outcomes[version].reason if version in entry.outcomes else "",
        )
        for version, added in sorted(entry.versions.items())
    )


def node_states(state: State) -> tuple[NodeState, ...]:
    return tuple(_node_state(state, state.nodes.reference[node]) for node in sorted(state.nodes.reference))


def node_state(state: State, node: NodeId) -> NodeState | None:
    ref = state.nodes.reference.get(node)
    return _node_state(state, ref) if ref is not None else None


def allocations(
    state: State, *, job: JobName | None = None, node: NodeId | None = None, terminal: bool = False
) -> tuple[Allocation, ...]:
    """In the order of job, group and index; the newest of each last. `terminal`: those that ended too."""
    table = state.table
    rows = _job_rows(state, job) if job is not None else np.arange(table.size)
    status = table.status[rows]
    rows = rows[(status != columns.FORGOTTEN) if terminal else (status == columns.LIVE)]
    if node is not None:
        rows = rows[table.node[rows] == state.nodes.reference.get(node, -2)]
    return _sorted(_allocation(state, row) for row in rows.tolist())


def allocation(state: State, alloc: AllocId) -> Allocation | None:
    serial = state.serial(alloc)
    row = state.table.row(serial) if serial is not None else None
    return _allocation(state, row) if row is not None else None


def allocation_by_prefix(state: State, prefix: str) -> Allocation | Ambiguous | None:
    """The one whose id begins with `prefix`; the whole id is found without a search."""
    exact = allocation(state, AllocId(prefix))
    if exact is not None:
        return exact
    kept = np.flatnonzero(state.table.status[: state.table.size] != columns.FORGOTTEN)
    ids = (state.alloc_id(serial) for serial in state.table.serial[kept].tolist())
    matches = tuple(sorted(alloc for alloc in ids if alloc.startswith(prefix)))
    if len(matches) == 1:
        return allocation(state, matches[0])
    return Ambiguous(matches=matches[:_AMBIGUOUS_SHOWN]) if matches else None


def allocations_of_service(state: State, service: ServiceName) -> tuple[Allocation, ...]:
    """Live ones that have the service, whether they provide it or only call by its name."""
    families = {
        group.family for group in state.groups.values() if any(one.name == service for one in group.group.services)
    }
    rows = [row for family in families for row in state.family_rows(family).tolist()]
    return _sorted(
        _allocation(state, row)
        for row in rows
        if state.table.status[row] == columns.LIVE
        and any(one.name == service for one in state.group_of(row).group.services)
    )


def _job_rows(state: State, job: JobName) -> Ints:
    parts = [state.family_rows(family) for family in _families(state, job)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _families(state: State, job: JobName) -> tuple[FamilyKey, ...]:
    entry = state.jobs.get(job)
    versions = entry.versions.values() if entry is not None else ()
    return tuple(sorted({(job, group.name) for version in versions for group in version.job.groups}))


def _sorted(found: Iterable[Allocation]) -> tuple[Allocation, ...]:
    return tuple(sorted(found, key=lambda one: (one.job, one.group, one.index, one.created_at_s)))


def _allocation(state: State, row: int) -> Allocation:
    table = state.table
    group, serial, ref = state.group_of(row), int(table.serial[row]), int(table.node[row])
    status = _status(state, row)
    report = state.live.reports.get(serial) or state.last_reports.get(serial)
    reason = state.reasons.get(serial, "")
    if status is AllocStatus.PENDING and ref < 0:
        reason = state.live.unplaced.get(group.family, "")
    elif not reason and report is not None:
        reason = report.message
    dynamic = state.ports.get(serial, ())[len(group.mesh_services) :]
    return Allocation(
        id=state.alloc_id(serial),
        job=group.job,
        job_version=group.version,
        group=group.group.name,
        index=int(table.index[row]),
        node=state.nodes.nodes[ref].id if ref >= 0 else None,
        desired=Desired.STOP if table.desired[row] == columns.STOP else Desired.RUN,
        status=status,
        healthy=bool(table.healthy[row] and table.status[row] == columns.LIVE),
        report=report,
        mesh_ports=dict(zip(group.mesh_services, state.ports.get(serial, ()), strict=False)),
        ports=published_ports(group.group.network, dict(zip(group.dynamic_ports, dynamic, strict=False))),
        created_at_s=float(table.created_s[row]),
        role=columns.ROLES[table.role[row]],
        reason=reason,
    )


def _status(state: State, row: int) -> AllocStatus:
    ended = int(state.table.status[row])
    if ended != columns.LIVE:
        return ENDED_STATUSES[ended]
    observed = OBSERVED[state.table.observed[row]]
    # What an agent says has ended has not ended before the journal knows.
    return AllocStatus.STOPPING if observed in TERMINAL else observed


def _job_summary(state: State, job: JobName) -> JobSummary:
    entry, table = state.jobs[job], state.table
    rows = _job_rows(state, job)
    live = rows[table.status[rows] == columns.LIVE]
    counts = Counter(table.observed[live].tolist())
    current = () if entry.stopped else state.current_groups(job)
    wanted = sum(state.groups[key].group.count for key in current)
    if entry.job.type is JobType.SYSTEM:
        wanted = int((table.desired[live] == columns.RUN).sum())
    return JobSummary(
        name=job,
        type=entry.job.type,
        version=entry.latest,
        stopped=entry.stopped,
        wanted=wanted,
        running=counts[OBSERVED.index(AllocStatus.RUNNING)],
        healthy=int(table.healthy[live].sum()),
        pending=counts[OBSERVED.index(AllocStatus.PENDING)],
        failed=int((table.status[rows] == columns.FAILED).sum()),
        submitted_at_s=entry.versions[entry.latest].submitted_at_s,
        state=_job_state(state, job),
        parent=entry.job.parent,
        next_launch_s=_next_launch_s(state, job),
        namespace=entry.job.namespace,
    )


def _job_state(state: State, job: JobName) -> JobState:
    entry, table = state.jobs[job], state.table
    if entry.stopped:
        return JobState.STOPPED
    if entry.job.is_template:
        return JobState.WAITING
    rows = _job_rows(state, job)
    live = rows[table.status[rows] == columns.LIVE]
    if entry.job.type is JobType.BATCH and entry.rollout is RolloutState.SUCCESSFUL and not len(live):
        return JobState.COMPLETE
    if entry.rollout is RolloutState.FAILED:
        return JobState.FAILED
    runs = (table.observed[live] == OBSERVED.index(AllocStatus.RUNNING)).any()
    return JobState.RUNNING if runs else JobState.PENDING


def _next_launch_s(state: State, job: JobName) -> float | None:
    launch = state.live.launches.get(job)
    return launch.at_s if launch is not None else None


def _unended(state: State, job: JobName, version: int) -> RolloutState:
    entry = state.jobs[job]
    return entry.rollout if version == entry.latest else RolloutState.RUNNING


def _held_back(state: State, job: JobName) -> tuple[str, ...]:
    """Groups whose failed allocations are not replaced yet."""
    found = []
    for key in state.current_groups(job):
        group = state.groups[key]
        given_up = retry.given_up(state, group)
        for index, backoff in sorted(state.live.backoff.get(group.family, {}).items()):
            name, wait_s = f"{group.group.name}[{index}]", backoff.until_s - state.live.now_s
            if index in given_up:
                what = "given up, as `reschedule: {attempts: ...}` says"
                found.append(f"{name}: failed {backoff.failures} times in a row; {what}")
            elif wait_s > 0:
                found.append(f"{name}: failed {backoff.failures} times in a row; replaced in {wait_s:.0f} s")
    return tuple(found)


def _rollout(state: State, job: JobName) -> RolloutState:
    entry = state.jobs[job]
    if entry.rollout is RolloutState.RUNNING and entry.paused:
        return RolloutState.PAUSED
    if entry.rollout is RolloutState.RUNNING and job in state.live.proven:
        return RolloutState.PROVEN
    return entry.rollout


def _would_fit(state: State, job: JobName) -> tuple[str, ...]:
    """For groups that wait for a node: what would make them fit."""
    groups = (state.groups[key] for key in state.current_groups(job))
    return tuple(
        f"group {group.group.name} would fit {remedy}"
        for group in groups
        if group.family in state.live.unplaced
        for remedy in would_fit(state, group)[:2]
    )


def _node_state(state: State, ref: int) -> NodeState:
    link, nodes = state.live.links[ref], state.nodes
    reason = link.reason
    if state.live.braked and link.status is not NodeStatus.READY:
        reason = f"{reason}; {state.live.braked}, so nothing is ejected or replaced"
    return NodeState(
        node=nodes.nodes[ref],
        status=link.status,
        reason=reason,
        status_since_s=link.since_s,
        cpu_millis_used=int(nodes.cpu_total[ref] - nodes.cpu_free[ref]),
        memory_bytes_used=int(nodes.memory_total[ref] - nodes.memory_free[ref]),
        allocations=int(nodes.allocations[ref]),
        acknowledged=link.acknowledged,
        eligible=not nodes.closed[ref],
        drain=nodes.drains.get(ref),
    )
