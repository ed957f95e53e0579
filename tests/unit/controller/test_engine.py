"""The loop: nothing is answered before it is on disk, many appends share a commit, a failed journal ends it all."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import pytest

from controller.core.commands import CloseSession, ProbeNode, SendAssignments
from controller.core.events import AgentConnected, HeartbeatReceived, JobStopRequested, JobSubmitted, SessionId
from controller.core.mesh_intent import Interests, NodeRegistration, OwnedIntention
from controller.core.policy import Policy
from controller.core.records import Record
from controller.engine import Engine
from controller.event_log import EventLog
from outrider.errors import JournalError, RefusedError
from outrider.ids import AllocId, GroupName, JobName, NodeId, ServiceName, TaskName
from outrider.log import Log
from outrider.model.allocation import Generation
from outrider.model.job import MIB, Group, Job, Task
from outrider.model.node import Fingerprint, Node

DEADLINE_S = 20.0


class Disk:
    """A journal in memory that can be made to fail."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.batches = 0
        self.broken = False
        self.full = ""
        self.snapshots = 0
        self.snapshot_due = False

    def open(self) -> None: ...

    def load(self) -> Iterator[Record]:
        return iter(tuple(self.records))

    def append(self, batch: Sequence[Record]) -> None:
        if self.broken:
            raise JournalError("disk full")
        self.batches += 1
        self.records.extend(batch)

    def snapshot(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.snapshots += 1
        self.snapshot_due = False

    def due(self) -> bool:
        return self.snapshot_due

    def refusal(self) -> str:
        return self.full

    def close(self) -> None: ...


class Nobody:
    """Sessions and mesh of a controller without agents."""

    def send(self, command: SendAssignments) -> None: ...
    def probe(self, command: ProbeNode) -> None: ...
    def close(self, command: CloseSession) -> None: ...
    def set_node(self, registration: NodeRegistration) -> None: ...
    def set_intentions(self, intentions: tuple[OwnedIntention, ...]) -> None: ...
    def set_services(self, services: object) -> None: ...
    def set_traffic(self, traffic: object) -> None: ...
    def set_interests(self, node: NodeId, interests: Interests) -> None: ...
    def withdraw(self, allocs: tuple[AllocId, ...], services: tuple[ServiceName, ...]) -> None: ...


def _job(number: int) -> Job:
    task = Task(name=TaskName("t"), command=("true",))
    return Job(name=JobName(f"job-{number}"), groups=(Group(name=GroupName("g"), tasks=(task,)),))


@contextlib.asynccontextmanager
async def _running(disk: Disk, policy: Policy | None = None) -> AsyncIterator[Engine]:
    engine = Engine(journal=disk, events=EventLog(), log=Log("engine"), policy=policy)
    await engine.open()
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(engine.run(sessions=Nobody(), mesh=Nobody()), name="engine")
            yield engine
            task.cancel()
    finally:
        await engine.close()


async def test_many_calls_share_few_commits_and_all_are_in_the_journal() -> None:
    disk = Disk()
    async with _running(disk) as engine:
        replies = await asyncio.gather(
            *(engine.request(lambda request, n=n: JobSubmitted(request=request, job=_job(n))) for n in range(100))
        )
        assert all(reply.changed and not reply.code for reply in replies)
        assert disk.batches < 50
    records = len(disk.records)  # once it has ended: what follows the calls may be written after their answers
    again = Engine(journal=disk, events=EventLog(), log=Log("engine"))
    await again.open()
    assert len(disk.records) == records + 1  # a new epoch
    assert again.state.epoch == 2
    await again.close()


async def test_a_sign_of_life_is_taken_where_nothing_else_happens() -> None:
    fingerprint = Fingerprint(cpu_millis=1000, memory_bytes=MIB, disk_bytes=MIB)
    node = Node(id=NodeId("n1"), address="10.0.0.1", fingerprint=fingerprint)
    async with _running(Disk(), Policy(suspect_after_s=1e9)) as engine, asyncio.timeout(DEADLINE_S):
        await engine.tell(AgentConnected(session=SessionId(1), node=node, acknowledged=Generation()))
        while not (len(engine.state.nodes) and engine.state.ready_nodes.all()):
            await engine.next_change().wait()
        connected_s = engine.now_s()
        engine.heartbeat(HeartbeatReceived(session=SessionId(1), node=node.id))
        while engine.state.live.heartbeat_s[0] < connected_s:  # noqa: ASYNC110 - no step of the core tells of it
            await asyncio.sleep(0)


async def test_a_refusal_is_an_answer() -> None:
    async with _running(Disk()) as engine:
        reply = await engine.request(lambda request: JobStopRequested(request=request, job=JobName("absent")))
        assert reply.code == "not-found"


async def test_a_journal_that_fails_ends_the_controller_and_nothing_is_answered() -> None:
    disk = Disk()
    with pytest.raises(ExceptionGroup) as caught:
        await _submit_to_broken(disk)
    assert caught.group_contains(JournalError)
    assert len(disk.records) == 1


async def test_a_journal_is_compacted_while_it_runs() -> None:
    disk = Disk()
    async with _running(disk) as engine:
        for number in range(20):
            disk.snapshot_due = number == 10
            await engine.request(lambda request, n=number: JobSubmitted(request=request, job=_job(n)))
        await engine.request(lambda request: JobSubmitted(request=request, job=_job(99)))
        assert disk.snapshots == 1
        kept = list(engine.state.snapshot())
    again = Engine(journal=disk, events=EventLog(), log=Log("engine"))
    again._replay()
    assert [type(record) for record in again.state.snapshot()] == [type(record) for record in kept]
    assert len(again.state.jobs) == 21
    await again.close()


async def test_a_full_journal_takes_no_job_and_still_stops_one() -> None:
    disk = Disk()
    async with _running(disk) as engine:
        await engine.request(lambda request: JobSubmitted(request=request, job=_job(1)))
        disk.full = "64 MiB is the limit"
        with pytest.raises(RefusedError, match="64 MiB is the limit"):
            await engine.request(lambda request: JobSubmitted(request=request, job=_job(2)))
        reply = await engine.request(lambda request: JobStopRequested(request=request, job=JobName("job-1")))
        assert reply.changed


class Doubtful:
    """A standing that comes and goes."""

    def __init__(self) -> None:
        self.sure = asyncio.Event()

    def confirmed(self) -> bool:
        return self.sure.is_set()

    async def wait(self) -> None:
        await self.sure.wait()


async def test_who_may_not_lead_decides_nothing() -> None:
    disk, standing = Disk(), Doubtful()
    engine = Engine(journal=disk, events=EventLog(), log=Log("engine"), standing=standing)
    await engine.open()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(engine.run(sessions=Nobody(), mesh=Nobody()))
        call = group.create_task(engine.request(lambda request: JobSubmitted(request=request, job=_job(1))))
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(disk.records) == 1, "the epoch alone"
        standing.sure.set()
        assert (await call).changed
        task.cancel()
    await engine.close()


async def test_a_change_wakes_who_waits_for_one() -> None:
    async with _running(Disk()) as engine:
        changed = engine.next_change()
        await engine.request(lambda request: JobSubmitted(request=request, job=_job(1)))
        assert changed.is_set()


async def _submit_to_broken(disk: Disk) -> None:
    async with _running(disk) as engine:
        disk.broken = True
        await engine.request(lambda request: JobSubmitted(request=request, job=_job(1)))
