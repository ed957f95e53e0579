"""A controller's engine with its SQLite journal on disk, and simulated agents in place of the gRPC sessions.

The agents take every assignment at once, acknowledge it, report what belongs to a service as running and healthy, and
what they were told to stop as ended. They send no
heartbeats: the policy here never suspects anybody. No network, no workloads: this is the control plane alone.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import numpy as np

from controller.core import table as columns
from controller.core.commands import Append, CloseSession, Command, ProbeNode, SendAssignments
from controller.core.events import (
    AgentApplied,
    AgentConnected,
    AgentReported,
    Event,
    JobSubmitted,
    NodeSteerRequested,
    SessionId,
)
from controller.core.mesh_intent import Interests, NodeRegistration, OwnedIntention
from controller.core.policy import Policy
from controller.core.records import Record
from controller.engine import Engine
from controller.event_log import EventLog
from controller.journal.sqlite import SqliteJournal
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.log import Log
from outrider.model.allocation import AllocReport, AllocStatus, Assignment, Desired, Generation
from outrider.model.fleet import RolloutState
from outrider.model.job import MIB, Job, Protocol
from outrider.model.node import Fingerprint, Node

RACKS = 50  # and zones: what the nodes' operator says of them
ZONES = 5
_FOREVER_S = 1e9
_LOOK_S = 0.02
_GIB = 1024 * MIB


class Agents:
    """Sessions and mesh of the engine."""

    def __init__(self) -> None:
        self.assignments = 0
        self._engine: Engine

    def serve(self, engine: Engine) -> None:
        self._engine = engine

    def send(self, command: SendAssignments) -> None:
        self.assignments += len(command.assignments)
        session, node = command.session, command.node
        self._engine.post(AgentApplied(session=session, node=node, generation=command.generation))
        reports = tuple(_report(one) for one in command.assignments if one.desired is Desired.STOP or not one.batch)
        if reports:
            self._engine.post(AgentReported(session=session, node=node, reports=reports))

    def probe(self, command: ProbeNode) -> None: ...
    def close(self, command: CloseSession) -> None: ...
    def set_node(self, registration: NodeRegistration) -> None: ...
    def set_intentions(self, intentions: tuple[OwnedIntention, ...]) -> None: ...
    def set_traffic(self, traffic: object) -> None: ...
    def set_services(self, services: Mapping[ServiceName, tuple[int, Protocol]]) -> None: ...
    def set_interests(self, node: NodeId, interests: Interests) -> None: ...
    def withdraw(self, allocs: tuple[AllocId, ...], services: tuple[ServiceName, ...]) -> None: ...


def _report(assignment: Assignment) -> AllocReport:
    stops = assignment.desired is Desired.STOP
    return AllocReport(alloc=assignment.alloc, status=AllocStatus.COMPLETE if stops else AllocStatus.RUNNING)


class ControlPlane:
    def __init__(self, engine: Engine, agents: Agents) -> None:
        self.engine = engine
        self.agents = agents

    async def submit(self, job: Job) -> None:
        await self.engine.request(lambda request: JobSubmitted(request=request, job=job))

    async def drain(self, node: NodeId) -> None:
        await self.engine.request(
            lambda request: NodeSteerRequested(request=request, node=node, eligible=False, drain=True)
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        while True:
            changed = self.engine.next_change()
            if condition():
                return
            with contextlib.suppress(TimeoutError):  # an acknowledgement alone wakes nobody
                async with asyncio.timeout(_LOOK_S):
                    await changed.wait()

    def placed(self) -> int:
        """Allocations that the journal has on a node."""
        table = self.engine.state.table
        live = table.status[: table.size] == columns.LIVE
        return int((live & (table.node[: table.size] >= 0)).sum())

    def has_placed(self, count: int) -> bool:
        return self.placed() == count

    def on_nodes(self, drained: list[NodeId]) -> int:
        """Allocations that have not ended there."""
        state = self.engine.state
        refs = [state.nodes.reference[node] for node in drained]
        table = state.table
        live = table.status[: table.size] == columns.LIVE
        return int(np.isin(table.node[: table.size][live], refs).sum())

    def settled(self) -> bool:
        """Every job's rollout has ended well."""
        return all(entry.rollout is RolloutState.SUCCESSFUL for entry in self.engine.state.jobs.values())

    def watch_steps(self, told: Callable[[tuple[Record, ...], float, float], None]) -> None:
        """Of each step that asked for an append: the records, how long it took, and how much of the processor."""
        step = self.engine._step  # noqa: SLF001  measured from outside, so that the loop itself stays as it is

        def measured(event: Event) -> tuple[Command, ...]:
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            commands = step(event)
            took_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
            for command in commands:
                if isinstance(command, Append):
                    told(command.records, took_s, cpu_s)
            return commands

        self.engine._step = measured  # type: ignore[method-assign]  # noqa: SLF001

    def acknowledged(self) -> bool:
        """Every agent has taken what it was sent."""
        live = self.engine.state.live
        newest = Generation(self.engine.state.epoch, live.counter)
        return live.counter == 0 or any(link.acknowledged == newest for link in live.links)


def nodes(count: int, *, cores: int = 32, memory_gib: int = 128) -> list[Node]:
    return [
        Node(
            id=NodeId(f"n{at}"),
            address=f"10.{at >> 16 & 255}.{at >> 8 & 255}.{at & 255}",
            fingerprint=Fingerprint(
                cpu_millis=cores * 1000,
                memory_bytes=memory_gib * _GIB,
                disk_bytes=4096 * _GIB,
                runtimes={"crun": "1.8.1", "conmon": "2.1.6"},
                host_image=True,
                kernel="6.1.0" if at % 3 else "5.10.0",
                meta={"rack": f"r{at % RACKS}", "zone": f"z{at % ZONES}", "disk": "ssd" if at % 2 else "hdd"},
            ),
        )
        for at in range(count)
    ]


@contextlib.asynccontextmanager
async def control_plane(fleet: list[Node], policy: Policy | None = None) -> AsyncIterator[ControlPlane]:
    """With all nodes ready; its journal is on the disk that temporary files are kept on over restarts."""
    policy = policy or Policy(suspect_after_s=_FOREVER_S)
    agents = Agents()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        journal = SqliteJournal(Path(directory) / "journal.db")
        engine = Engine(journal=journal, events=EventLog(), log=Log("bench"), policy=policy)
        agents.serve(engine)
        await engine.open()
        running = asyncio.create_task(engine.run(sessions=agents, mesh=agents), name="engine")
        plane = ControlPlane(engine, agents)
        for at, node in enumerate(fleet):
            await engine.tell(AgentConnected(session=SessionId(at + 1), node=node, acknowledged=Generation()))
        await plane.until(lambda: len(engine.state.nodes) == len(fleet) and bool(engine.state.ready_nodes.all()))
        try:
            yield plane
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await engine.close()


def memory_mb() -> float:
    """Resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status tells no VmRSS")


def used_nodes(plane: ControlPlane) -> int:
    table = plane.engine.state.table
    live = table.status[: table.size] == columns.LIVE
    taken = table.node[: table.size][live]
    return len(np.unique(taken[taken >= 0]))
