"""The one entry of the controller's core: an event in, commands out. Owns the order within a step; decides nothing.

The state is changed in place; the result depends on the arguments alone. Every step ends in the same way: what can be
written is asked for, then the mesh, then the agents are told.
"""

import random
from typing import assert_never

import msgspec

from controller.core import absence, commit, deploy, drains, launch, liveness, reconcile, scaling
from controller.core.commands import Command, Reply
from controller.core.events import (
    AgentApplied,
    AgentConnected,
    AgentDisconnected,
    AgentReported,
    Appended,
    EndpointsWithdrawn,
    Event,
    FiguresReported,
    FingerprintChanged,
    HeartbeatReceived,
    LastWillSeen,
    LaunchPlanned,
    OperatorCall,
    Tick,
)
from controller.core.reports import take_reports
from controller.core.state import State
from outrider.ids import JobName


def step(state: State, event: Event, now_s: float, rng: random.Random) -> tuple[Command, ...]:
    """`now_s`: wall-clock seconds that never step back within a controller's life (wall at start + monotonic)."""
    live = state.live
    if live.started_at_s is None:
        liveness.begin(state, now_s)
        live.now_s = now_s
        launch.begin(state)
        scaling.begin(state)
    live.now_s = now_s
    _take(state, event, now_s)
    if live.in_flight is None:
        commit.flush(state, now_s, rng.getrandbits(63) if live.dirty_jobs or live.stirred else 0)
    reconcile.emit(state, now_s)
    out, live.out = live.out, []
    return tuple(out)


def _take(state: State, event: Event, now_s: float) -> None:
    if isinstance(event, OperatorCall):
        _call(state, event)
        return
    match event:
        case HeartbeatReceived():
            liveness.heartbeat(state, event, now_s)
        case AgentReported() | AgentApplied() | FingerprintChanged() | FiguresReported():
            _listen(state, event, now_s)
        case Appended():
            commit.appended(state, event, now_s)
        case AgentConnected():
            _connect(state, event, now_s)
        case AgentDisconnected():
            liveness.disconnected(state, event, now_s)
        case LastWillSeen():
            liveness.last_will(state, event)
        case EndpointsWithdrawn():
            serials = (state.serial(alloc) for alloc in event.allocs)
            reconcile.withdrawn(state, tuple(serial for serial in serials if serial is not None))
        case LaunchPlanned():
            launch.planned(state, event)
        case Tick():
            _tick(state, now_s)
        case _:
            assert_never(event)


def _listen(
    state: State, event: AgentReported | AgentApplied | FingerprintChanged | FiguresReported, now_s: float
) -> None:
    """To what an agent says on its present session; what comes from an older one is void."""
    joining = state.live.joining.get(event.node)
    if joining is not None and joining.session == event.session:
        # Its greeting waits for the journal: this is a later word of the same conversation, not to be lost.
        state.live.joining[event.node] = _greeting_with(state, joining, event)
        return
    ref = state.nodes.reference.get(event.node)
    if ref is None or state.live.links[ref].session != event.session:
        return
    match event:
        case AgentReported():
            take_reports(state, ref, event.reports, now_s)
        case AgentApplied():
            state.live.links[ref].acknowledged = event.generation
        case FiguresReported():
            scaling.take_figures(state, ref, event.figures, now_s)
        case FingerprintChanged():
            node = state.nodes.nodes[ref]
            if node.fingerprint != event.fingerprint:
                changed = msgspec.structs.replace(node, fingerprint=event.fingerprint)
                state.live.registering[node.id] = changed
        case _:
            assert_never(event)


def _greeting_with(
    state: State,
    joining: AgentConnected,
    event: AgentReported | AgentApplied | FingerprintChanged | FiguresReported,
) -> AgentConnected:
    match event:
        case AgentReported():
            reports = {report.alloc: report for report in (*joining.reports, *event.reports)}
            return msgspec.structs.replace(joining, reports=tuple(reports.values()))
        case AgentApplied():
            return msgspec.structs.replace(joining, acknowledged=max(joining.acknowledged, event.generation))
        case FingerprintChanged():
            node = msgspec.structs.replace(joining.node, fingerprint=event.fingerprint)
            state.live.registering[node.id] = node
            return msgspec.structs.replace(joining, node=node)
        case FiguresReported():
            return joining  # others follow in a moment
        case _:
            assert_never(event)


def _connect(state: State, event: AgentConnected, now_s: float) -> None:
    """At once where the journal knows the node as it is; else as soon as it does."""
    live, node = state.live, event.node
    ref = state.nodes.reference.get(node.id)
    settled = node.id not in live.registering and node.id not in live.joining
    if ref is not None and settled and state.nodes.nodes[ref] == node and not _downed(state, ref):
        liveness.connected(state, event, now_s)
    else:
        live.registering[node.id] = node
        live.joining[node.id] = event


def _downed(state: State, ref: int) -> bool:
    """Down for the journal, or about to be."""
    return bool(state.nodes.down[ref]) or ref in state.live.downing


def _call(state: State, event: OperatorCall) -> None:
    if len(state.live.calls) >= state.policy.operator_calls_max:
        message = "too many calls wait for the journal; try again in a moment"
        state.live.out.append(Reply(request=event.request, code="busy", message=message))
    else:
        state.live.calls.append(event)


def _tick(state: State, now_s: float) -> None:
    timers = state.live.timers
    while (due := timers.next_s) is not None and (key := timers.pop_due(now_s)) is not None:
        match key:
            case (liveness.SCAN, _):
                liveness.scan(state, now_s, due)
            case (absence.GRACE, int(ref)):
                liveness.grace_over(state, ref, now_s)
            case (reconcile.WITHDRAW, int(withdrawal)):
                reconcile.withdraw_timeout(state, withdrawal)
            case (drains.DRAIN, int(ref)):
                drains.deadline_over(state, ref)
            case (deploy.JOB, str(job)):
                state.live.dirty_jobs[JobName(job)] = None
            case (launch.LAUNCH, str(job)):
                launch.fired(state, JobName(job))
            case (scaling.SCALE, str(job)):
                scaling.fired(state, JobName(job), now_s)
            case _:
                raise AssertionError(f"a timer for nobody: {key}")
