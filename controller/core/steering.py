"""Operators' words on what runs already: rollouts, allocations, nodes. Owns which of them are refused, and why."""

from controller.core import copies, deploy
from controller.core import table as columns
from controller.core.commands import Reply
from controller.core.entries import JobEntry
from controller.core.events import AllocSteerRequested, NodeSteerRequested, RequestId, RolloutSteerRequested
from controller.core.records import AllocSteered, NodeSteered, Record, RolloutEnded, RolloutSteered
from controller.core.state import State
from controller.core.submit import Answer
from outrider.model.allocation import AllocAction
from outrider.model.fleet import RolloutAction, RolloutState
from outrider.model.node import Drain


def steer_rollout(state: State, call: RolloutSteerRequested, now_s: float) -> Answer:
    entry = state.jobs.get(call.job)
    if entry is None:
        return _refused(call.request, "not-found", f"no job {call.job!r}; `outrider job ls` lists them")
    if refusal := _refusal(state, call, entry):
        return _refused(call.request, "conflict", refusal)
    records: tuple[Record, ...] = (RolloutSteered(job=call.job, version=entry.latest, action=call.action),)
    version = entry.latest
    if call.action is RolloutAction.FAIL:
        reverts = any(group.update.auto_revert for group in entry.job.groups)
        back, words = deploy.way_back(state, call.job, now_s) if reverts else ((), "")
        reason = f"an operator made it fail{words}"
        end = RolloutEnded(job=call.job, version=version, state=RolloutState.FAILED, reason=reason, final=True)
        records, version = (end, *back), version + bool(back)
    return records, Reply(request=call.request, version=version, changed=True)


def steer_alloc(state: State, call: AllocSteerRequested, now_s: float) -> Answer:
    serial = state.serial(call.alloc)
    row = state.table.row(serial) if serial is not None else None
    if serial is None or row is None:
        return _refused(call.request, "not-found", f"no allocation {call.alloc}; `outrider alloc ls` lists them")
    if state.table.status[row] != columns.LIVE or state.table.desired[row] == columns.STOP:
        return _refused(call.request, "conflict", f"allocation {call.alloc} has ended, or is on its way out")
    if call.action is AllocAction.RESTART and state.table.node[row] < 0:
        return _refused(call.request, "not-placed", f"allocation {call.alloc} runs nowhere yet: nothing to restart")
    record = AllocSteered(serial=serial, action=call.action, at_s=now_s)
    return (record,), Reply(request=call.request, changed=True)


def steer_node(state: State, call: NodeSteerRequested, now_s: float) -> Answer:
    ref = state.nodes.reference.get(call.node)
    if ref is None:
        return _refused(call.request, "not-found", f"no node {call.node!r}; `outrider node ls` lists them")
    drain = None
    if call.drain:
        deadline_at_s = None if call.deadline_s is None else now_s + call.deadline_s
        drain = Drain(started_at_s=now_s, deadline_at_s=deadline_at_s, keep_system=call.keep_system)
    record = NodeSteered(node=call.node, eligible=call.eligible and drain is None, drain=drain)
    same = bool(state.nodes.closed[ref]) != record.eligible and drain is None and ref not in state.nodes.drains
    return () if same else (record,), Reply(request=call.request, changed=not same)


def _refusal(state: State, call: RolloutSteerRequested, entry: JobEntry) -> str:
    """Why the word does not fit how the rollout stands; "" where it does."""
    what = f"job {call.job}, version {entry.latest}"
    if entry.rollout is not RolloutState.RUNNING:
        why = f": {entry.rollout_reason}" if entry.rollout_reason else ""
        return f"{what}: its rollout is over ({entry.rollout}{why}); there is nothing to {call.action}"
    match call.action:
        case RolloutAction.PROMOTE:
            return _why_not_promoted(state, call, entry, what)
        case RolloutAction.PAUSE if entry.paused:
            return f"{what}: its rollout is paused already"
        case RolloutAction.RESUME if not entry.paused:
            return f"{what}: its rollout is not paused"
        case _:
            return ""


def _why_not_promoted(state: State, call: RolloutSteerRequested, entry: JobEntry, what: str) -> str:
    if entry.promoted:
        return f"{what}: is promoted already"
    if entry.paused:
        return f"{what}: its rollout is paused; `outrider deployment resume {call.job}` goes on"
    if call.job in state.live.proven:
        return ""
    out = healthy = 0
    for key in state.current_groups(call.job):
        rows = copies.running(state, state.family_rows(state.groups[key].family))
        rows = rows[state.table.role[rows] == columns.CANARY]
        out, healthy = out + len(rows), healthy + int(state.table.healthy[rows].sum())
    if not out:
        return f"{what}: has no canaries to promote; `update: {{canary: 1}}` of a group gives it some"
    return f"{what}: {healthy} of {out} canaries are healthy, and not for long enough; promote it when all are"


def _refused(request: RequestId, code: str, message: str) -> Answer:
    return (), Reply(request=request, code=code, message=message)
