"""What waits for the journal, gathered for one append: what each touches, and who answers. Owns the dispatch alone."""

from typing import assert_never

from controller.core import amend, launch, migration, quota, scaling, steering, store_calls, submit, versions
from controller.core.commands import Reply
from controller.core.events import (
    AccessCall,
    AccessChangeRequested,
    AllocMoveRequested,
    AllocSteerRequested,
    JobCall,
    JobDispatchRequested,
    JobRestartRequested,
    JobRevertRequested,
    JobScaleRequested,
    JobStopRequested,
    JobSubmitted,
    LaunchDue,
    NodeJoinRequested,
    NodeSteerRequested,
    OwnCall,
    RolloutSteerRequested,
    ScaleDue,
    SteerCall,
    StoreCall,
)
from controller.core.records import Record, VirtualAddressAssigned
from controller.core.state import State


def answer_all(state: State, now_s: float) -> tuple[list[Record], tuple[Reply, ...]]:
    """The records and replies of the calls up to the first that touches what another of them touches."""
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
        names = _touched(state, call)
        if names & touched:
            break
        touched |= names
        state.live.calls.popleft()
        made, reply = _answer(state, call, now_s, addresses)
        addresses += sum(isinstance(record, VirtualAddressAssigned) for record in made)
        records.extend(made)
        if reply is not None:
            replies.append(reply)
    return records, tuple(replies)


def _touched(state: State, call: JobCall | SteerCall | AccessCall) -> frozenset[str]:
    match call:
        case JobSubmitted():
            return submit.names_touched(state, call.job)
        case JobStopRequested():
            return submit.names_of_stop(state, call.job)
        case JobRevertRequested() if (entry := state.jobs.get(call.job)) is not None:
            return frozenset().union(*(submit.names_touched(state, one.job) for one in entry.versions.values()))
        case AllocMoveRequested():
            return frozenset({f"job {call.job}", "the plan"})
        case AllocSteerRequested() | NodeSteerRequested() | AccessChangeRequested() | NodeJoinRequested():
            return frozenset({_touched_of_no_job(call)})
        case _:
            entry = state.jobs.get(call.job)
            counted = quota.touched(state, entry.job.namespace) if entry is not None else frozenset()
            return counted | {f"job {call.job}"}


def _touched_of_no_job(call: AllocSteerRequested | NodeSteerRequested | AccessCall) -> str:
    match call:
        case AllocSteerRequested():
            return f"alloc {call.alloc}"
        case NodeSteerRequested():
            return f"node {call.node}"
        case _:
            return amend.touched(call)


def _answer(
    state: State, call: JobCall | SteerCall | AccessCall, now_s: float, addresses: int
) -> tuple[tuple[Record, ...], Reply | None]:
    match call:
        case JobSubmitted() | JobStopRequested() | JobRevertRequested() | JobScaleRequested():
            return _change_job(state, call, now_s, addresses)
        case JobRestartRequested() | JobDispatchRequested():
            return _begin_again(state, call, now_s)
        case LaunchDue() | ScaleDue():
            return _due(state, call, now_s), None
        case AccessChangeRequested() | NodeJoinRequested():
            return amend.answer(state, call, now_s)
        case _:
            return _steer(state, call, now_s)


def _change_job(
    state: State,
    call: JobSubmitted | JobStopRequested | JobRevertRequested | JobScaleRequested,
    now_s: float,
    addresses: int,
) -> submit.Answer:
    match call:
        case JobSubmitted():
            return submit.submit(state, call, now_s, addresses)
        case JobStopRequested():
            return submit.stop(state, call)
        case JobRevertRequested():
            return versions.revert(state, call, now_s, addresses)
        case JobScaleRequested():
            return versions.scale(state, call)
        case _:
            assert_never(call)


def _begin_again(state: State, call: JobRestartRequested | JobDispatchRequested, now_s: float) -> submit.Answer:
    """What is there already begins anew."""
    match call:
        case JobRestartRequested():
            return submit.restart(state, call, now_s)
        case JobDispatchRequested():
            return launch.by_hand(state, call, now_s)
        case _:
            assert_never(call)


def _due(state: State, call: OwnCall, now_s: float) -> tuple[Record, ...]:
    match call:
        case LaunchDue():
            return launch.by_schedule(state, call, now_s)
        case ScaleDue():
            return scaling.change(state, call)
        case _:
            assert_never(call)


def _steer(state: State, call: SteerCall, now_s: float) -> submit.Answer:
    match call:
        case RolloutSteerRequested():
            return steering.steer_rollout(state, call, now_s)
        case AllocSteerRequested():
            return steering.steer_alloc(state, call, now_s)
        case NodeSteerRequested():
            return steering.steer_node(state, call, now_s)
        case AllocMoveRequested():
            return migration.requested(state, call, now_s)
        case _:
            assert_never(call)
