"""A controller's process around the production core: what `engine`, `election`, `fleet` and `sessions` do, in small.

Follows until it has the lock, replays the journal, leads, follows again when it lost it. While it cannot confirm its
lock it decides nothing and sends nothing.
"""

import itertools
from collections import deque
from collections.abc import Callable

from controller.core.commands import (
    Append,
    CloseSession,
    Command,
    ProbeNode,
    Publish,
    Reply,
    SendAssignments,
    WithdrawEndpoints,
)
from controller.core.events import (
    AgentApplied,
    AgentConnected,
    AgentDisconnected,
    AgentReported,
    Appended,
    EndpointsWithdrawn,
    Event,
    FingerprintChanged,
    HeartbeatReceived,
    JobStopRequested,
    JobSubmitted,
    LastWillSeen,
    RequestId,
    SessionId,
    Tick,
)
from controller.core.policy import Policy
from controller.core.records import Record
from controller.core.state import State
from controller.core.step import step
from outrider.ids import JobName, NodeId
from outrider.model.allocation import Generation
from outrider.model.job import Job
from tests.sim import invariants, messages
from tests.sim.kernel import BrokenError, Kernel, Process
from tests.sim.network import Network, Stream
from tests.sim.store import Store

CONFIRM_EVERY_S = 0.25
CONFIRMED_S = 2.0
RETRY_S = 0.1
COMPACT_SHARE = 0.02
WITHDRAW_LOST_SHARE = 0.1
TICK_S_MIN = 0.002


class ControllerProcess(Process):
    def __init__(self, kernel: Kernel, network: Network, store: Store, name: str, policy: Policy) -> None:
        super().__init__(kernel, name)
        self.network, self.store, self.policy = network, store, policy
        self.state: State | None = None  # while it leads
        self.session = ""
        self._round = 0
        self.streams: dict[NodeId, Stream] = {}
        self.compacts = True
        self._skew_s = 0.0
        self._tick_at_s: float | None = None
        self._inbox: deque[Event] = deque()
        self._appends: deque[Append] = deque()
        self._writing = False
        self._index = 0
        self._confirmed_s = 0.0
        self._sessions = 0
        self._requests: dict[RequestId, Callable[[Reply], None]] = {}
        self._request_ids = itertools.count(1)  # never one twice: an answer would be taken for another's
        self._sent = Generation()

    @property
    def leads(self) -> bool:
        return self.alive and self.state is not None

    def start(self) -> None:
        if self.alive:
            return
        self.begin_life()
        self.note("starts")
        # The core's time begins with the wall clock, which somebody may have set since.
        self._skew_s = self.kernel.rng.uniform(-30.0, 30.0)
        self._follow()

    def kill(self) -> None:
        if not self.alive:
            return
        self.note("is killed")
        self.end_life()
        self._drop_streams(lost=True)
        self.state, self.session = None, ""

    # Following and winning: one round at a time; what an earlier round asked for means nothing.

    def _follow(self) -> None:
        self.state, self.session = None, ""
        self._round += 1
        mine = self._round

        def opened(session: str | None) -> None:
            if mine != self._round:
                return
            if session is None:
                self._follow_later(mine)
            else:
                self.session = session
                self._acquire(mine)

        self.store.call(self, lambda: self.store.open_session(self), opened)

    def _follow_later(self, mine: int) -> None:
        self.later(RETRY_S, lambda: self._follow() if mine == self._round else None)

    def _acquire(self, mine: int) -> None:
        if mine != self._round or self.leads:
            return
        session, asked_s, done = self.session, self.kernel.now_s, [False]

        def again() -> None:
            if not done[0]:
                done[0] = True
                self._acquire(mine)

        def answered(won: bool | None) -> None:
            if mine != self._round or self.leads:
                return
            if won:
                self._confirmed_s = asked_s
                self.store.call(
                    self, lambda: (list(self.store.records), self.store.index), lambda read: self._replay(mine, read)
                )
            elif won is None or not self.store.exists(session):
                self._follow_later(mine)
            else:
                life = self.life
                self.store.freed.append(lambda: self.now(again) if self.alive and self.life == life else None)
                self.later(1.0, again)  # a watch that broke off

        self.store.call(self, lambda: self.store.acquire(session), answered)

    def _replay(self, mine: int, found: tuple[list[Record], int] | None) -> None:
        if mine != self._round or self.leads:
            return
        if found is None:
            self._follow_later(mine)
            return
        records, index = found
        state = State.empty(self.policy)
        for record in records:
            state.apply(record)
        epoch = state.next_epoch(salt=0x5EED)
        session, nonce = self.session, self._nonce()

        def written(at: int | None) -> None:
            if mine != self._round or self.leads:
                return
            if at:
                state.apply(epoch)
                self._lead(state, at)
            else:
                self._follow_later(mine)

        self.store.call(self, lambda: self.store.write(session, index, nonce, (epoch,), whole=False), written)

    def _lead(self, state: State, index: int) -> None:
        self.note(f"leads, epoch {state.epoch}")
        invariants.check_acknowledged(state, self.store.acknowledged)
        self.state, self._index = state, index
        self._inbox.clear()
        self._appends.clear()
        self._writing, self._sent, self._tick_at_s = False, Generation(), None
        self._requests.clear()
        self._confirm(self.session)
        self._arm()

    def _confirm(self, session: str) -> None:
        if not self.leads or session != self.session:
            return
        asked_s = self.kernel.now_s

        def answered(held: bool | None) -> None:
            if not self.leads or session != self.session:
                return
            if held is False:
                self._lose("the lock is another's")
                return
            if held:
                self._confirmed_s = asked_s
                self._work()
            self.later(CONFIRM_EVERY_S, lambda: self._confirm(session))

        self.store.call(self, lambda: self.store.holder == session, answered)

    def _lose(self, why: str) -> None:
        self.note(f"leads no more: {why}")
        self._drop_streams(lost=False)
        session = self.session
        self.store.call(self, lambda: self.store.release(session), lambda _: None)
        self._follow()

    def _drop_streams(self, *, lost: bool) -> None:
        for stream in self.streams.values():
            stream.close(self, lost=lost)
        self.streams.clear()

    @property
    def acts(self) -> bool:
        return self.kernel.now_s - self._confirmed_s < CONFIRMED_S

    # Agents and operators.

    def dialled(self, stream: Stream, hello: messages.Hello) -> None:
        """An agent's first message."""
        if not self.leads or not self.acts:
            stream.send(self, messages.NotLeader())
            stream.close(self, lost=False)
            return
        node = hello.node.id
        older = self.streams.pop(node, None)
        if older is not None:
            older.close(self, lost=False)
            self._tell(AgentDisconnected(session=SessionId(older.session), node=node, reason="replaced"))
        self._sessions += 1
        stream.session = self._sessions
        self.streams[node] = stream
        stream.to_controller = lambda message: self._heard(stream, node, message)
        stream.send(self, messages.Welcome(interval_s=self.policy.heartbeat_interval_s))
        self._tell(
            AgentConnected(
                session=SessionId(stream.session),
                node=hello.node,
                acknowledged=hello.acknowledged,
                reports=hello.reports,
            )
        )

    def _heard(self, stream: Stream, node: NodeId, message: object) -> None:
        if self.streams.get(node) is not stream or not self.leads:
            return
        at = SessionId(stream.session)
        match message:
            case None:
                del self.streams[node]
                self._tell(AgentDisconnected(session=at, node=node, reason="the stream ended"))
            case messages.Heartbeat():
                if self.acts:
                    stream.send(self, message)
                self._tell(HeartbeatReceived(session=at, node=node))
            case messages.Reports():
                self._tell(AgentReported(session=at, node=node, reports=message.reports))
            case messages.Applied():
                self._tell(AgentApplied(session=at, node=node, generation=message.generation))
            case messages.Found():
                self._tell(FingerprintChanged(session=at, node=node, fingerprint=message.fingerprint))
            case _:
                raise AssertionError(message)

    def call(self, wanted: Job | JobName | Callable[[RequestId], Event], answered: Callable[[Reply], None]) -> None:
        """An operator's; an answer may never come."""
        if not self.leads:
            return
        request = RequestId(next(self._request_ids))
        self._requests[request] = answered
        if isinstance(wanted, Job):
            self._tell(JobSubmitted(request=request, job=wanted))
        elif callable(wanted):
            self._tell(wanted(request))
        else:
            self._tell(JobStopRequested(request=request, job=wanted))

    def last_will(self, node: NodeId) -> None:
        if self.leads:
            self._tell(LastWillSeen(node=node))

    # The loop.

    def _tell(self, event: Event) -> None:
        self._inbox.append(event)
        self._work()

    def _work(self) -> None:
        while self.leads and self.acts and self._inbox:
            self._step(self._inbox.popleft())

    def _core_now_s(self) -> float:
        return 100_000.0 + self.kernel.now_s + self._skew_s

    def _step(self, event: Event) -> None:
        assert self.state is not None
        commands = step(self.state, event, self._core_now_s(), self.kernel.rng)
        if isinstance(event, Appended):
            invariants.check_state(self.state)
        for command in commands:
            self._execute(command)
        self._arm()

    def _arm(self) -> None:
        """A Tick when the core wants one, and no later than that."""
        if not self.leads or self.state is None:
            return
        deadline_s = self.state.next_deadline_s
        if deadline_s is None:
            return
        at_s = max(self.kernel.now_s + TICK_S_MIN, deadline_s - self._core_now_s() + self.kernel.now_s)
        if self._tick_at_s is not None and self.kernel.now_s <= self._tick_at_s <= at_s:
            return
        self._tick_at_s, state = at_s, self.state

        def tick() -> None:
            if self.state is state and self._tick_at_s == at_s:
                self._tick_at_s = None
                if not any(isinstance(event, Tick) for event in self._inbox):
                    self._tell(Tick())

        self.later(at_s - self.kernel.now_s, tick)

    def _execute(self, command: Command) -> None:
        match command:
            case Append():
                self._appends.append(command)
                self._write_next()
            case SendAssignments():
                self._send(command)
            case CloseSession() | ProbeNode():
                stream = self.streams.get(command.node)
                if stream is not None and stream.session == command.session:
                    if isinstance(command, ProbeNode):
                        stream.send(self, messages.Heartbeat(sequence=0))
                    else:
                        stream.close(self, lost=False)
                        del self.streams[command.node]
                        self._inbox.append(AgentDisconnected(session=command.session, node=command.node))
            case Reply():
                answered = self._requests.pop(command.request, None)
                if answered is not None:
                    self.kernel.at(self.network.delay_s(), lambda: answered(command))
            case WithdrawEndpoints():
                if not self.kernel.chance(WITHDRAW_LOST_SHARE):
                    done, state = EndpointsWithdrawn(allocs=command.allocs), self.state
                    self.later(self.network.delay_s(), lambda: self._tell(done) if self.state is state else None)
            case Publish():
                event = command.event
                self.note(f"{event.kind} {event.node} {event.job} {event.alloc} {event.message}".rstrip())
            case _:
                pass

    def _send(self, command: SendAssignments) -> None:
        if not command.generation > self._sent:
            raise BrokenError(f"{self.name} sends {command.generation} after {self._sent}")
        self._sent = command.generation
        stream = self.streams.get(command.node)
        if stream is not None and stream.session == command.session:
            wish = messages.Assignments(
                generation=command.generation,
                full=command.full,
                assignments=command.assignments,
                removed=command.removed,
            )
            stream.send(self, wish)

    def _write_next(self) -> None:
        if self._writing or not self._appends or self.state is None:
            return
        self._writing = True
        if self.compacts and self.kernel.chance(COMPACT_SHARE):
            snapshot = tuple(self.state.snapshot())
            self.note(f"compacts the journal to {len(snapshot)} records")
            self._write(snapshot, whole=True, then=self._write_append)
        else:
            self._write_append()

    def _write_append(self) -> None:
        append = self._appends[0]

        def then() -> None:
            self._appends.popleft()
            self._writing = False
            self._inbox.appendleft(Appended(ticket=append.ticket))
            self._work()
            self._write_next()

        self._write(append.records, whole=False, then=then)

    def _write(self, records: tuple[Record, ...], *, whole: bool, then: Callable[[], None]) -> None:
        session, index, nonce = self.session, self._index, self._nonce()

        def attempt() -> None:
            if self.leads and session == self.session:
                self.store.call(self, lambda: self.store.write(session, index, nonce, records, whole=whole), written)

        def written(at: int | None) -> None:
            if not self.leads or session != self.session:
                return
            if at is None:
                self.later(RETRY_S, attempt)
            elif at == 0:
                self._lose("the journal is fenced")
            else:
                self._index = at
                then()

        attempt()

    def _nonce(self) -> str:
        return f"{self.name}-{self.life}-{self.kernel.rng.getrandbits(64):x}"
