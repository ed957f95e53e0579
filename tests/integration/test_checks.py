"""Health checks against servers that work, that fail, and that would like to take the agent down with them."""

import asyncio
import ctypes
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import hpack
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from agent.checks import OUTPUT_CHARS_MAX, CheckOutcome, CheckRunner
from agent.network.namespaces import AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.job import MIB, Check, CheckKind
from tests.integration.network_lab import NODE, SERVER_PORT, lab

ALLOC = AllocId("0a0a0a0a0a")
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
# An empty SETTINGS frame: all that a server must say before it answers.
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def on_loopback(_alloc: AllocId, kind: socket.SocketKind) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


async def no_command(command: tuple[str, ...]) -> tuple[int, str]:
    raise AssertionError(f"{command} was not to be run")


async def run(kind: CheckKind, port: int | None, *, path: str = "", timeout_s: float = 5.0) -> CheckOutcome:
    check = Check(kind=kind, path=path, timeout_s=timeout_s)
    outcome = await CheckRunner(open_socket=on_loopback).run(check, ALLOC, port, no_command)
    assert len(outcome.output) <= OUTPUT_CHARS_MAX
    assert all(character == "\n" or character.isprintable() for character in outcome.output)
    return outcome


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    """A server that says what `serve` says to each caller; gives its port."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass  # the check had enough
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def saying(data: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(data)
        await writer.drain()

    return serve


def staying(data: bytes) -> Serve:
    """Says it, and keeps the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await holding(reader, writer)

    return serve


def repeating(first: bytes, then: bytes) -> Serve:
    """Never ends, as fast as it is read."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(then * (64 * 1024 // len(then)))
            await writer.drain()

    return serve


async def holding(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Takes the question and says nothing."""
    while await reader.read(1024):
        pass


async def dripping(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A slow loris: a byte of a header now and then, so that the connection is never idle."""
    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("status", [200, 204, 302])
async def test_http_passes_on_success_and_redirects(status: int) -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(f"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()

    async with serving(serve) as port:
        assert await run(CheckKind.HTTP, port, path="/healthz?a=b") == CheckOutcome(
            passing=True, output=f"HTTP {status}"
        )
    assert asked[0].startswith(b"GET /healthz?a=b HTTP/1.1\r\nhost: localhost\r\n")


async def test_an_attempt_that_is_lost_does_not_keep_the_next_from_its_answer() -> None:
    opened = []

    def first_hears_nothing(_alloc: AllocId, kind: socket.SocketKind) -> socket.socket:
        made = socket.socket(socket.AF_INET, kind)
        if not opened:
            # <linux/filter.h>: a program of one instruction, to keep nothing of what comes.
            program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
            made.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
        opened.append(made)
        return made

    async with serving(saying(OK)) as port:
        check = Check(kind=CheckKind.HTTP, path="/", timeout_s=30.0)
        outcome = await CheckRunner(open_socket=first_hears_nothing).run(check, ALLOC, port, no_command)
    assert outcome == CheckOutcome(passing=True, output="HTTP 200")
    assert len(opened) > 1
    assert all(each.fileno() == -1 for each in opened), "closed, all of them"


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_http_fails_on_errors_and_says_what_the_server_said(status: int) -> None:
    answer = f"HTTP/1.1 {status} X\r\ncontent-length: 8\r\n\r\nno\x1b\x00 db\n".encode()
    async with serving(saying(answer)) as port:
        outcome = await run(CheckKind.HTTP, port)
    assert outcome == CheckOutcome(passing=False, output=f"HTTP {status}: no?? db\n")


async def test_a_long_refusal_is_cut() -> None:
    async with serving(repeating(b"HTTP/1.1 500 X\r\n\r\n", b"why " * 16)) as port:
        outcome = await run(CheckKind.HTTP, port)
    assert not outcome.passing
    assert outcome.output.startswith("HTTP 500: why why")
    assert outcome.output.endswith("...")


async def test_tcp_passes_where_somebody_listens_and_fails_where_nobody_does() -> None:
    async with serving(holding) as port:
        assert (await run(CheckKind.TCP, port)).passing
    for kind in (CheckKind.TCP, CheckKind.HTTP, CheckKind.GRPC):
        outcome = await run(kind, port)
        assert outcome == CheckOutcome(passing=False, output=f"127.0.0.1:{port}: Connection refused")


@pytest.mark.parametrize("kind", [CheckKind.TCP, CheckKind.HTTP, CheckKind.GRPC])
async def test_a_check_that_needs_a_port_says_that_it_has_none(kind: CheckKind) -> None:
    outcome = await run(kind, None)
    assert (outcome.passing, "no port" in outcome.output) == (False, True)


async def test_grpc_asks_the_standard_health_service() -> None:
    servicer = health.HealthServicer()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        await servicer.set("", HealthCheckResponse.SERVING)
        await servicer.set("shop.Cart", HealthCheckResponse.NOT_SERVING)
        assert await run(CheckKind.GRPC, port) == CheckOutcome(passing=True, output="SERVING")
        assert await run(CheckKind.GRPC, port, path="shop.Cart") == CheckOutcome(passing=False, output="NOT_SERVING")
        unknown = await run(CheckKind.GRPC, port, path="shop.Till")
        assert (unknown.passing, unknown.output.startswith("gRPC status 5")) == (False, True)
    finally:
        await server.stop(None)


async def test_a_grpc_server_without_the_health_service_fails() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        outcome = await run(CheckKind.GRPC, port)
    finally:
        await server.stop(None)
    assert (outcome.passing, outcome.output.startswith("gRPC status 12")) == (False, True)


@pytest.mark.parametrize(("code", "expected"), [(0, "fine"), (3, "exit 3: fine")])
async def test_a_command_passes_when_it_exits_with_0(code: int, expected: str) -> None:
    async def command(argv: tuple[str, ...]) -> tuple[int, str]:
        assert argv == ("redis-cli", "ping")
        return code, "fine"

    check = Check(kind=CheckKind.COMMAND, command=("redis-cli", "ping"))
    outcome = await CheckRunner(open_socket=on_loopback).run(check, ALLOC, None, command)
    assert outcome == CheckOutcome(passing=code == 0, output=expected)


async def test_a_command_that_hangs_or_cannot_start_fails() -> None:
    ended = asyncio.Event()

    async def hang(_command: tuple[str, ...]) -> tuple[int, str]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("never")

    async def absent(_command: tuple[str, ...]) -> tuple[int, str]:
        raise HostError("redis-cli", step="start it", hint="no such file")

    check = Check(kind=CheckKind.COMMAND, command=("redis-cli",), timeout_s=0.1)
    checks = CheckRunner(open_socket=on_loopback)
    assert "within 0.1 s" in (await checks.run(check, ALLOC, None, hang)).output
    assert ended.is_set()
    assert (await checks.run(check, ALLOC, None, absent)).output == "redis-cli: start it (no such file)"


def headers_frame(headers: list[tuple[str, str]]) -> bytes:
    block = hpack.Encoder().encode(headers)
    return len(block).to_bytes(3) + b"\x01\x04\0\0\0\x01" + block


HOSTILE: dict[str, Serve] = {
    "closes at once": saying(b""),
    "garbage": saying(b"\x16\x03\x01\x00\xff" + bytes(range(256)) * 4),
    "endless garbage": repeating(b"", bytes(range(256))),
    "endless headers": repeating(b"HTTP/1.1 200 OK\r\n", b"x: aaaaaaaaaaaaaaaaaaaaaaaaa\r\n"),
    "one endless header": repeating(b"HTTP/1.1 200 OK\r\nx: ", b"a" * 1024),
    "endless preliminary answers": repeating(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers cut short": saying(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "two lengths": saying(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
    "a status that is none": saying(b"HTTP/1.1 999999 OK\r\n\r\n"),
    "an HTTP/2 server with endless settings": repeating(SETTINGS, SETTINGS),
    "an HTTP/2 server with endless pings": repeating(SETTINGS, b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)),
    "an HTTP/2 server with endless header blocks": repeating(
        SETTINGS + b"\0\0\x04\x01\0\0\0\0\x01\x88\x88\x88\x88", b"\0\x01\0\x09\0\0\0\0\x01" + b"\x88" * 256
    ),
    "an HTTP/2 server with a bomb of headers": staying(
        SETTINGS + headers_frame([(":status", "200"), *[("a", "b" * 3900)] * 8000])
    ),
    "an HTTP/2 server with a frame too long": saying(SETTINGS + b"\xff\xff\xff\0\0\0\0\0\x01" + bytes(1000)),
    "a gRPC server with a message that is none": saying(
        SETTINGS
        + headers_frame([(":status", "200"), ("grpc-status", "0")])
        + b"\0\0\x0a\0\x01\0\0\0\x01"
        + b"\xff" * 10
    ),
}


@pytest.mark.parametrize("serve", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", [CheckKind.HTTP, CheckKind.GRPC])
async def test_a_hostile_server_fails_its_check_soon_and_that_is_all(kind: CheckKind, serve: Serve) -> None:
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    async with serving(serve) as port:
        outcome = await run(kind, port)
    assert not outcome.passing
    assert outcome.output
    assert "no answer within" not in outcome.output, "by the bound on bytes, not by the deadline"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes < 32 * MIB


@pytest.mark.parametrize("serve", [holding, dripping])
@pytest.mark.parametrize("kind", [CheckKind.HTTP, CheckKind.GRPC])
async def test_a_server_that_takes_its_time_fails_at_the_deadline(kind: CheckKind, serve: Serve) -> None:
    async with serving(serve) as port, asyncio.timeout(30):
        outcome = await run(kind, port, timeout_s=0.3)
    assert not outcome.passing
    if kind is CheckKind.HTTP:
        assert outcome.output == "no answer within 0.3 s"


async def test_a_body_without_end_passes_unread() -> None:
    async with serving(repeating(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1024))) as port:
        assert (await run(CheckKind.HTTP, port)).passing


async def test_a_path_that_is_none_fails_its_check() -> None:
    async with serving(saying(OK)) as port:
        outcome = await run(CheckKind.HTTP, port, path="/a b\r\nx: y")
    assert not outcome.passing


@pytest.mark.host
async def test_checks_reach_what_listens_inside_an_allocation(tmp_path: Path) -> None:
    with lab() as node:
        networks = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=9)
        address = next_address(9, ())
        assert address is not None
        network = await networks.create(
            NetworkSpec(
                alloc=ALLOC,
                local_address=address,
                host_side_address=gateway_address(9),
                sidecar_uid=500_000,
                workload_uids=(600_000, 65_536),
            )
        )
        node.serve_in(network.namespace, 600_000, ("127.0.0.1", 8080))
        checks = CheckRunner(open_socket=networks.open_socket)
        check = Check(kind=CheckKind.TCP, timeout_s=1)

        assert (await checks.run(check, ALLOC, 8080, no_command)).passing
        # The node itself listens at this one.
        assert not (await checks.run(check, ALLOC, SERVER_PORT, no_command)).passing
        gone = await checks.run(check, AllocId("0c0c0c0c0c"), 8080, no_command)
        assert (gone.passing, "0c0c0c0c0c" in gone.output) == (False, True)
        await networks.reap(())
        await networks.close()
