"""What the controller knows but does not write down: sessions, timers, the agents' last words. Lost with the process
and rebuilt from the agents. Owns the shapes; never decides.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from controller.core.commands import Command, Reply
from controller.core.events import AgentConnected, Call, Launch, SessionId, Ticket
from controller.core.groups import FamilyKey
from controller.core.records import Record
from controller.core.table import Bools, Times
from outrider.ids import AllocId, JobName, NodeId
from outrider.model.allocation import AllocReport, AllocStatus, Generation
from outrider.model.node import Node, NodeStatus

TimerKey = tuple[str, int | str]  # what for, and whom


class Timers:
    """At most one deadline for each key. Setting it again moves it."""

    def __init__(self) -> None:
        self._due: dict[TimerKey, float] = {}
        self._heap: list[tuple[float, TimerKey]] = []

    def copied(self) -> "Timers":
        twin = Timers()
        twin._due, twin._heap = dict(self._due), list(self._heap)
        return twin

    def set(self, key: TimerKey, at_s: float) -> None:
        if self._due.get(key) != at_s:
            self._due[key] = at_s
            heapq.heappush(self._heap, (at_s, key))

    def set_earlier(self, key: TimerKey, at_s: float) -> None:
        if at_s < self._due.get(key, np.inf):
            self.set(key, at_s)

    def cancel(self, key: TimerKey) -> None:
        self._due.pop(key, None)

    @property
    def next_s(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # moved or cancelled
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> TimerKey | None:
        next_s = self.next_s
        if next_s is None or next_s > now_s:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due[key]
        return key


@dataclass(slots=True)
class NodeLink:
    """What the controller has with one node at the moment."""

    since_s: float = 0.0
    away_s: float = np.inf  # since when; inf: it is ready
    status: NodeStatus = NodeStatus.GONE
    reason: str = ""
    session: SessionId | None = None
    seen: bool = False  # in this controller's life
    acknowledged: Generation = field(default_factory=Generation)


@dataclass(slots=True)
class Outgoing:
    """What a node's agent is to be told at the end of this step."""

    full: bool = False
    serials: dict[int, None] = field(default_factory=dict)
    removed: dict[AllocId, None] = field(default_factory=dict)
    strangers: dict[AllocId, None] = field(default_factory=dict)  # running, and forgotten here: to be stopped


@dataclass(slots=True)
class Ended:
    status: AllocStatus
    reason: str
    report: AllocReport | None


@dataclass(slots=True)
class InFlight:
    """The one append that the journal works on."""

    ticket: Ticket
    records: tuple[Record, ...]
    replies: tuple[Reply, ...]


@dataclass(slots=True)
class Backoff:
    """Of one copy of a group."""

    failures: int  # one after the other, without a good long run between them
    until_s: float
    nodes: dict[int, float]  # where it failed, and when last


@dataclass(slots=True)
class Pulling:
    """How long an allocation has waited for images that were on their way: no deadline counts that."""

    since_s: float = np.inf  # inf: none is on its way now
    total_s: float = 0.0


@dataclass(slots=True)
class Scaler:
    """What is remembered of a group that the fleet scales."""

    began_s: float  # figures are looked at since then
    changed_s: float  # no change before this and the cooldown
    wishes: deque[tuple[float, int]] = field(default_factory=deque)  # of the last cooldown: when, and how many copies
    measured: float | None = None  # the mean of the copies, the last time
    note: str = ""  # why there is no change


@dataclass(slots=True)
class Volatile:
    started_at_s: float | None = None
    now_s: float = 0.0  # of the newest step, for views
    timers: Timers = field(default_factory=Timers)
    links: list[NodeLink] = field(default_factory=list)  # by node reference
    heartbeat_s: Times = field(default_factory=lambda: np.full(64, np.inf))  # of ready nodes; else inf
    missed_s: Times = field(default_factory=lambda: np.full(64, np.inf))  # from when on an absence counts for the brake
    is_down: Bools = field(default_factory=lambda: np.zeros(64, np.bool_))  # as the links have it
    heartbeat_interval_s: float = 0.0  # both: `pace`
    silence_s: float = 0.0
    braked: str = ""  # why
    reports: dict[int, AllocReport] = field(default_factory=dict)
    pulling: dict[int, Pulling] = field(default_factory=dict)  # of those that ever waited
    unclaimed: dict[AllocId, NodeId] = field(default_factory=dict)
    counter: int = 0  # of the generations that assignments carry
    # For the journal.
    ticket: int = 0
    in_flight: InFlight | None = None
    decides_next: bool = False  # calls were answered last
    calls: deque[Call] = field(default_factory=deque)
    registering: dict[NodeId, Node] = field(default_factory=dict)
    joining: dict[NodeId, AgentConnected] = field(default_factory=dict)
    downing: dict[int, None] = field(default_factory=dict)
    losing: dict[int, int] = field(default_factory=dict)  # serials whose disconnect policy ran out -> their node
    ended: dict[int, Ended] = field(default_factory=dict)
    # For jobs that others are launched from.
    launches: dict[JobName, Launch] = field(default_factory=dict)  # when each schedule fires next
    children_over: dict[JobName, dict[JobName, None]] = field(default_factory=dict)  # by parent, oldest first
    # For groups that the fleet scales.
    loads: dict[int, deque[tuple[float, float]]] = field(default_factory=dict)  # by serial: when, and how much
    scalers: dict[FamilyKey, Scaler] = field(default_factory=dict)
    perhaps_over: dict[JobName, None] = field(default_factory=dict)  # something of them ended
    # For the scheduler.
    dirty_jobs: dict[JobName, None] = field(default_factory=dict)
    unplaced: dict[FamilyKey, str] = field(default_factory=dict)  # why
    nominated: dict[int, int] = field(default_factory=dict)  # node where room is made, by the serial that waits for it
    backoff: dict[FamilyKey, dict[int, Backoff]] = field(default_factory=dict)  # by index
    lost: dict[FamilyKey, set[int]] = field(default_factory=dict)  # indices whose replacement keeps the fleet's pace
    replacements_left: float = 0.0
    replacements_s: float = 0.0  # when it was so many
    stirred: dict[int, None] = field(default_factory=dict)  # nodes whose allocations must be looked at
    moving: dict[JobName, None] = field(default_factory=dict)  # jobs of which copies leave their nodes
    proven: dict[JobName, None] = field(default_factory=dict)  # jobs whose canaries are well and wait
    steered_s: dict[JobName, float] = field(default_factory=dict)  # when an operator last touched the rollout
    drains_changed: bool = False
    # For the agents and the mesh.
    outgoing: dict[int, Outgoing] = field(default_factory=dict)
    mesh_nodes: dict[int, None] = field(default_factory=dict)
    mesh_intentions: bool = False
    leaving: dict[int, None] = field(default_factory=dict)  # guests about to move: called elsewhere already
    stayed: dict[int, str] = field(default_factory=dict)  # why a guest did not move, by serial
    withdrawing: dict[int, None] = field(default_factory=dict)
    withdrawals: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by timer
    withdraw_now: list[int] = field(default_factory=list)
    out: list[Command] = field(default_factory=list)

    def forget_report(self, serial: int) -> AllocReport | None:
        self.pulling.pop(serial, None)
        self.loads.pop(serial, None)
        return self.reports.pop(serial, None)

    def to(self, ref: int) -> Outgoing:
        return self.outgoing.setdefault(ref, Outgoing())
