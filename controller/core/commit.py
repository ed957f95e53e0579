"""What goes to the journal next, and what follows once it is there. Owns the one append in flight.

While the journal works, what happens gathers and goes with the next append: group commit, and a plan always starts
from a state in which all that was written is true.
"""

from typing import assert_never

import numpy as np

from controller.core import amend, launch, liveness, notices, quota, reconcile, sealed, store_calls
from controller.core import table as columns
from controller.core.access_records import NodeRevoked
from controller.core.commands import Append, Reply
from controller.core.deploy import decide, note_failure
from controller.core.events import (
    Appended,
    JobDispatchRequested,
    JobRevertRequested,
    JobScaleRequested,
    JobStopRequested,
    JobSubmitted,
    LaunchDue,
    StoreCall,
    Ticket,
)
from controller.core.kinds import Kind
from controller.core.records import (
    AllocTransitions,
    GroupScaled,
    JobLaunched,
    JobStopped,
    JobVersionAdded,
    NodeDowned,
    NodeRegistered,
    Plan,
    Record,
    RolloutEnded,
    Run,
    SecretPut,
    VirtualAddressAssigned,
)
from controller.core.state import State
from controller.core.submit import names_of_stop, names_touched, stop, submit
from controller.core.versions import revert, scale
from controller.core.volatile import AccessCall, InFlight, JobCall
from outrider.ids import JobName
from outrider.model.allocation import AllocReport, AllocStatus
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType
from outrider.model.node import NodeStatus

_ENDED = {
    AllocStatus.COMPLETE: Kind.ALLOC_COMPLETE,
    AllocStatus.FAILED: Kind.ALLOC_FAILED,
    AllocStatus.LOST: Kind.ALLOC_LOST,
}
_ROLLOUTS = {
    RolloutState.SUCCESSFUL: Kind.ROLLOUT_SUCCESSFUL,
    RolloutState.FAILED: Kind.ROLLOUT_FAILED,
}


def flush(state: State, now_s: float, seed: int) -> None:
    """Ask for the next append, if the journal is free and there is anything to write."""
    live = state.live
    while live.in_flight is None:
        records, replies = _gathered(state, now_s)
        if not records and not replies:
            records = decide(state, now_s, seed)
        if records:
            live.ticket += 1
            live.in_flight = InFlight(Ticket(live.ticket), records, replies)
            live.out.append(Append(ticket=live.in_flight.ticket, records=records))
            return
        if not replies:
            return
        live.out.extend(replies)  # nothing to wait for


def appended(state: State, event: Appended, now_s: float) -> None:
    flight = state.live.in_flight
    assert flight is not None, "the journal answers what it was asked"
    assert flight.ticket == event.ticket, "tickets come back in order"
    state.live.in_flight = None
    for record in flight.records:
        if isinstance(record, AllocTransitions):
            _tell_endings(state, record, now_s)  # before: what ended may be forgotten at once
        before = len(state.nodes)
        state.apply(record)
        _follow(state, record, now_s, known=len(state.nodes) == before)
    for job in state.live.perhaps_over:
        launch.note_over(state, job)
    state.live.perhaps_over.clear()
    state.live.out.extend(flight.replies)


def _gathered(state: State, now_s: float) -> tuple[tuple[Record, ...], tuple[Reply, ...]]:
    live = state.live
    records: list[Record] = [NodeRegistered(node=node) for node in live.registering.values()]
    lost: list[int] = []
    for ref in live.downing:
        if state.nodes.nodes[ref].id not in live.registering:
            records.append(NodeDowned(node=state.nodes.nodes[ref].id))
            lost.extend(state.table.serial[state.node_rows(ref)].tolist())
    live.registering = {}
    if lost:
        reason = "its node went down"
        records.append(_transition(AllocStatus.LOST, lost, now_s, reason))
    records.extend(_endings(state, set(lost), now_s))
    records.extend(launch.retired(state))
    calls, replies = _calls(state, now_s)
    return (*records, *calls), replies


def _endings(state: State, lost: set[int], now_s: float) -> list[Record]:
    """What agents said has ended, one record for each manner of ending."""
    ended, state.live.ended = state.live.ended, {}
    manners: dict[tuple[AllocStatus, str], list[int]] = {}
    for serial, end in ended.items():
        row = state.table.row(serial)
        if serial not in lost and row is not None and state.table.status[row] == columns.LIVE:
            manners.setdefault((end.status, end.reason), []).append(serial)
    records: list[Record] = []
    for (status, reason), serials in manners.items():
        reports: tuple[AllocReport, ...] = ()
        if status is AllocStatus.FAILED:
            reports = tuple(report for serial in serials if (report := ended[serial].report) is not None)
        records.append(
            AllocTransitions(status=status, at_s=now_s, serials=_packed(serials), reason=reason, reports=reports)
        )
    return records


def _calls(state: State, now_s: float) -> tuple[list[Record], tuple[Reply, ...]]:
    """Operators' calls up to the first that touches what another of them touches."""
    records: list[Record] = []
    replies: list[Reply] = []
    touched: set[str] = set()
    addresses = 0
    while state.live.calls:
        call = state.live.calls[0]
        if isinstance(call, StoreCall):
            if replies:
                break
            # Alone: it touches whatever job names what it changes.
            state.live.calls.popleft()
            changes, told = store_calls.answer(state, call, now_s)
            return [*changes], (told,)
        names = frozenset({amend.touched(call)}) if isinstance(call, AccessCall) else _touched(state, call)
        if names & touched:
            break
        touched |= names
        state.live.calls.popleft()
        made, reply = (
            amend.answer(state, call, now_s) if isinstance(call, AccessCall) else _judged(state, call, now_s, addresses)
        )
        addresses += sum(isinstance(record, VirtualAddressAssigned) for record in made)
        records.extend(made)
        if reply is not None:
            replies.append(reply)
    return records, tuple(replies)


def _touched(state: State, call: JobCall) -> frozenset[str]:
    match call:
        case JobSubmitted():
            return names_touched(state, call.job)
        case JobStopRequested():
            return names_of_stop(state, call.job)
        case JobRevertRequested() if (entry := state.jobs.get(call.job)) is not None:
            versions = entry.versions.values()
            return frozenset().union(*(names_touched(state, added.job) for added in versions))
        case _:
            entry = state.jobs.get(call.job)
            counted = quota.touched(state, entry.job.namespace) if entry is not None else frozenset()
            return counted | {f"job {call.job}"}


def _judged(state: State, call: JobCall, now_s: float, addresses: int) -> tuple[tuple[Record, ...], Reply | None]:
    match call:
        case JobSubmitted():
            return submit(state, call, now_s, addresses)
        case JobStopRequested():
            return stop(state, call)
        case JobDispatchRequested():
            return launch.by_hand(state, call, now_s)
        case LaunchDue():
            return launch.by_schedule(state, call, now_s), None
        case JobRevertRequested():
            return revert(state, call, now_s, addresses)
        case JobScaleRequested():
            return scale(state, call)
        case _:
            assert_never(call)


def _follow(state: State, record: Record, now_s: float, *, known: bool) -> None:
    """What the world is told of `record`, which is applied."""
    match record:
        case NodeRegistered():
            _follow_registration(state, record, now_s, known=known)
        case NodeDowned():
            liveness.went_down(state, state.nodes.reference[record.node], now_s)
        case JobVersionAdded():
            state.live.backoff = {key: one for key, one in state.live.backoff.items() if key[0] != record.job.name}
            notices.of_job(state, Kind.JOB_SUBMITTED, record.job.name, f"version {record.version}")
            notices.of_job(state, Kind.ROLLOUT_STARTED, record.job.name, f"version {record.version}")
            _job_changed(state, record.job.name)
            launch.forget_plan(state, record.job.name)
            launch.plan_next(state, record.job.name)
        case JobStopped():
            notices.of_job(state, Kind.JOB_STOPPED, record.job)
            _job_changed(state, record.job)
            launch.forget_plan(state, record.job)
            state.live.perhaps_over[record.job] = None
        case JobLaunched():
            launch.tell(state, record)
        case GroupScaled():
            notices.of_job(state, Kind.JOB_SCALED, record.job, f"group {record.group}: {record.reason}")
            state.live.dirty_jobs[record.job] = None
        case RolloutEnded():
            state.live.perhaps_over[record.job] = None
            notices.of_job(state, _ROLLOUTS[record.state], record.job, record.reason)
        case SecretPut():
            sealed.told(state, record)
        case Plan():
            _follow_plan(state, record)
        case NodeRevoked():
            liveness.revoked(state, record.node, now_s)
        case _:
            pass  # told already, or an epoch, an address, a dropped version: nobody waits for it


def _job_changed(state: State, job: JobName) -> None:
    state.live.dirty_jobs[job] = None
    state.live.mesh_intentions = True


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
    for part in plan.stops:
        for serial in np.frombuffer(part.serials, np.int64).tolist():
            row = state.table.row(serial)
            if row is None:
                continue  # it ran nowhere, and is forgotten already
            if state.table.status[row] == columns.LIVE:
                notices.of_alloc(state, Kind.ALLOC_STOPPING, row, part.reason)
                if part.by is not None:
                    state.live.dirty_jobs[state.group_of(row).job] = None  # wanted as before: elsewhere, or later
                reconcile.to_stop(state, row, serial)
            else:
                notices.of_alloc(state, Kind.ALLOC_COMPLETE, row, part.reason)


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


def _tell_endings(state: State, record: AllocTransitions, now_s: float) -> None:
    live, table = state.live, state.table
    for serial in np.frombuffer(record.serials, np.int64).tolist():
        live.withdrawing.pop(serial, None)
        live.forget_report(serial)
        row = table.row(serial)
        assert row is not None, "only what lives ends"
        group, ref = state.group_of(row), int(table.node[row])
        notices.of_alloc(state, _ENDED[record.status], row, record.reason)
        live.dirty_jobs[group.job] = live.perhaps_over[group.job] = None
        if group.group.services:
            live.mesh_nodes[ref] = None
        if record.status is not AllocStatus.LOST:
            live.to(ref).removed[state.alloc_id(serial)] = None
            if table.desired[row] == columns.RUN and group.type is not JobType.BATCH:
                note_failure(state, group.family, now_s)
    liveness.room_appeared(state)


def _transition(status: AllocStatus, serials: list[int], now_s: float, reason: str) -> Record:
    return AllocTransitions(status=status, at_s=now_s, serials=_packed(serials), reason=reason)


def _packed(serials: list[int]) -> bytes:
    return np.array(serials, np.int64).tobytes()
