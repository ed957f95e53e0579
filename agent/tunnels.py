"""Serves logs, exec calls and questions about the mesh: each OpenTunnel becomes one Tunnel stream, and ends with it.

Tasks: one for each tunnel and, within, one for each direction; at most TUNNELS_MAX tunnels, what comes beyond is
refused on the session's log. Nothing queues up: what is slow to take slows what gives.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Protocol, Self

import grpc
import grpc.aio

from agent.fleet import TunnelStream
from outrider import codec
from outrider.errors import OutriderError
from outrider.ids import AllocId, TaskName
from outrider.log import Log
from outrider.model.belongings import Volume
from outrider.v1.fleet_pb2 import (
    ExecRequest,
    LogsRequest,
    LogStream,
    OpenTunnel,
    TunnelEnd,
    TunnelFrame,
    VmCommand,
    VolumeOperation,
    VolumeRequest,
)
from outrider.v1.insight_pb2 import MeshAnswer, MeshQuery

TUNNELS_MAX = 64
_WRITE_S = 60.0  # a person who pauses the output


class Process(Protocol):
    """As agent.sandbox.exec has it."""

    async def read(self) -> tuple[str, bytes] | None: ...
    async def write(self, data: bytes) -> None: ...
    def close_stdin(self) -> None: ...
    def resize(self, rows: int, columns: int) -> None: ...
    def kill(self) -> None: ...
    async def wait(self) -> int: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...


class Sources(Protocol):
    """What tunnels carry. All raise OutriderError in words for the caller."""

    async def exec(
        self, alloc: AllocId, task: TaskName, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Process: ...

    async def console(self, alloc: AllocId, task: TaskName) -> Process:
        """The serial line of a vm: it ends with the emulator, or with the operator's input."""
        ...

    async def vm(self, alloc: AllocId, command: VmCommand) -> Process:
        """What is done with a guest, or with the node's snapshots of guests."""
        ...

    async def volume(self, operation: str, volume: Volume, snapshot: str) -> int:
        """How many bytes of this node's disk what it made takes."""
        ...

    def logs(
        self, alloc: AllocId, task: TaskName, *, streams: frozenset[str], tail_lines: int, follow: bool
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Pieces as (stream, bytes)."""
        ...


class Insight(Protocol):
    """What is known of the node's sidecars. Raises OutriderError in words for the caller."""

    def answers(self, query: MeshQuery) -> AsyncGenerator[MeshAnswer, None]: ...


class Tunnels:
    def __init__(self, *, sources: Sources, insight: Insight, dial: Callable[[], TunnelStream], log: Log) -> None:
        """`dial` raises PeerError where no controller is connected."""
        self._sources = sources
        self._insight = insight
        self._dial = dial
        self._log = log
        self._open = 0

    def open(self, request: OpenTunnel, tasks: asyncio.TaskGroup) -> None:
        if self._open >= TUNNELS_MAX:
            self._log.warning("tunnel refused", tunnel=request.tunnel, reason=f"{TUNNELS_MAX} are open")
            return
        tasks.create_task(self._serve(request), name=f"tunnel-{request.WhichOneof('request')}")

    async def _serve(self, request: OpenTunnel) -> None:
        self._open += 1
        try:
            stream = self._dial()
            try:
                await _write(stream, TunnelFrame(tunnel=request.tunnel))
                if request.WhichOneof("request") == "logs":
                    await _converse(stream, self._logs(request.logs, stream))
                elif request.WhichOneof("request") == "volume":
                    await _converse(stream, self._volume(request.volume, stream))
                elif request.WhichOneof("request") == "mesh":
                    await _converse(stream, self._mesh(request.mesh, stream))
                else:
                    await self._exec(request.exec, stream)
            finally:
                stream.cancel()
        except* (OutriderError, grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as group:
            reasons = "; ".join(str(error) or type(error).__name__ for error in group.exceptions)
            self._log.info("tunnel broke off", tunnel=request.tunnel, reason=reasons)
        finally:
            self._open -= 1

    async def _logs(self, request: LogsRequest, stream: TunnelStream) -> TunnelEnd:
        pieces = self._sources.logs(
            AllocId(request.alloc),
            TaskName(request.task),
            streams=_streams(request.stream),
            tail_lines=request.tail_lines,
            follow=request.follow,
        )
        async for name, data in pieces:
            await _write(stream, _output(name, data))
        return TunnelEnd()

    async def _volume(self, request: VolumeRequest, stream: TunnelStream) -> TunnelEnd:
        volume = codec.from_wire(request.volume, Volume)
        name = VolumeOperation.Name(request.operation).removeprefix("VOLUME_OPERATION_")
        taken = await self._sources.volume(name.lower(), volume, request.snapshot)
        await _write(stream, TunnelFrame(stdout=str(taken).encode()))
        return TunnelEnd()

    async def _mesh(self, query: MeshQuery, stream: TunnelStream) -> TunnelEnd:
        async with contextlib.aclosing(self._insight.answers(query)) as answers:
            async for answer in answers:
                await _write(stream, TunnelFrame(mesh=answer))
        return TunnelEnd()

    async def _exec(self, request: ExecRequest, stream: TunnelStream) -> None:
        try:
            started = await self._start(request)
        except OutriderError as error:
            await _converse(stream, _failed(error))
            return
        async with started as process:  # killed where the call breaks off
            await _converse(stream, _output_of(process, stream), process)

    async def _start(self, request: ExecRequest) -> Process:
        alloc, task = AllocId(request.alloc), TaskName(request.task)
        if request.HasField("vm"):
            return await self._sources.vm(alloc, request.vm)
        if request.console:
            return await self._sources.console(alloc, task)
        rows, columns = request.rows or 24, request.columns or 80
        return await self._sources.exec(
            alloc, task, tuple(request.command), tty=request.tty, rows=rows, columns=columns
        )


async def _converse(
    stream: TunnelStream, work: Coroutine[None, None, TunnelEnd], process: Process | None = None
) -> None:
    """Says how `work` ended; what the operator types goes to `process`. Work ends early where the operator hangs up.

    The reading is never cancelled: grpc.aio would end the whole call with it, and `end` would not arrive.
    """

    async def speak() -> None:
        try:
            end = await work
        except OutriderError as error:
            end = TunnelEnd(exit_code=1, error=str(error))
        await _write(stream, TunnelFrame(end=end))
        await stream.done_writing()

    async with asyncio.TaskGroup() as group:
        speaking = group.create_task(speak(), name="tunnel-speak")
        while isinstance(frame := await stream.read(), TunnelFrame):  # until the controller ends the call
            if process is not None:
                await _feed(process, frame)
        speaking.cancel()


async def _failed(error: OutriderError) -> TunnelEnd:
    raise error


async def _output_of(process: Process, stream: TunnelStream) -> TunnelEnd:
    while (piece := await process.read()) is not None:
        await _write(stream, _output(*piece))
    return TunnelEnd(exit_code=await process.wait())


async def _feed(process: Process, frame: TunnelFrame) -> None:
    match frame.WhichOneof("frame"):
        case "stdin":
            await process.write(frame.stdin)
        case "stdin_closed":
            process.close_stdin()
        case "resize":
            process.resize(frame.resize.rows, frame.resize.columns)
        case _:
            pass


def _streams(stream: int) -> frozenset[str]:
    if stream == LogStream.LOG_STREAM_STDOUT:
        return frozenset({"stdout"})
    return frozenset({"stderr"}) if stream == LogStream.LOG_STREAM_STDERR else frozenset({"stdout", "stderr"})


def _output(name: str, data: bytes) -> TunnelFrame:
    return TunnelFrame(stdout=data) if name == "stdout" else TunnelFrame(stderr=data)


async def _write(stream: TunnelStream, frame: TunnelFrame) -> None:
    async with asyncio.timeout(_WRITE_S):
        await stream.write(frame)
