"""The controller's one loop: takes events, asks the core, does what it says. Decides nothing.

Tasks: `engine` (the loop), `journal` (hands batches to the journal's own thread: many appends, one fsync).
Queues: outside events, EVENTS_MAX, callers wait with a deadline when it is full; heartbeats, one for each node, the
newest; appends on their way to disk, RECORDS_MAX, when full only what the journal answers is taken. What edges `post`
(an end of a session, an answer of the mesh) is bounded by what there is of it.
"""

import asyncio
import contextlib
import itertools
import random
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, assert_never

from controller import collector
from controller.core import mesh_intent, views
from controller.core.commands import (
    Append,
    CloseSession,
    Command,
    PlanLaunch,
    ProbeNode,
    Publish,
    Reply,
    SendAssignments,
    SyncMesh,
    WithdrawEndpoints,
)
from controller.core.events import Appended, Event, HeartbeatReceived, JobSubmitted, RequestId, Tick
from controller.core.mesh_intent import Interests, NodeRegistration, OwnedIntention, OwnedTraffic
from controller.core.policy import Policy
from controller.core.records import Record
from controller.core.state import State
from controller.core.step import step
from controller.event_log import EventLog
from controller.journal import Journal, LeadershipLostError
from controller.launches import planned
from controller.standing import Alone, Standing
from outrider.clock import monotonic_s, wall_s
from outrider.errors import OutriderError, PeerError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.log import Log
from outrider.model.job import Protocol as ServiceProtocol

EVENTS_MAX = 4096
RECORDS_MAX = 16_384
BATCH_EVENTS_MAX = 256
CALL_TIMEOUT_S = 10.0
HEARTBEATS_S = 0.02  # that one waits for others, where nothing else happens
# A journal of more records than this is rewritten as a snapshot when the controller starts.
COMPACT_RECORDS = 5_000

_IDLE_S_MAX = 60.0
_TICK_S_MIN = 0.002  # a deadline that a Tick left in place must not spin the loop


RESTORED_ANSWER_S = 0.3  # for whoever asked for it to be told


class RestoredError(OutriderError):
    """The journal holds another state than this controller's: begin again."""


class AgentSessions(Protocol):
    """What the loop needs of `fleet`. No call waits."""

    def send(self, command: SendAssignments) -> None: ...
    def probe(self, command: ProbeNode) -> None: ...
    def close(self, command: CloseSession) -> None: ...


class MeshRecord(Protocol):
    """What the loop needs of `mesh`. No call waits."""

    def set_node(self, registration: NodeRegistration) -> None: ...
    def set_intentions(self, intentions: tuple[OwnedIntention, ...]) -> None: ...
    def set_traffic(self, traffic: tuple[OwnedTraffic, ...]) -> None: ...
    def set_services(self, services: Mapping[ServiceName, tuple[int, ServiceProtocol]]) -> None: ...
    def set_interests(self, node: NodeId, interests: Interests) -> None: ...
    def withdraw(self, allocs: tuple[AllocId, ...], services: tuple[ServiceName, ...]) -> None: ...


class Counts:
    """What the loop did, for metrics."""

    def __init__(self) -> None:
        self.events = 0
        self.appends = 0
        self.records = 0
        self.commits = 0
        self.snapshots = 0
        self.step_s = 0.0
        self.step_s_max = 0.0
        self.commit_s = 0.0


class Engine:
    """`open`, then `run` until cancelled. `state` may be read by anybody on the same event loop, between awaits."""

    def __init__(
        self,
        *,
        journal: Journal,
        events: EventLog,
        log: Log,
        standing: Standing | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`standing`: whether this controller may act; None: nobody else can."""
        self.state = State.empty(policy)
        self._standing = standing or Alone()
        self.counts = Counts()
        self._journal = journal
        self._events = events
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._started_s = wall_s() - monotonic_s()
        self._random = random.Random(secrets.randbits(64))  # noqa: S311 - jitter and spreading, no secret
        self._requests = itertools.count(1)
        self._waiting: dict[RequestId, asyncio.Future[Reply]] = {}
        self._inbox: deque[tuple[Event, bool]] = deque()
        self._room = asyncio.Semaphore(EVENTS_MAX)
        self._wake = asyncio.Event()
        self._heartbeats: dict[NodeId, HeartbeatReceived] = {}
        self._appends: list[Append] = []
        self._records_waiting = 0
        self._appends_ready = asyncio.Event()
        self._answers: deque[Appended] = deque()
        self._changed = asyncio.Event()
        self._ticked_s = 0.0
        self._restoring: tuple[Sequence[Record], asyncio.Future[None]] | None = None
        self._sessions: AgentSessions
        self._mesh: MeshRecord

    @property
    def acts(self) -> bool:
        """False: perhaps another controller leads already; nothing is to be sent, not even a sign of life."""
        return self._standing.confirmed()

    async def settled(self, timeout_s: float) -> None:
        """Until this controller knows that it leads, or for so long. Raises PeerError where it does not lead."""
        if self._standing.confirmed():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._standing.wait()
        except TimeoutError:
            return
        except LeadershipLostError as error:
            raise PeerError("another controller leads now; try again") from error

    def now_s(self) -> float:
        """The core's time: wall-clock seconds that never step back."""
        return self._started_s + monotonic_s()

    async def open(self) -> None:
        """Replay the journal and begin an epoch. Raises JournalError."""
        records = await asyncio.get_running_loop().run_in_executor(self._thread, self._replay)
        collector.calm()
        self._log.info("journal replayed", records=records, epoch=self.state.epoch)

    async def run(self, *, sessions: AgentSessions, mesh: MeshRecord) -> None:
        """The loop. Raises JournalError when the journal fails: what is not in it did not happen."""
        self._sessions, self._mesh = sessions, mesh
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop(), name="engine")
            group.create_task(self._commit_forever(), name="journal")

    async def close(self) -> None:
        """After `run` has ended: what the journal was handed is on disk."""
        if not self.acts:
            self._journal.close()  # ends a call that waits for a Consul which does not answer
        await asyncio.get_running_loop().run_in_executor(self._thread, self._journal.close)
        self._thread.shutdown()

    def sync_all(self, mesh: MeshRecord) -> None:
        """Tell `mesh` the whole truth, before it begins to run."""
        self._mesh = mesh
        self._sync({node.node.id for node in views.node_states(self.state)}, intentions=True)

    async def tell(self, event: Event) -> None:
        """An event from outside; waits for room. Raises PeerError where there is none within CALL_TIMEOUT_S."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._room.acquire()
        except TimeoutError as error:
            raise PeerError("the controller is overloaded; try again in a while") from error
        self._inbox.append((event, True))
        self._wake.set()

    def post(self, event: Event) -> None:
        """An event that must not be lost and cannot wait: its sender bounds how many there are."""
        self._inbox.append((event, False))
        self._wake.set()

    def heartbeat(self, event: HeartbeatReceived) -> None:
        """Only the newest of a node counts, and they are taken together: each alone would wake the loop."""
        if not self._heartbeats:
            asyncio.get_running_loop().call_later(HEARTBEATS_S, self._wake.set)
        self._heartbeats[event.node] = event

    async def request(self, make: Callable[[RequestId], Event]) -> Reply:
        """An operator's call, answered once the journal has it. Raises PeerError after CALL_TIMEOUT_S, RefusedError
        where the journal has no room for more jobs."""
        request = RequestId(next(self._requests))
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request] = answer
        try:
            event = make(request)
            if isinstance(event, JobSubmitted) and (refusal := self._journal.refusal()):
                raise RefusedError("journal-full", refusal)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self.tell(event)
                return await answer
        except TimeoutError as error:
            raise PeerError(
                f"no answer within {CALL_TIMEOUT_S:g} s; whether it was done is not known: look before you repeat it"
            ) from error
        finally:
            del self._waiting[request]

    async def restore(self, records: Sequence[Record]) -> None:
        """Replace all that the journal has. Returns once it is durable; then `run` raises RestoredError."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._restoring = (records, done)
        self._appends_ready.set()
        await done

    def next_change(self) -> asyncio.Event:
        """Set when the state has changed since now."""
        return self._changed

    def _replay(self) -> int:
        self._journal.open()
        count = 0
        for record in self._journal.load():
            self.state.apply(record)
            count += 1
        epoch = self.state.next_epoch(secrets.randbits(40))
        self._journal.append((epoch,))
        self.state.apply(epoch)
        if count > COMPACT_RECORDS:
            self._journal.snapshot(self.state.snapshot())
        return count

    async def _loop(self) -> None:
        while True:
            if not self._standing.confirmed():
                await self._standing.wait()
            batch = self._batch()
            if not batch:
                await self._idle()
                continue
            commands: list[Command] = []
            for event in batch:
                commands.extend(self._step(event))
            self._execute(commands)
            if commands:
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(0)

    async def _idle(self) -> None:
        self._wake.clear()
        deadline_s = self.state.next_deadline_s
        wait_s = _IDLE_S_MAX if deadline_s is None else deadline_s - self.now_s()
        with contextlib.suppress(TimeoutError):  # a deadline of the core: the next batch has a Tick
            async with asyncio.timeout(max(_TICK_S_MIN, wait_s)):
                await self._wake.wait()

    def _batch(self) -> list[Event]:
        batch: list[Event] = [*self._answers, *self._heartbeats.values()]
        self._answers.clear()
        self._heartbeats.clear()
        while self._inbox and len(batch) < BATCH_EVENTS_MAX and self._records_waiting < RECORDS_MAX:
            event, counted = self._inbox.popleft()
            batch.append(event)
            if counted:
                self._room.release()
        now_s, deadline_s = self.now_s(), self.state.next_deadline_s
        if deadline_s is not None and deadline_s <= now_s and now_s >= self._ticked_s + _TICK_S_MIN:
            self._ticked_s = now_s
            batch.append(Tick())
        return batch

    def _step(self, event: Event) -> tuple[Command, ...]:
        began_s = monotonic_s()
        commands = step(self.state, event, self.now_s(), self._random)
        took_s = monotonic_s() - began_s
        self.counts.events += 1
        self.counts.step_s += took_s
        self.counts.step_s_max = max(self.counts.step_s_max, took_s)
        return commands

    def _execute(self, commands: list[Command]) -> None:
        nodes: set[NodeId] = set()
        intentions = False
        withdrawals: list[WithdrawEndpoints] = []
        for command in commands:
            match command:
                case Append():
                    self._append(command)
                case SendAssignments():
                    self._sessions.send(command)
                case ProbeNode():
                    self._sessions.probe(command)
                case CloseSession():
                    self._sessions.close(command)
                case SyncMesh():
                    nodes.update(command.nodes)
                    intentions = intentions or command.intentions
                case WithdrawEndpoints():
                    withdrawals.append(command)
                case PlanLaunch():
                    self.post(planned(command))
                case Publish():
                    self._events.publish(command.event)
                case Reply():
                    self._reply(command)
                case _ as never:
                    assert_never(never)
        self._sync(nodes, intentions=intentions)
        # After the sync: what is withdrawn is gone from its node's registration.
        for withdrawal in withdrawals:
            self._mesh.withdraw(withdrawal.allocs, withdrawal.services)

    def _append(self, command: Append) -> None:
        self._appends.append(command)
        self._records_waiting += len(command.records)
        self._appends_ready.set()

    def _reply(self, command: Reply) -> None:
        answer = self._waiting.get(command.request)
        if answer is not None and not answer.done():
            answer.set_result(command)

    def _sync(self, nodes: set[NodeId], *, intentions: bool) -> None:
        if intentions:
            self._mesh.set_services(mesh_intent.virtual_services(self.state))
            self._mesh.set_intentions(mesh_intent.owned_intentions(self.state))
            self._mesh.set_traffic(mesh_intent.owned_traffic(self.state))
        for node in sorted(nodes):
            self._mesh.set_node(mesh_intent.registration(self.state, node))
            self._mesh.set_interests(node, mesh_intent.interests(self.state, node))

    async def _commit_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._appends_ready.wait()
            self._appends_ready.clear()
            if self._restoring is not None:
                records, done = self._restoring
                await loop.run_in_executor(self._thread, self._journal.snapshot, records)
                done.set_result(None)
                await asyncio.sleep(RESTORED_ANSWER_S)
                raise RestoredError("a snapshot was restored: the controller begins anew with it")
            appends, self._appends = self._appends, []
            records = [record for append in appends for record in append.records]
            began_s = monotonic_s()
            if self._journal.due():
                # The core has one append in flight: all that was written is applied, and nothing else is.
                snapshot = list(self.state.snapshot())
                await loop.run_in_executor(self._thread, self._journal.snapshot, snapshot)
                self.counts.snapshots += 1
            await loop.run_in_executor(self._thread, self._journal.append, records)
            self.counts.commit_s += monotonic_s() - began_s
            self.counts.commits += 1
            self.counts.appends += len(appends)
            self.counts.records += len(records)
            self._records_waiting -= len(records)
            self._answers.extend(Appended(ticket=append.ticket) for append in appends)
            self._wake.set()
