"""ArchiveService: the fleet's durable state as one file, out and in, and what helps to find a fault.

Owns no task. What it hands out to look at has no secret in it: no key, no token, no sealed value, no environment.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

import msgspec

from controller.audit import AuditLog
from controller.callers import Callers
from controller.core import views
from controller.core.restoring import restored
from controller.core.state import State
from controller.journal.archive import pack, unpack
from controller.parts import Parts
from controller.people import PeopleEdge
from controller.rpc import Context, stream, unary
from outrider.clock import wall_s
from outrider.errors import InputError
from outrider.log import Log
from outrider.model.job import MIB
from outrider.v1 import archive_pb2, archive_pb2_grpc

CHUNK_BYTES = 256 * 1024
ARCHIVE_BYTES_MAX = 256 * MIB
WRITE_TIMEOUT_S = 60.0


class ArchiveService(PeopleEdge, archive_pb2_grpc.ArchiveServiceServicer):
    def __init__(
        self,
        parts: Parts,
        *,
        callers: Callers,
        audit: AuditLog,
        metrics: Callable[[], bytes],
        configuration: Mapping[str, object],
    ) -> None:
        super().__init__(parts, callers=callers, audit=audit, log=Log("archive"))
        self._cluster = parts.cluster
        self._events = parts.events
        self._metrics = metrics
        self._configuration = configuration

    @stream(write_timeout_s=WRITE_TIMEOUT_S)
    async def SaveSnapshot(
        self, request: archive_pb2.SaveSnapshotRequest, context: Context
    ) -> AsyncGenerator[archive_pb2.Chunk, None]:
        records = tuple(self.state.snapshot())  # between two steps: nothing changes meanwhile
        content = await asyncio.to_thread(pack, records, cluster=self._cluster, saved_at_s=wall_s())
        for at in range(0, len(content), CHUNK_BYTES):
            yield archive_pb2.Chunk(content=content[at : at + CHUNK_BYTES])

    @unary
    async def RestoreSnapshot(
        self, request_iterator: AsyncIterator[archive_pb2.Chunk], context: Context
    ) -> archive_pb2.RestoreSnapshotResponse:
        content = bytearray()
        async for chunk in request_iterator:
            content += chunk.content
            if len(content) > ARCHIVE_BYTES_MAX:
                raise InputError(f"a snapshot has at most {ARCHIVE_BYTES_MAX // MIB} MiB")
        header, records = await asyncio.to_thread(unpack, bytes(content), cluster=self._cluster)
        now = self.state
        try:
            whole = list(restored(records, now.policy, epoch=now.epoch, next_serial=now.next_serial))
        except (KeyError, IndexError, AssertionError, ValueError) as error:
            raise InputError(f"the snapshot's records do not fit each other: {error!r}") from error
        seen = State.empty(now.policy)
        for record in whole:
            seen.apply(record)
        await self._engine.restore(whole)
        self.log.warning("snapshot restored", records=len(records), saved_at_s=header.saved_at_s)
        return archive_pb2.RestoreSnapshotResponse(
            records=len(records),
            jobs=len(seen.jobs),
            allocations=views.fleet_summary(seen).allocations,
            saved_at_s=header.saved_at_s,
        )

    @stream(write_timeout_s=WRITE_TIMEOUT_S)
    async def Inspect(
        self, request: archive_pb2.InspectRequest, context: Context
    ) -> AsyncGenerator[archive_pb2.InspectedFile, None]:
        state = self.state
        files: dict[str, bytes] = {
            "configuration.json": _json(self._configuration),
            "fleet.json": _json(views.fleet_summary(state)),
            "nodes.json": _json(views.node_states(state)),
            "jobs.json": _json(views.job_summaries(state)),
            "allocations.json": _json([_without_logs(one) for one in views.allocations(state, terminal=True)]),
            "events.json": _json(list(self._events.kept(0))),
            "metrics.txt": self._metrics(),
        }
        for name, content in files.items():
            for at in range(0, max(1, len(content)), CHUNK_BYTES):
                yield archive_pb2.InspectedFile(name=name, content=content[at : at + CHUNK_BYTES])


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1)


def _without_logs(allocation: object) -> object:
    """What a workload printed last may be anything."""
    report = getattr(allocation, "report", None)
    if report is None:
        return allocation
    assert isinstance(allocation, msgspec.Struct), "an Allocation"
    return msgspec.structs.replace(allocation, report=msgspec.structs.replace(report, log_tail=""))
