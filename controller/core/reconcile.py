"""Desired against told: what each agent is sent. Owns generations of assignments; never decides what is desired.

Level-triggered: everything on a fresh session, changes afterwards. The counter is volatile because each controller's
life has an epoch of its own in the journal, and pairs compare by epoch first.
"""

import itertools

import numpy as np

from controller.core import sealed, volumes
from controller.core import table as columns
from controller.core.commands import SendAssignments, SyncMesh, WithdrawEndpoints
from controller.core.state import State
from controller.core.volatile import Outgoing
from outrider.ids import AllocId, GroupName, JobName, alloc_id
from outrider.model.allocation import Assignment, Desired, Generation, Move
from outrider.model.job import Group, JobType

WITHDRAW = "withdraw"
_UNKNOWN = Group(name=GroupName("unknown"), tasks=())


def emit(state: State, now_s: float) -> None:
    """End of a step: to the mesh first, so that a withdrawn endpoint is gone before it is waited for."""
    live = state.live
    if live.mesh_nodes or live.mesh_intentions:
        nodes = tuple(state.nodes.nodes[ref].id for ref in live.mesh_nodes)
        live.out.append(SyncMesh(nodes=nodes, intentions=live.mesh_intentions))
        live.mesh_nodes, live.mesh_intentions = {}, False
    if live.withdraw_now:
        _withdraw(state, now_s)
    if live.outgoing:
        outgoing, live.outgoing = live.outgoing, {}
        told = {ref: what for ref, what in outgoing.items() if live.links[ref].session is not None}
        serials = {ref: _serials(state, ref, what) for ref, what in told.items()}
        made = _assignments(state, list(itertools.chain.from_iterable(serials.values())))
        for ref, what in told.items():
            _send(state, ref, what, [made[serial] for serial in serials[ref] if serial in made])


def to_stop(state: State, row: int, serial: int) -> None:
    """The allocation was told to stop: first its endpoints go, where it has any (DESIGN, decision 7)."""
    ref = int(state.table.node[row])
    if state.group_of(row).mesh_services:
        state.live.withdrawing[serial] = None
        state.live.withdraw_now.append(serial)
        state.live.mesh_nodes[ref] = None
    else:
        if serial in state.nodes.serving[ref]:
            state.live.mesh_nodes[ref] = None
        state.live.to(ref).serials[serial] = None


def withdrawn(state: State, serials: tuple[int, ...]) -> None:
    """Nobody calls them any more, or was given long enough to stop."""
    for serial in serials:
        if serial in state.live.withdrawing:
            del state.live.withdrawing[serial]
            row = state.table.row(serial)
            if row is not None and state.table.status[row] == columns.LIVE:
                state.live.to(int(state.table.node[row])).serials[serial] = None


def withdraw_timeout(state: State, key: int) -> None:
    withdrawn(state, state.live.withdrawals.pop(key, ()))


def _withdraw(state: State, now_s: float) -> None:
    live = state.live
    serials, live.withdraw_now = tuple(live.withdraw_now), []
    services = {service for serial in serials for service in state.group_of(_row(state, serial)).mesh_services}
    key = serials[0]
    live.withdrawals[key] = serials
    live.timers.set((WITHDRAW, key), now_s + state.policy.withdraw_timeout_s)
    allocs = tuple(state.alloc_id(serial) for serial in serials)
    live.out.append(WithdrawEndpoints(allocs=allocs, services=tuple(sorted(services))))


def _serials(state: State, ref: int, what: Outgoing) -> dict[int, None]:
    if not what.full:
        return what.serials
    return {**dict.fromkeys(state.table.serial[state.node_rows(ref)].tolist()), **what.serials}


def _send(state: State, ref: int, what: Outgoing, assignments: list[Assignment]) -> None:
    live, link = state.live, state.live.links[ref]
    assert link.session is not None, "checked by the caller"
    node = state.nodes.nodes[ref].id
    # A full set names all that may stay. What nobody knows is to be kept: where an agent runs such, what it has is
    # answered one by one instead.
    full = what.full and node not in live.unclaimed.values()
    assignments.extend(_stop_stranger(alloc) for alloc in what.strangers)
    if not (what.full or assignments or what.removed):
        return
    live.counter += 1
    live.out.append(
        SendAssignments(
            session=link.session,
            node=node,
            generation=Generation(state.epoch, live.counter),
            full=full,
            assignments=tuple(assignments),
            removed=tuple(what.removed),
        )
    )


def _assignments(state: State, serials: list[int]) -> dict[int, Assignment]:
    """Of those that are not forgotten, all at once: a large job is a million of them."""
    table, live, salt = state.table, state.live, state.salt
    rows = table.known(np.array(serials, np.int64))
    is_over = table.status[rows] != columns.LIVE
    alike = {key: _common(state, key) for key in np.unique(table.group[rows]).tolist()}
    made: dict[int, Assignment] = {}
    for serial, key, index, ended, stops in zip(
        table.serial[rows].tolist(),
        table.group[rows].tolist(),
        table.index[rows].tolist(),
        is_over.tolist(),
        (table.desired[rows] == columns.STOP).tolist(),
        strict=True,
    ):
        common, entry = alike[key], state.groups[key]
        ports = state.ports.get(serial, ())
        made[serial] = Assignment(
            alloc=alloc_id(serial, salt),
            job=common.job,
            job_version=common.job_version,
            group=common.group,
            index=index,
            arguments=common.arguments,
            batch=common.batch,
            desired=Desired.STOP if ended or (stops and serial not in live.withdrawing) else Desired.RUN,
            move_to=_move_to(state, serial) if state.moves else None,
            move_from=_move_from(state, serial) if state.moves else None,
            volumes=common.volumes,
            secrets=common.secrets,
            mesh_ports=dict(zip(entry.mesh_services, ports, strict=False)),
            dynamic_ports=dict(zip(entry.dynamic_ports, ports[len(entry.mesh_services) :], strict=False)),
            restarts=state.restarts.get(serial, 0),
        )
    return made


def _common(state: State, key: int) -> Assignment:
    """What the allocations of a group have in common."""
    entry = state.groups[key]
    return Assignment(
        alloc=AllocId(""),
        job=entry.job,
        job_version=entry.version,
        group=entry.group,
        index=0,
        arguments=entry.arguments,
        batch=entry.type is JobType.BATCH,
        volumes=volumes.of_group(state, entry),
        secrets=sealed.delivered(state, state.jobs[entry.job].job.namespace, entry.group),
    )


def _move_to(state: State, serial: int) -> Move | None:
    """Where the guest of the allocation shall go."""
    after = next((new for new, old in state.moves.items() if old == serial), None)
    if after is None:
        return None
    node = state.nodes.nodes[int(state.table.node[_row(state, after)])]
    go = serial in state.live.leaving and serial not in state.live.withdrawing
    return Move(alloc=state.alloc_id(after), node=node.id, address=node.peer_address, go=go)


def _move_from(state: State, serial: int) -> Move | None:
    """Whose guest the allocation shall have."""
    before = state.moves.get(serial)
    if before is None:
        return None
    node = state.nodes.nodes[int(state.table.node[_row(state, before)])]
    return Move(alloc=state.alloc_id(before), node=node.id, address=node.peer_address)


def _stop_stranger(alloc: AllocId) -> Assignment:
    """Of this the controller has forgotten all but that it ended: the agent knows the rest."""
    return Assignment(alloc=alloc, job=JobName("unknown"), job_version=0, group=_UNKNOWN, index=0, desired=Desired.STOP)


def _row(state: State, serial: int) -> int:
    row = state.table.row(serial)
    assert row is not None, "only what ended is forgotten"
    return row
