"""What a submission would lead to: the production core, played forward on a twin of the state. Changes nothing real.

The twin is made as a restart makes the state, by replay of a snapshot; then a world in which the journal answers at
once and agents do as they are told carries it on, until the job's rollout has ended or waits for a person.
"""

import copy
import random
from collections import Counter, deque
from dataclasses import fields, is_dataclass

import msgspec
import numpy as np

from controller.core import liveness
from controller.core import table as columns
from controller.core.commands import Append, Command, Reply, SendAssignments, WithdrawEndpoints
from controller.core.copies import running
from controller.core.events import (
    AgentReported,
    Appended,
    EndpointsWithdrawn,
    Event,
    JobSubmitted,
    RequestId,
    Tick,
)
from controller.core.policy import Policy
from controller.core.records import Record
from controller.core.state import State
from controller.core.step import step
from controller.core.volatile import InFlight, Volatile
from outrider.ids import GroupName, JobName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment, CheckReport, Desired
from outrider.model.fleet import JobPlan, PlannedAction, PlannedStep, RolloutState
from outrider.model.job import Job

STEPS_SHOWN_MAX = 200
_EVENTS_MAX = 50_000
_HORIZON_S = 24 * 3600.0
_REQUEST = RequestId(-1)

Name = tuple[JobName, GroupName, int]  # of a copy: its job, group and index
Standing = dict[int, tuple[JobName, GroupName, int, int]]  # by serial: job, group, index, node


class Twin(msgspec.Struct, frozen=True, kw_only=True):
    """All that a preview needs of the real state: nothing in it changes any more."""

    records: tuple[Record, ...]
    live: Volatile
    observed: dict[str, np.ndarray[tuple[int], np.dtype[np.generic]]]
    cursors: tuple[int, ...]


def twin_of(state: State) -> Twin:
    """To be taken between two steps."""
    kept = np.flatnonzero(state.table.status[: state.table.size] != columns.FORGOTTEN)
    return Twin(
        records=tuple(state.snapshot()),
        live=_copied(state.live),
        observed={name: getattr(state.table, name)[kept] for name in ("observed", "healthy", "healthy_since_s")},
        cursors=tuple(state.nodes.port_cursor),
    )


def preview(twin: Twin, policy: Policy, job: Job) -> JobPlan:
    """Takes its time with a large fleet: for a thread."""
    world = _World(twin, policy)
    before = _standing(world.state)
    entry = world.state.jobs.get(job.name)
    current = entry.job if entry is not None and not entry.stopped else None
    reply = world.submit(job)
    if reply.code:
        return JobPlan(job=job.name, version=0, current=current, refusal=reply.message)
    world.play(job.name)
    after = world.state.jobs[job.name]
    steps = tuple(_steps(world, job.name, before, _standing(world.state)))
    counts = Counter(str(one.action) for one in steps)
    return JobPlan(
        job=job.name,
        version=reply.version,
        changed=reply.changed,
        current=current,
        steps=steps[:STEPS_SHOWN_MAX],
        counts=dict(counts),
        kept=len(before.keys() & world.of_job(job.name).keys()),
        warnings=reply.warnings,
        rollout=after.rollout,
        rollout_reason=after.rollout_reason,
    )


class _World:
    def __init__(self, twin: Twin, policy: Policy) -> None:
        self.state = State(policy)
        for record in twin.records:
            self.state.apply(record)
        self.state.live = twin.live
        for name, column in twin.observed.items():
            getattr(self.state.table, name)[: len(column)] = column
        self.state.nodes.port_cursor = list(twin.cursors)
        self.preempted: dict[int, str] = {}  # by serial: why
        self._rng = random.Random(0)  # noqa: S311  ties fall as they may
        self._queue: deque[Event] = deque()
        self._reply = Reply(request=_REQUEST)
        self._now_s = twin.live.now_s
        flight = twin.live.in_flight
        if isinstance(flight, InFlight):
            self._queue.append(Appended(ticket=flight.ticket))

    def submit(self, job: Job) -> Reply:
        self._queue.append(JobSubmitted(request=_REQUEST, job=job))
        self._drain()
        return self._reply

    def play(self, job: JobName) -> None:
        """Until the rollout has ended, or nothing but a person moves it."""
        end_s = self._now_s + _HORIZON_S
        for _ in range(_EVENTS_MAX):
            due_s = self.state.next_deadline_s
            if self.state.jobs[job].rollout is not RolloutState.RUNNING or due_s is None or due_s > end_s:
                return
            self._now_s = max(self._now_s, due_s)
            heard = self.state.live.heartbeat_s
            heard[np.isfinite(heard)] = self._now_s  # nobody falls silent
            self.state.live.timers.cancel((liveness.SCAN, 0))
            self._queue.append(Tick())
            self._drain()

    def of_job(self, job: JobName) -> Standing:
        return {serial: one for serial, one in _standing(self.state).items() if one[0] == job}

    def _drain(self) -> None:
        for _ in range(_EVENTS_MAX):
            if not self._queue:
                return
            for command in step(self.state, self._queue.popleft(), self._now_s, self._rng):
                self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case Append():
                for record in command.records:
                    self._note(record)
                self._queue.append(Appended(ticket=command.ticket))
            case Reply():
                if command.request == _REQUEST:
                    self._reply = command
            case WithdrawEndpoints():
                self._queue.append(EndpointsWithdrawn(allocs=command.allocs))
            case SendAssignments():
                reports = tuple(_report(one) for one in command.assignments)
                self._queue.append(AgentReported(session=command.session, node=command.node, reports=reports))
            case _:
                pass

    def _note(self, record: Record) -> None:
        for stop in getattr(record, "stops", ()):
            if stop.by is not None:
                self.preempted.update(dict.fromkeys(np.frombuffer(stop.serials, np.int64).tolist(), stop.reason))


def _report(assignment: Assignment) -> AllocReport:
    if assignment.desired is Desired.STOP:
        return AllocReport(alloc=assignment.alloc, status=AllocStatus.COMPLETE)
    checks = tuple(CheckReport(service=one.name, passing=True) for one in assignment.group.services)
    return AllocReport(alloc=assignment.alloc, status=AllocStatus.RUNNING, checks=checks)


def _standing(state: State) -> Standing:
    table = state.table
    rows = running(state, np.arange(table.size))
    found: Standing = {}
    columns_of = (table.serial[rows], table.group[rows], table.index[rows], table.node[rows])
    for serial, key, index, node in zip(*(column.tolist() for column in columns_of), strict=True):
        group = state.groups[key]
        found[serial] = (group.job, group.group.name, index, node)
    return found


def _steps(world: _World, job: JobName, before: Standing, after: Standing) -> list[PlannedStep]:
    """What is other than before: of the job, and of those that had to make room."""
    state = world.state
    left = {one[:3]: (serial, one[3]) for serial, one in before.items() if serial not in after}
    found = []
    touched = {before[serial][:3] for serial in world.preempted if serial in before}
    for serial, (owner, group, index, node) in after.items():
        name = (owner, group, index)
        moved = serial in before and before[serial][3] < 0 <= node
        if (serial in before and not moved) or (owner != job and name not in touched):
            continue
        gone, came_from = left.pop(name, (-1, -1))
        action = PlannedAction.REPLACE if came_from >= 0 else PlannedAction.PLACE
        reason = state.reasons.get(gone, "")
        if node < 0:
            action = PlannedAction.WAIT
            reason = state.live.unplaced.get((owner, group), "")
        if gone in world.preempted:
            action, reason = PlannedAction.PREEMPT, world.preempted[gone] + (f"; then {reason}" if node < 0 else "")
        found.append(_step(state, action, name, (came_from, node), reason))
    for name, (serial, node) in left.items():
        if name[0] == job or serial in world.preempted:
            action = PlannedAction.PREEMPT if serial in world.preempted else PlannedAction.STOP
            reason = world.preempted.get(serial) or state.reasons.get(serial, "")
            found.append(_step(state, action, name, (node, -1), reason))
    return sorted(found, key=lambda one: (one.job != job, one.job, one.group, one.index))


def _step(state: State, action: PlannedAction, name: Name, nodes_then: tuple[int, int], reason: str) -> PlannedStep:
    nodes, (before, after) = state.nodes.nodes, nodes_then
    return PlannedStep(
        action=action,
        job=name[0],
        group=name[1],
        index=name[2],
        node_before=nodes[before].id if before >= 0 else None,
        node_after=nodes[after].id if after >= 0 else None,
        reason=reason,
    )


def _copied(live: Volatile) -> Volatile:
    """One level deeper than its containers: what is in them is changed in place too."""
    twin = Volatile()
    for field in fields(Volatile):
        value = getattr(live, field.name)
        if isinstance(value, dict):
            value = {key: _own(item) for key, item in value.items()}
        elif field.name == "timers":
            value = value.copied()
        elif isinstance(value, list):
            value = [_own(item) for item in value]
        elif isinstance(value, (deque, np.ndarray)):
            value = value.copy()
        setattr(twin, field.name, value)
    twin.out = []
    twin.calls.clear()
    return twin


def _own(item: object) -> object:
    """Frozen values may be shared."""
    return copy.copy(item) if isinstance(item, (dict, set, list)) or is_dataclass(item) else item
