"""What goes to the journal next, and what follows once it is there. Owns the one append in flight.

While the journal works, what happens gathers and goes with the next append: group commit, and a plan always starts
from a state in which all that was written is true.
"""

import numpy as np

from controller.core import absence, drains, follow, launch, migration
from controller.core import table as columns
from controller.core.calls import answer_all
from controller.core.commands import Append, Reply
from controller.core.deploy import decide
from controller.core.events import Appended, Ticket
from controller.core.records import AllocTransitions, NodeDowned, NodeRegistered, Record
from controller.core.state import State
from controller.core.volatile import InFlight
from outrider.model.allocation import AllocReport, AllocStatus


def flush(state: State, now_s: float, seed: int) -> None:
    """Ask for the next append, if the journal is free and there is anything to write."""
    live = state.live
    while live.in_flight is None:
        # Calls and decisions take turns: a storm of calls must not keep from being placed what it submits.
        calls_wait = live.decides_next
        records, replies = _gathered(state, now_s, with_calls=not calls_wait)
        live.decides_next = bool(replies) or (calls_wait and bool(records))
        if not records and not replies:
            records = decide(state, now_s, seed)
        if records:
            live.ticket += 1
            live.in_flight = InFlight(Ticket(live.ticket), records, replies)
            live.out.append(Append(ticket=live.in_flight.ticket, records=records))
            return
        if not replies and not (calls_wait and live.calls):
            return
        live.out.extend(replies)  # nothing to wait for


def appended(state: State, event: Appended, now_s: float) -> None:
    flight = state.live.in_flight
    assert flight is not None, "the journal answers what it was asked"
    assert flight.ticket == event.ticket, "tickets come back in order"
    state.live.in_flight = None
    for record in flight.records:
        if isinstance(record, AllocTransitions):
            follow.endings(state, record, now_s)  # before: what ended may be forgotten at once
        migration.before(state, record)
        before = len(state.nodes)
        state.apply(record)
        follow.applied(state, record, now_s, known=len(state.nodes) == before)
    for job in state.live.perhaps_over:
        launch.note_over(state, job)
    state.live.perhaps_over.clear()
    state.live.out.extend(flight.replies)


def _gathered(state: State, now_s: float, *, with_calls: bool) -> tuple[tuple[Record, ...], tuple[Reply, ...]]:
    live = state.live
    records: list[Record] = [NodeRegistered(node=node) for node in live.registering.values()]
    downing = (state.nodes.nodes[ref].id for ref in live.downing)
    records.extend(NodeDowned(node=node) for node in downing if node not in live.registering)
    lost = absence.lost(state)
    live.registering = {}
    if lost:
        records.append(_transition(AllocStatus.LOST, lost, now_s, "its node was away for too long"))
    records.extend(_endings(state, set(lost), now_s))
    records.extend(launch.retired(state))
    records.extend(drains.ended(state))
    if not with_calls:
        return tuple(records), ()
    calls, replies = answer_all(state, now_s)
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


def _transition(status: AllocStatus, serials: list[int], now_s: float, reason: str) -> Record:
    return AllocTransitions(status=status, at_s=now_s, serials=_packed(serials), reason=reason)


def _packed(serials: list[int]) -> bytes:
    return np.array(serials, np.int64).tobytes()
