"""What follows from a record once it is true: who is told of it, and who looks again. Never writes, never decides."""

import numpy as np

from controller.core import dependencies, drains, launch, liveness, notices, reconcile, retry, scaling, sealed
from controller.core import table as columns
from controller.core.access_records import NodeRevoked
from controller.core.kinds import Kind
from controller.core.records import (
    AllocSteered,
    AllocTransitions,
    GroupScaled,
    JobLaunched,
    JobStopped,
    JobVersionAdded,
    NodeDowned,
    NodeRegistered,
    NodeSteered,
    Plan,
    Record,
    RolloutEnded,
    RolloutSteered,
    Run,
    SecretPut,
    Update,
)
from controller.core.state import State
from outrider.ids import JobName
from outrider.model.allocation import AllocAction, AllocStatus
from outrider.model.fleet import RolloutAction, RolloutState
from outrider.model.node import NodeStatus

_ENDED = {
    AllocStatus.COMPLETE: Kind.ALLOC_COMPLETE,
    AllocStatus.FAILED: Kind.ALLOC_FAILED,
    AllocStatus.LOST: Kind.ALLOC_LOST,
}
_STEERED = {
    RolloutAction.PROMOTE: Kind.ROLLOUT_PROMOTED,
    RolloutAction.PAUSE: Kind.ROLLOUT_PAUSED,
    RolloutAction.RESUME: Kind.ROLLOUT_RESUMED,
}
_ROLLOUTS = {
    RolloutState.SUCCESSFUL: Kind.ROLLOUT_SUCCESSFUL,
    RolloutState.FAILED: Kind.ROLLOUT_FAILED,
}


def applied(state: State, record: Record, now_s: float, *, known: bool) -> None:
    """What the world is told of `record`, which is applied."""
    match record:
        case NodeRegistered():
            _follow_registration(state, record, now_s, known=known)
        case NodeDowned():
            liveness.went_down(state, state.nodes.reference[record.node], now_s)
        case SecretPut():
            sealed.told(state, record)
        case NodeSteered():
            _follow_node(state, record)
        case AllocSteered():
            _follow_alloc(state, record)
        case Plan():
            _follow_plan(state, record)
        case NodeRevoked():
            liveness.revoked(state, record.node, now_s)
        case _:
            _job_applied(state, record, now_s)


def _job_applied(state: State, record: Record, now_s: float) -> None:
    """Likewise, of records about a job."""
    match record:
        case JobVersionAdded():
            _start_anew(state, record.job.name)
            notices.of_job(state, Kind.JOB_SUBMITTED, record.job.name, f"version {record.version}")
            notices.of_job(state, Kind.ROLLOUT_STARTED, record.job.name, f"version {record.version}")
            _job_changed(state, record.job.name)
            launch.forget_plan(state, record.job.name)
            launch.plan_next(state, record.job.name)
            scaling.watch(state, record.job.name, now_s)
        case JobStopped():
            notices.of_job(state, Kind.JOB_STOPPED, record.job)
            _job_changed(state, record.job)
            launch.forget_plan(state, record.job)
            scaling.watch(state, record.job, now_s)
            state.live.perhaps_over[record.job] = None
        case JobLaunched():
            launch.tell(state, record)
        case GroupScaled():
            notices.of_job(state, Kind.JOB_SCALED, record.job, f"group {record.group}: {record.reason}")
            state.live.dirty_jobs[record.job] = None
            scaling.changed(state, record, now_s)
        case RolloutEnded():
            state.live.perhaps_over[record.job] = None
            if record.state is RolloutState.FAILED:
                state.live.dirty_jobs[record.job] = None  # canaries go, and what is pending of it
            notices.of_job(state, _ROLLOUTS[record.state], record.job, record.reason)
        case RolloutSteered():
            _follow_steered(state, record, now_s)
        case _:
            pass  # told already, or an epoch, an address, a dropped version: nobody waits for it


def _job_changed(state: State, job: JobName) -> None:
    state.live.dirty_jobs[job] = None
    versions = state.jobs[job].versions.values()
    # To tell the mesh means to look at every job: not for those that have nothing to do with it.
    state.live.mesh_intentions |= any(group.services for added in versions for group in added.job.groups)
    for key in state.current_groups(job):
        dependencies.health_changed(state, state.groups[key])  # what it offers is there, or is not any more


def _start_anew(state: State, job: JobName) -> None:
    """Of a new version nothing has failed or been said yet."""
    live = state.live
    for family in {(job, group.name) for one in state.jobs[job].versions.values() for group in one.job.groups}:
        live.backoff.pop(family, None)
        live.lost.pop(family, None)
    live.steered_s.pop(job, None)
    live.proven.pop(job, None)


def _follow_steered(state: State, record: RolloutSteered, now_s: float) -> None:
    state.live.steered_s[record.job] = now_s
    state.live.dirty_jobs[record.job] = None
    notices.of_job(state, _STEERED[record.action], record.job, f"version {record.version}")


def _follow_node(state: State, record: NodeSteered) -> None:
    ref = state.nodes.reference[record.node]
    drains.begun(state, ref)
    if record.drain is not None:
        notices.of_node(state, Kind.NODE_DRAINING, ref)
    elif record.eligible:
        notices.of_node(state, Kind.NODE_OPENED, ref)
        liveness.room_appeared(state)
    else:
        empty = not state.nodes.allocations[ref]
        notices.of_node(state, Kind.NODE_DRAINED if empty else Kind.NODE_CLOSED, ref)


def _follow_alloc(state: State, record: AllocSteered) -> None:
    row = state.table.row(record.serial)
    if record.action is AllocAction.STOP:
        _told_to_stop(state, record.serial, "stopped by an operator")
    elif row is not None and state.table.status[row] == columns.LIVE:
        state.live.to(int(state.table.node[row])).serials[record.serial] = None
    if row is not None:
        state.live.dirty_jobs[state.group_of(row).job] = None


def _follow_registration(state: State, record: NodeRegistered, now_s: float, *, known: bool) -> None:
    ref = state.nodes.reference[record.node.id]
    if not known:
        liveness.watch(state, ref, now_s, "its agent has not connected yet")
        notices.of_node(state, Kind.NODE_JOINED, ref, record.node.address)
    state.live.mesh_nodes[ref] = None
    joining = state.live.joining.pop(record.node.id, None)
    if joining is not None:
        liveness.connected(state, joining, now_s)
    elif (link := state.live.links[ref]).session is not None and link.status is not NodeStatus.READY:
        liveness.returned(state, ref, now_s)
    liveness.room_appeared(state)


def _follow_plan(state: State, plan: Plan) -> None:
    for run in plan.runs:
        _follow_run(state, run)
    for late in plan.late:
        for serial in np.frombuffer(late.serials, np.int64).tolist():
            row = state.table.row(serial)
            assert row is not None, "just placed"
            _placed(state, int(state.table.node[row]), serial)
            notices.of_alloc(state, Kind.ALLOC_PLACED, row)
    for update in plan.updates:
        _follow_update(state, update)
    for serial in np.frombuffer(plan.settled, np.int64).tolist():
        row = state.table.row(serial)
        if row is not None and serial in state.nodes.serving[state.table.node[row]]:
            state.live.mesh_nodes[int(state.table.node[row])] = None
    for old, _ in plan.moves:
        row = state.table.row(old)
        assert row is not None, "it runs"
        state.live.to(int(state.table.node[row])).serials[old] = None
        state.live.dirty_jobs[state.group_of(row).job] = None
    for part in plan.stops:
        for serial in np.frombuffer(part.serials, np.int64).tolist():
            _told_to_stop(state, serial, part.reason)
            if part.by is not None and (row := state.table.row(serial)) is not None:
                state.live.dirty_jobs[state.group_of(row).job] = None  # wanted as before: elsewhere, or later


def _told_to_stop(state: State, serial: int, reason: str) -> None:
    row = state.table.row(serial)
    if row is None:
        return  # it ran nowhere, and is forgotten already
    if state.table.status[row] == columns.LIVE:
        notices.of_alloc(state, Kind.ALLOC_STOPPING, row, reason)
        reconcile.to_stop(state, row, serial)
    else:
        notices.of_alloc(state, Kind.ALLOC_COMPLETE, row, reason)


def _follow_update(state: State, update: Update) -> None:
    for serial in np.frombuffer(update.serials, np.int64).tolist():
        row = state.table.row(serial)
        if row is not None and (ref := int(state.table.node[row])) >= 0:
            state.live.to(ref).serials[serial] = None
            notices.of_alloc(state, Kind.ALLOC_UPDATED, row, f"version {update.version}")


def _follow_run(state: State, run: Run) -> None:
    nodes = np.frombuffer(run.nodes, np.int32).tolist()
    group = state.groups[state.group_keys[run.job, run.version, run.group]]
    one_by_one = len(nodes) <= state.policy.events_each_max
    first = state.table.row(run.first_serial)
    assert first is not None, "just added"
    for at, ref in enumerate(nodes):
        if ref >= 0:
            _placed(state, ref, run.first_serial + at)
        if one_by_one:
            kind = Kind.ALLOC_PLACED if ref >= 0 else Kind.ALLOC_PENDING
            notices.of_alloc(state, kind, first + at, "" if ref >= 0 else state.live.unplaced.get(group.family, ""))
    if not one_by_one:
        placed = sum(ref >= 0 for ref in nodes)
        text = f"{placed} allocations of {group.group.name} placed, {len(nodes) - placed} pending"
        notices.of_job(state, Kind.ALLOC_PLACED if placed else Kind.ALLOC_PENDING, run.job, text)


def _placed(state: State, ref: int, serial: int) -> None:
    state.live.to(ref).serials[serial] = None
    if serial in state.nodes.serving[ref]:
        state.live.mesh_nodes[ref] = None


def endings(state: State, record: AllocTransitions, now_s: float) -> None:
    """Before the record is applied: what ended may be forgotten at once."""
    live, table = state.live, state.table
    for serial in np.frombuffer(record.serials, np.int64).tolist():
        live.withdrawing.pop(serial, None)
        live.forget_report(serial)
        row = table.row(serial)
        assert row is not None, "only what lives ends"
        group, ref = state.group_of(row), int(table.node[row])
        notices.of_alloc(state, _ENDED[record.status], row, record.reason)
        live.dirty_jobs[group.job] = live.perhaps_over[group.job] = None
        drains.left(state, ref)
        if group.group.services:
            live.mesh_nodes[ref] = None
        if record.status is not AllocStatus.LOST:
            live.to(ref).removed[state.alloc_id(serial)] = None
        if table.desired[row] == columns.RUN:
            _missed(state, row, columns.ENDED_CODES[record.status], now_s)
    liveness.room_appeared(state)


def _missed(state: State, row: int, status: int, now_s: float) -> None:
    """It was to run, and another is wanted in its place."""
    if status == columns.LOST:
        state.live.lost.setdefault(state.group_of(row).family, set()).add(int(state.table.index[row]))
    elif retry.counts_as_failure(state, row, status):
        retry.note_failure(state, row, now_s)
