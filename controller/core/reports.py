"""What agents say of allocations. Owns the last word of each; what ended is left for `commit` to write down."""

import math
from collections.abc import Iterable

from controller.core import dependencies, migration, notices
from controller.core import table as columns
from controller.core.kinds import Kind
from controller.core.state import State
from controller.core.table import OBSERVED_CODES
from controller.core.volatile import Ended, Pulling
from outrider.model.allocation import TERMINAL, AllocReport, AllocStatus
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType

_KINDS = {
    AllocStatus.STARTING: Kind.ALLOC_STARTING,
    AllocStatus.RUNNING: Kind.ALLOC_RUNNING,
    AllocStatus.STOPPING: Kind.ALLOC_STOPPING,
}


def take_reports(state: State, ref: int, reports: Iterable[AllocReport], now_s: float, *, whole: bool = False) -> None:
    """`whole`: these are all that the node has; of the others nothing is known any more."""
    told = {_take(state, ref, report, now_s) for report in reports}
    if whole:
        for row in state.node_rows(ref).tolist():
            serial = int(state.table.serial[row])
            if serial not in told and state.live.forget_report(serial) is not None:
                _observe(state, row, AllocStatus.PENDING, healthy=False, now_s=now_s)
                state.live.mesh_nodes[ref] = None


def is_healthy(report: AllocReport) -> bool:
    return report.status is AllocStatus.RUNNING and all(check.passing for check in report.checks)


def _take(state: State, ref: int, report: AllocReport, now_s: float) -> int:
    """The serial of the reported allocation; -1 where it is none of the journal's."""
    serial = state.serial(report.alloc)
    if serial is None or not 0 <= serial < state.next_serial or _skipped(state, serial):
        return _unclaimed(state, ref, report)
    row = state.table.row(serial)
    if row is not None and state.table.node[row] != ref:
        row = None  # an agent can speak only of its own: it learns nothing of another's, and its word is worth nothing
    if row is not None and state.table.status[row] == columns.LIVE:
        _remember(state, row, report, now_s)
    elif report.status in TERMINAL:
        state.live.to(ref).removed[report.alloc] = None
    elif row is None:
        state.live.to(ref).strangers[report.alloc] = None
    else:  # lost here, and the node came back with it: one copy too many
        state.live.to(ref).serials[serial] = None
    return serial


def _remember(state: State, row: int, report: AllocReport, now_s: float) -> None:
    live, ref, serial = state.live, int(state.table.node[row]), int(state.table.serial[row])
    before = live.reports.get(serial)
    if before == report:
        return
    live.reports[serial] = report
    if report.status in TERMINAL:
        live.ended[serial] = Ended(report.status, report.message, report)
        return
    moved = before is None or before.status is not report.status
    if moved and report.status in _KINDS:
        notices.of_alloc(state, _KINDS[report.status], row, report.message)
    if report.move is not None:
        migration.told(state, row, report, before)
    _note_pulling(state, serial, now_s, pulling=report.pulling)
    restarts = sum(task.restarts for task in report.tasks)
    if before is not None and restarts > sum(task.restarts for task in before.tasks):
        why = next((task.message for task in report.tasks if task.restarts and task.message), report.message)
        notices.of_alloc(state, Kind.ALLOC_RESTARTED, row, why)
    _observe(state, row, report.status, healthy=is_healthy(report), now_s=now_s)
    changed = before is None or before.checks != report.checks or before.local_address != report.local_address
    if (moved or changed) and serial in state.nodes.serving[ref]:
        live.mesh_nodes[ref] = None


def _note_pulling(state: State, serial: int, now_s: float, *, pulling: bool) -> None:
    waited = state.live.pulling.get(serial)
    if waited is None:
        if pulling:
            state.live.pulling[serial] = Pulling(since_s=now_s)
    elif pulling:
        waited.since_s = min(waited.since_s, now_s)
    elif waited.since_s <= now_s:
        waited.total_s, waited.since_s = waited.total_s + now_s - waited.since_s, math.inf


def _observe(state: State, row: int, status: AllocStatus, *, healthy: bool, now_s: float) -> None:
    table = state.table
    table.observed[row] = OBSERVED_CODES[status]
    if bool(table.healthy[row]) != healthy:
        table.healthy[row] = healthy
        table.healthy_since_s[row] = now_s if healthy else math.inf
        notices.of_alloc(state, Kind.ALLOC_HEALTHY if healthy else Kind.ALLOC_UNHEALTHY, row)
        dependencies.health_changed(state, state.group_of(row))
    group = state.group_of(row)
    # A batch job's rollout is judged by how its work ended.
    settled = state.jobs[group.job].rollout is RolloutState.SUCCESSFUL and group.job not in state.live.moving
    if group.type is not JobType.BATCH and not settled:
        state.live.dirty_jobs[group.job] = None


def _skipped(state: State, serial: int) -> bool:
    """Given out after the snapshot that was restored."""
    return any(range_.first <= serial < range_.past for range_ in state.skipped)


def _unclaimed(state: State, ref: int, report: AllocReport) -> int:
    """DESIGN, decision 1: never killed at first sight."""
    node = state.nodes.nodes[ref].id
    if report.alloc not in state.live.unclaimed and len(state.live.unclaimed) < state.policy.unclaimed_max:
        state.live.unclaimed[report.alloc] = node
        message = "the agent runs it and the journal knows nothing of it: kept"
        notices.of_stranger(state, Kind.ALLOC_UNCLAIMED, node=node, alloc=report.alloc, message=message)
    return -1
