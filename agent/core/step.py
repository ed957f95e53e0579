"""`step`: an event and the time in, commands out. The only way in; says nothing about how commands are carried out."""

import random

from agent.core import allocation, amend, exposed
from agent.core.commands import Acknowledge, Clean, Command, Forget, Note, RenewBelongings, Report, Save
from agent.core.events import AllocEvent, Assigned, Cleaned, ControllerHeard, Event, Recovered, StepFailed, Tick
from agent.core.lifecycle import Phase
from agent.core.recovery import adopt
from agent.core.report import alloc_record, alloc_report, duration, stray_report
from agent.core.state import NEVER_S, AllocState, State, Stray, Turn, alone_too_long_s, deadline_s, new_alloc
from outrider.ids import AllocId
from outrider.model.allocation import AllocReport, Assignment, Desired
from outrider.model.job import has_own_guest

_STRAY_RETRY_S = 5.0


def step(state: State, event: Event, now_s: float, rng: random.Random) -> tuple[Command, ...]:
    """What follows from `event`. `now_s` only grows within a host's uptime. Changes `state` in place."""
    turn = Turn(now_s=now_s, rng=rng)
    match event:
        case Recovered():
            _recovered(state, event, turn)
        case Assigned():
            _assigned(state, event, turn)
        case ControllerHeard():
            state.heard_s = event.at_s if state.heard_s == NEVER_S else max(state.heard_s, event.at_s)
        case Tick():
            _tick(state, turn)
        case _:
            _alloc_event(state, event, turn)
    return tuple(turn.commands)


def all_reports(state: State) -> tuple[AllocReport, ...]:
    """For Hello: the whole truth of this node."""
    allocs = (alloc_report(alloc) for alloc in state.allocs.values())
    return (*allocs, *(stray_report(stray) for stray in state.strays.values()))


def _recovered(state: State, event: Recovered, turn: Turn) -> None:
    state.acknowledged = event.acknowledged
    # Not since the boot: for how long before it nobody knows, and what is wanted by then may run elsewhere.
    state.heard_s = event.heard_s if event.heard_s is not None else -NEVER_S
    for found in event.found:
        if found.record is None:
            state.strays[found.alloc] = Stray(found=found)
        else:
            _keep(state, adopt(found.record.assignment, found, turn), turn)


def _assigned(state: State, event: Assigned, turn: Turn) -> None:
    if event.generation < state.acknowledged:
        text = f"{event.generation} is older than {state.acknowledged}, which was acknowledged"
        turn.emit(Note(event="stale assignments refused", message=text))
        return
    state.acknowledged = event.generation
    for assignment in event.assignments:
        _assign(state, assignment, turn)
    unwanted = set(event.removed)
    if event.full:
        unwanted |= (state.allocs.keys() | state.strays.keys()) - {wanted.alloc for wanted in event.assignments}
    for alloc in sorted(unwanted):
        _remove(state, alloc, turn)
    turn.emit(Acknowledge(generation=event.generation))


def _assign(state: State, assignment: Assignment, turn: Turn) -> None:
    alloc = state.allocs.get(assignment.alloc)
    stray = state.strays.pop(assignment.alloc, None)
    if stray is not None and stray.cleaning:
        alloc = new_alloc(assignment)  # too late to keep it: from nothing, once it is gone
        alloc.phase, alloc.clean_retry_at_s = Phase.CLEANING, stray.retry_at_s
    elif stray is not None:
        alloc = adopt(assignment, stray.found, turn)
    elif alloc is None:
        alloc = new_alloc(assignment)
        if alloc.stopping:
            alloc.phase = Phase.ENDED  # never began here: that is how it ended
        else:
            allocation.prepare(alloc, turn)
    else:
        renewed = alloc.assignment.secrets != assignment.secrets
        assignment = exposed.carried(alloc.assignment, assignment)
        alloc.assignment, alloc.forget = assignment, False
        if assignment.desired is Desired.STOP and not alloc.stopping:
            allocation.stop(alloc, turn)
        elif not alloc.stopping:
            if renewed:
                turn.emit(RenewBelongings(assignment=assignment))
            amend.take_up(alloc, turn)
            if has_own_guest(assignment.group):
                allocation.move(alloc, turn)
    _keep(state, alloc, turn)


def _remove(state: State, id_: AllocId, turn: Turn) -> None:
    stray = state.strays.get(id_)
    if stray is not None and not stray.cleaning:
        stray.cleaning = True
        turn.emit(Clean(alloc=id_))
        turn.emit(Report(report=stray_report(stray), job=""))
    alloc = state.allocs.get(id_)
    if alloc is not None:
        alloc.forget = True
        if not alloc.stopping:
            allocation.stop(alloc, turn)
        _keep(state, alloc, turn)


def _tick(state: State, turn: Turn) -> None:
    for alloc in list(state.allocs.values()):
        if alone_too_long_s(state, alloc) <= turn.now_s:
            alone_s = turn.now_s - state.heard_s
            since = f"for {duration(alone_s)}" if alone_s < NEVER_S else "since the host began"
            alloc.failure = f"stopped: it must never run twice, and no controller was heard {since}"
            allocation.stop(alloc, turn)
            _keep(state, alloc, turn)
        if alloc.deadline_s <= turn.now_s:
            allocation.tick(alloc, turn)
            _keep(state, alloc, turn)
    for id_, stray in state.strays.items():
        if stray.retry_at_s is not None and stray.retry_at_s <= turn.now_s:
            stray.retry_at_s = None
            turn.emit(Clean(alloc=id_))


def _alloc_event(state: State, event: AllocEvent, turn: Turn) -> None:
    alloc = state.allocs.get(event.alloc)
    if alloc is not None:
        allocation.handle(alloc, event, turn)
        _keep(state, alloc, turn)
        return
    stray = state.strays.get(event.alloc)
    if stray is None:
        return  # forgotten meanwhile
    if isinstance(event, Cleaned):
        del state.strays[event.alloc]
        turn.emit(Forget(alloc=event.alloc))
    elif isinstance(event, StepFailed):
        stray.retry_at_s = turn.now_s + _STRAY_RETRY_S
        turn.emit(Note(event="cleaning failed", alloc=event.alloc, message=event.message))


def _keep(state: State, alloc: AllocState, turn: Turn) -> None:
    """What changed goes to disk and to the controller: both get the newest truth, never a history."""
    if alloc.forget and alloc.phase is Phase.ENDED:
        state.allocs.pop(alloc.id, None)
        turn.emit(Forget(alloc=alloc.id))
        return
    state.allocs[alloc.id] = alloc
    alloc.deadline_s = deadline_s(alloc)
    record = alloc_record(alloc)
    if record != alloc.saved:
        first_or_last = alloc.saved is None or record.ended > alloc.saved.ended
        turn.emit(Save(record=record, announce=first_or_last))
        alloc.saved = record
    report = alloc_report(alloc)
    if report != alloc.reported:
        turn.emit(Report(report=report, job=alloc.assignment.job))
        alloc.reported = report
