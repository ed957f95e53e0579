"""Serves logs and exec calls: each OpenTunnel becomes one Tunnel stream, and ends with it.

Tasks: one for each tunnel and, within, one for each direction; at most TUNNELS_MAX tunnels, what comes beyond is
refused on the session's log. Nothing queues up: what is slow to take slows what gives.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Protocol, Self

import grpc
import grpc.aio

from agent.fleet import TunnelStream
from outrider.errors import OutriderError
from outrider.ids import AllocId, TaskName
from outrider.log import Log
from outrider.v1.fleet_pb2 import ExecRequest, LogsRequest, LogStream, OpenTunnel, TunnelEnd, TunnelFrame

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
    """What tunnels carry. Both raise OutriderError in words for the caller."""

    async def exec(
        self, alloc: AllocId, task: TaskName, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Process: ...

    def logs(
        self, alloc: AllocId, task: TaskName, *, streams: frozenset[str], tail_lines: int, follow: bool
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Pieces as (stream, bytes)."""
        ...


class Tunnels:
    def __init__(self, *, sources: Sources, dial: Callable[[], TunnelStream], log: Log) -> None:
        """`dial` raises PeerError where no controller is connected."""
        self._sources = sources
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
                await _write(stream, TunnelFrame(end=await self._carry(request, stream)))
                await stream.done_writing()
            finally:
                stream.cancel()
        except (OutriderError, grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
            self._log.info("tunnel broke off", tunnel=request.tunnel, reason=str(error) or type(error).__name__)
        finally:
            self._open -= 1

    async def _carry(self, request: OpenTunnel, stream: TunnelStream) -> TunnelEnd:
        try:
            if request.WhichOneof("request") == "logs":
                return await self._logs(request.logs, stream)
            return await self._exec(request.exec, stream)
        except OutriderError as error:
            return TunnelEnd(exit_code=1, error=str(error))

    async def _logs(self, request: LogsRequest, stream: TunnelStream) -> TunnelEnd:
        pieces = self._sources.logs(
            AllocId(request.alloc),
            TaskName(request.task),
            streams=_streams(request.stream),
            tail_lines=request.tail_lines,
            follow=request.follow,
        )

        async def forward() -> None:
            async for name, data in pieces:
                await _write(stream, _output(name, data))

        await _until_hung_up(forward(), stream)
        return TunnelEnd()

    async def _exec(self, request: ExecRequest, stream: TunnelStream) -> TunnelEnd:
        started = await self._sources.exec(
            AllocId(request.alloc),
            TaskName(request.task),
            tuple(request.command),
            tty=request.tty,
            rows=request.rows or 24,
            columns=request.columns or 80,
        )
        async with started as process, asyncio.TaskGroup() as group:  # killed where the call breaks off
            feeding = group.create_task(_feed(process, stream), name="tunnel-stdin")
            while (piece := await process.read()) is not None:
                await _write(stream, _output(*piece))
            code = await process.wait()
            feeding.cancel()
        return TunnelEnd(exit_code=code)


async def _feed(process: Process, stream: TunnelStream) -> None:
    """What the operator types, until the stream ends; then the program ends too."""
    while isinstance(frame := await stream.read(), TunnelFrame):
        match frame.WhichOneof("frame"):
            case "stdin":
                await process.write(frame.stdin)
            case "stdin_closed":
                process.close_stdin()
            case "resize":
                process.resize(frame.resize.rows, frame.resize.columns)
            case _:
                pass
    process.kill()


async def _until_hung_up(work: Coroutine[None, None, None], stream: TunnelStream) -> None:
    async with asyncio.TaskGroup() as group:
        working = group.create_task(work, name="tunnel-forward")
        watching = group.create_task(_hang_up(stream, working), name="tunnel-watch")
        await asyncio.wait({working})
        watching.cancel()


async def _hang_up(stream: TunnelStream, working: asyncio.Task[None]) -> None:
    while isinstance(await stream.read(), TunnelFrame):
        pass
    working.cancel()


def _streams(stream: int) -> frozenset[str]:
    if stream == LogStream.LOG_STREAM_STDOUT:
        return frozenset({"stdout"})
    return frozenset({"stderr"}) if stream == LogStream.LOG_STREAM_STDERR else frozenset({"stdout", "stderr"})


def _output(name: str, data: bytes) -> TunnelFrame:
    return TunnelFrame(stdout=data) if name == "stdout" else TunnelFrame(stderr=data)


async def _write(stream: TunnelStream, frame: TunnelFrame) -> None:
    async with asyncio.timeout(_WRITE_S):
        await stream.write(frame)
