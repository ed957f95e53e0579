"""OperatorService's event stream over a real channel: a listener that does not take what comes is ended."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.audit import AuditLog
from controller.callers import Callers
from controller.core.records import Record
from controller.engine import Engine
from controller.event_log import LISTENER_EVENTS_MAX, EventLog
from controller.keyring import Keyring
from controller.listeners import socket_listener
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.issuer import ConsulIssuer
from controller.mesh.mesh import Mesh
from controller.operator import OperatorService
from controller.parts import Parts
from outrider.log import Log
from outrider.model.fleet import FleetEvent
from outrider.v1 import operator_pb2, operator_pb2_grpc
from tests.integration.processes import until


class MemoryJournal:
    """An honest journal for a controller that is never restarted."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def open(self) -> None: ...

    def load(self) -> Iterator[Record]:
        return iter(self.records)

    def append(self, batch: Sequence[Record]) -> None:
        self.records.extend(batch)

    def snapshot(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def close(self) -> None: ...


@pytest.fixture
async def events(tmp_path: Path) -> AsyncIterator[EventLog]:
    """The log behind a real listener on tmp_path/operator.sock."""
    log = EventLog()
    engine = Engine(journal=MemoryJournal(), events=log, log=Log("engine"))
    consul = ConsulAdapter(f"unix:{tmp_path}/nobody.sock")
    mesh = Mesh(consul=consul, issuer=ConsulIssuer(consul), cluster="c", adopt_intentions=False, log=Log("mesh"))
    parts = Parts(
        cluster="c", engine=engine, mesh=mesh, events=log, keyring=Keyring(tmp_path / "key", {}), agree=lambda _: None
    )
    callers = Callers(cluster="c", access=engine.state.access, per_s=100.0, burst=100.0)
    service = OperatorService(parts, consul="nobody", callers=callers, audit=AuditLog(tmp_path))

    def register(server: grpc.aio.Server) -> None:
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(service, server)

    async with socket_listener(tmp_path / "operator.sock", register):
        yield log
    await consul.close()
    await engine.close()


async def test_a_slow_listener_is_ended_and_a_quick_one_is_not(events: EventLog, tmp_path: Path) -> None:
    follow = operator_pb2.WatchEventsRequest(follow=True)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/operator.sock") as connection:
        stub = operator_pb2_grpc.OperatorServiceStub(connection)
        slow = stub.WatchEvents(follow, timeout=20)
        await until(lambda: events.listeners == 1, "it follows")
        for _ in range(2 * LISTENER_EVENTS_MAX):  # more than the queue and what gRPC holds on its way take together
            events.publish(FleetEvent(kind="job.submitted", job="shop", message="x" * 4000))
        got: list[int] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _take(slow, got)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("outrider-code", "slow-listener") in tuple(caught.value.trailing_metadata() or ())
        assert got == list(range(got[0], got[0] + len(got))), "what it got is without a gap"
        await until(lambda: events.listeners == 0, "it is forgotten")

        rest = stub.WatchEvents(operator_pb2.WatchEventsRequest(follow=True, after=got[-1]), timeout=20)
        kept = events.kept(got[-1])
        assert [(await rest.read()).sequence for _ in kept] == [event.sequence for event in kept]
        rest.cancel()
        await until(lambda: events.listeners == 0, "a listener that hangs up is forgotten")


async def _take(events: AsyncIterator[operator_pb2.FleetEvent], got: list[int]) -> None:
    async for event in events:
        got.append(event.sequence)  # noqa: PERF401 - what came before the error counts
