"""Guests that move between nodes while they run. Owns when a move may begin, when its endpoints are switched, its end.

A move is a second allocation of the same copy, on another node, that takes over the guest of the first (`State.moves`,
durable). Agents copy; what they say of it is volatile and told anew after a restart. Whatever breaks off before the
guest has left calls the move off: the second allocation goes, the first runs on.
"""

import numpy as np

from controller.core import notices, reconcile
from controller.core import table as columns
from controller.core.check import check
from controller.core.commands import Reply
from controller.core.draft import Draft
from controller.core.events import AllocMoveRequested
from controller.core.groups import GroupEntry
from controller.core.kinds import Kind
from controller.core.records import AllocSteered, AllocTransitions, Plan, Record
from controller.core.state import State
from controller.core.table import Bools, Ints
from outrider.model.allocation import AllocAction, AllocReport, AllocStatus, MoveStage
from outrider.model.job import JobType, has_own_guest
from outrider.model.node import Node, NodeStatus

_QEMU = "qemu-system-x86_64"


def requested(state: State, call: AllocMoveRequested, now_s: float) -> tuple[tuple[Record, ...], Reply]:
    """An operator's call. The guest moves while it runs, or, where the nodes differ too much, by stop and start."""
    row, problem = _movable(state, call)
    allowed = np.ones(len(state.nodes), np.bool_)
    if call.node is not None and not problem:
        target = state.nodes.reference.get(call.node)
        if target is None:
            problem = f"no node {call.node!r}; `outrider node ls` lists them"
        elif target == int(state.table.node[row]):
            problem = f"it runs on {call.node} already"
        else:
            allowed = np.arange(len(state.nodes)) == target
    if problem:
        return (), Reply(request=call.request, code="not-movable", message=problem)
    draft = Draft(state, seed=row)
    reason = begin(state, draft, row, allowed)
    warnings: tuple[str, ...] = ()
    may_overlap = state.group_of(row).group.disconnect.stop_after_s is None
    if reason and call.node is not None and may_overlap:
        unlike = _unlike(state, row, int(np.flatnonzero(allowed)[0]))
        if unlike and not draft.replace(row, allowed, f"moved to {call.node} by stop and start: {unlike}"):
            reason, warnings = "", (f"it stops here and starts there, with a new disk: {unlike}",)
    plan = draft.plan(now_s)
    if reason or plan is None:
        return (), Reply(request=call.request, code="not-movable", message=reason)
    check(state, plan)
    alloc = state.alloc_id(plan.runs[0].first_serial)
    return (plan,), Reply(request=call.request, changed=True, warnings=warnings, message=alloc)


def begin(state: State, draft: Draft, row: int, allowed: Bools) -> str:
    """Has `draft` move the guest of `row` to one of the `allowed` nodes while it runs. Why it cannot; or "".

    For whoever empties a node, too: what cannot move so is to be stopped, and started elsewhere.
    """
    if problem := _standing(state, row):
        return problem
    like = np.array([not _unlike(state, row, ref) for ref in range(len(state.nodes))], np.bool_)
    reason = draft.move(row, allowed & like)
    if reason and not (allowed & like).any():
        others = [ref for ref in np.flatnonzero(allowed).tolist() if ref != int(state.table.node[row])]
        return _unlike(state, row, others[0]) if others else "there is no other node"
    return reason


def told(state: State, row: int, report: AllocReport, before: AllocReport | None) -> None:
    """What the node that is left says of the move."""
    serial = int(state.table.serial[row])
    after = next((new for new, old in state.moves.items() if old == serial), None)
    if report.move is None or after is None or report.move.to != state.alloc_id(after):
        return
    if before is not None and before.move == report.move:
        return
    stage = report.move.stage
    if stage is MoveStage.READY and serial not in state.live.leaving:
        state.live.leaving[serial] = None
        state.live.mesh_nodes[int(state.table.node[state.table.rows(np.array([after]))[0]])] = None
        reconcile.to_stop(state, row, serial)  # its endpoints go, and those of the other come, before the guest does
    elif stage in (MoveStage.DONE, MoveStage.FAILED):
        state.live.dirty_jobs[state.group_of(row).job] = None
        kind = Kind.ALLOC_MOVED if stage is MoveStage.DONE else Kind.ALLOC_STAYED
        notices.of_alloc(state, kind, row, _words(state, report, after))


def settle(state: State, draft: Draft, rows: Ints) -> Ints:
    """`rows` of one group without those that only wait for a guest. Stops what a finished or failed move left over."""
    if not state.moves:
        return rows
    table = state.table
    gone: list[int] = []  # from the account: of each copy one is left
    for row in rows.tolist():
        if int(table.serial[row]) not in state.moves:
            continue
        old = table.row(state.moves[int(table.serial[row])])
        report = state.live.reports.get(int(table.serial[old])) if old is not None else None
        move = report.move if report is not None else None
        stage = move.stage if move is not None and move.to == state.alloc_id(int(table.serial[row])) else None
        if old is not None and stage is MoveStage.DONE and table.healthy[row]:
            node = state.nodes.nodes[int(table.node[row])].id
            draft.stop(np.array([old]), f"its guest moved to {node} as {state.alloc_id(int(table.serial[row]))}")
            gone.append(old)
            continue
        if move is not None and stage is MoveStage.FAILED:
            state.live.stayed[state.moves[int(table.serial[row])]] = move.message
            draft.stop(np.array([row]), f"the guest did not move: {move.message}")
        gone.append(row)
    kept: Ints = rows[~np.isin(rows, np.array(gone, np.int64))]
    return kept


def is_under_way(state: State, group: GroupEntry) -> bool:
    """Whether a guest of the group moves: then what agents say of its copies decides what follows."""
    rows = (state.table.row(new) for new in state.moves)
    return any(row is not None and state.group_of(row).family == group.family for row in rows)


def take_along(state: State, draft: Draft, group: GroupEntry, rows: Ints) -> Ints:
    """Those of `rows`, copies that leave their nodes, whose guests cannot go on elsewhere while they run.

    They start anew elsewhere, and it is told why.
    """
    if not has_own_guest(group.group):
        return rows
    anywhere = np.ones(len(state.nodes), np.bool_)
    left = []
    for row in rows.tolist():
        serial = int(state.table.serial[row])
        reason = state.live.stayed.get(serial) or begin(state, draft, row, anywhere)
        if reason:
            notices.of_alloc(state, Kind.ALLOC_STAYED, row, f"a new one starts elsewhere instead: {reason}")
            left.append(row)
    return np.array(left, np.int64)


def follow(state: State, draft: Draft, group: GroupEntry) -> None:
    """Whoever waits for a guest that `draft` stops goes with it."""
    for new, old in state.moves.items():
        before, after = state.table.row(old), state.table.row(new)
        if before is None or after is None or state.group_of(before).family != group.family:
            continue
        report = state.live.reports.get(old)
        is_done = report is not None and report.move is not None and report.move.stage is MoveStage.DONE
        if draft.stops(before) and not is_done:
            draft.stop(np.array([after]), "the guest that it waited for is stopped")


def before(state: State, record: Record) -> None:
    """`record` is about to be applied: moves that it ends are over, and where the guest stays, it is called again."""
    if not state.moves:
        return
    match record:
        case AllocTransitions():
            packed = [record.serials]
        case Plan():
            packed = [stop.serials for stop in record.stops]
        case AllocSteered() if record.action is AllocAction.STOP:
            packed = [np.array([record.serial], np.int64).tobytes()]
        case _:
            return
    for serial in (each for part in packed for each in np.frombuffer(part, np.int64).tolist()):
        if serial in state.moves:
            _called_off(state, state.moves[serial])
        elif serial in state.moves.values():
            state.live.leaving.pop(serial, None)
            state.live.stayed.pop(serial, None)


def _called_off(state: State, serial: int) -> None:
    """The guest of `serial` stays where it is."""
    state.live.leaving.pop(serial, None)
    state.live.withdrawing.pop(serial, None)
    row = state.table.row(serial)
    if row is not None and state.table.status[row] == columns.LIVE:
        ref = int(state.table.node[row])
        state.live.to(ref).serials[serial] = None
        state.live.mesh_nodes[ref] = None


def _movable(state: State, call: AllocMoveRequested) -> tuple[int, str]:
    serial = state.serial(call.alloc)
    row = state.table.row(serial) if serial is not None else None
    if row is None or state.table.status[row] != columns.LIVE or state.table.desired[row] != columns.RUN:
        return 0, f"allocation {call.alloc} does not run"
    return row, _standing(state, row)


def _standing(state: State, row: int) -> str:
    """Why the allocation cannot be moved now, wherever to."""
    group, serial, ref = state.group_of(row), int(state.table.serial[row]), int(state.table.node[row])
    report = state.live.reports.get(serial)
    problems = (
        (not has_own_guest(group.group), "it is a process: only a vm moves while it runs"),
        (group.type is JobType.SYSTEM, "it is a system job's: each node has its own"),
        (bool(group.volumes), "it has a volume, which is on its node"),
        (serial in state.moves or serial in state.moves.values(), "it moves already"),
        (ref < 0 or state.live.links[ref].status is not NodeStatus.READY, "its node is away"),
        (report is None or report.status is not AllocStatus.RUNNING, "it does not run yet"),
    )
    return next((words for is_so, words in problems if is_so), "")


def _unlike(state: State, row: int, ref: int) -> str:
    """Why a guest that runs on the node of `row` could not go on on `ref`."""
    here, there = state.nodes.nodes[int(state.table.node[row])], state.nodes.nodes[ref]
    if here.id == there.id:
        return f"it runs on {there.id} already"
    for what, get in (("QEMU", _qemu), ("accelerator", _accelerator)):
        if get(here) != get(there):
            return f"{what} {get(here)} on {here.id}, {get(there) or 'none'} on {there.id}"
    return "" if there.peer_address else f"the agent of {there.id} takes no guests"


def _qemu(node: Node) -> str:
    """The part of its version that must agree."""
    return ".".join(node.fingerprint.runtimes.get(_QEMU, "").split(".")[:2])


def _accelerator(node: Node) -> str:
    return "kvm" if node.fingerprint.kvm == "works" else "tcg"


def _words(state: State, report: AllocReport, after: int) -> str:
    move = report.move
    assert move is not None, "the caller's"
    if move.stage is MoveStage.FAILED:
        return move.message
    cut = f", {move.connections_cut} connections cut" if move.connections_cut else ""
    return f"as {state.alloc_id(after)}, paused for {move.downtime_ms:.0f} ms{cut}"
