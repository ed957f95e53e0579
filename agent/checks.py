"""Runs one health check of one allocation: http, tcp, grpc, command. When it runs, and what follows, is core's matter.

Everything goes through a socket opened inside the allocation's namespace (docs/adr/0002). The workload may be broken
or hostile: time, bytes read and the words passed on are bounded, and whatever it says becomes an outcome. No queues,
nothing kept between checks. Tasks: attempts to connect, a few at most, which end with their check.
"""

import asyncio
import os
import socket
import string
from collections.abc import Awaitable, Callable
from typing import assert_never

import h2.events
import h11
from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import H2Error

from outrider.errors import OutriderError
from outrider.ids import AllocId
from outrider.model.job import Check, CheckKind, Value

OUTPUT_CHARS_MAX = 500
_ADDRESS = "127.0.0.1"  # the workload's own, as seen from inside its namespace
# Small, because parsing the worst 4 KiB that a workload can say takes 4 ms of the agent's loop.
_READ_BYTES = 4 * 1024
_ANSWER_BYTES_MAX = 32 * 1024  # of one check, headers and all
_HEADER_BYTES_MAX = 16 * 1024
_BODY_BYTES_MAX = 2 * 1024  # of a refusal: why, for people
_ENDED = "the connection ended before an answer"
_GRPC_PREFIX_BYTES = 5  # compressed or not, and the message's length
_PRINTABLE = frozenset(string.printable) - frozenset("\x0b\x0c\r")

_AGAIN_S, _ATTEMPTS_MAX = 0.2, 5

OpenSocket = Callable[[AllocId, socket.SocketKind], socket.socket]
ExecCommand = Callable[[tuple[str, ...]], Awaitable[tuple[int, str]]]


class CheckOutcome(Value, frozen=True, kw_only=True):
    passing: bool
    output: str = ""  # printable, at most OUTPUT_CHARS_MAX


class _AnswerError(Exception):
    """The workload's answer is none."""


class CheckRunner:
    """Runs any number of checks at once."""

    def __init__(self, *, open_socket: OpenSocket) -> None:
        self._open_socket = open_socket

    async def run(
        self, check: Check, alloc: AllocId, port: int | None, exec_command: ExecCommand, *, address: str = _ADDRESS
    ) -> CheckOutcome:
        """The outcome, within the check's timeout. `address` is the workload's, inside. `exec_command` runs in the
        workload: its exit code and what it said, of a length that its author bounds."""
        try:
            async with asyncio.timeout(check.timeout_s):
                outcome = await self._run(check, alloc, port, exec_command, address)
        except TimeoutError:
            outcome = CheckOutcome(passing=False, output=f"no answer within {check.timeout_s:g} s")
        except OSError as error:
            outcome = CheckOutcome(passing=False, output=f"{address}:{port}: {_reason(error)}")
        except (_AnswerError, OutriderError) as error:
            outcome = CheckOutcome(passing=False, output=str(error))
        return CheckOutcome(passing=outcome.passing, output=_printable(outcome.output))

    async def _run(
        self, check: Check, alloc: AllocId, port: int | None, exec_command: ExecCommand, address: str
    ) -> CheckOutcome:
        if check.kind is CheckKind.COMMAND:
            code, output = await exec_command(check.command)
            return CheckOutcome(passing=code == 0, output=output if code == 0 else f"exit {code}: {output}")
        if port is None:
            return CheckOutcome(passing=False, output=f"the {check.kind} check's service has no port")
        with await self._connected(alloc, address, port) as opened:
            match check.kind:
                case CheckKind.TCP:
                    return CheckOutcome(passing=True, output="connected")
                case CheckKind.HTTP:
                    return await _http(_Bounded(opened), check.path)
                case CheckKind.GRPC:
                    return await _grpc(_Bounded(opened), check.path)
                case _:
                    assert_never(check.kind)

    async def _connected(self, alloc: AllocId, address: str, port: int) -> socket.socket:
        """The first attempt that is answered. Raises OSError where that says no.

        What is sent to a guest before it has its address is lost, and TCP waits a second until it sends it again.
        """
        loop = asyncio.get_running_loop()
        attempts: dict[asyncio.Task[None], socket.socket] = {}
        try:
            while True:
                if len(attempts) < _ATTEMPTS_MAX:
                    opened = self._open_socket(alloc, socket.SOCK_STREAM)
                    opened.setblocking(False)
                    connecting = loop.sock_connect(opened, (address, port))
                    attempts[loop.create_task(connecting, name=f"{alloc}-check")] = opened
                done, _ = await asyncio.wait(attempts, timeout=_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    first = done.pop()
                    first.result()
                    return attempts.pop(first)
        finally:
            for attempt in attempts:
                attempt.cancel()
            if attempts:
                await asyncio.wait(attempts)
            for opened in attempts.values():
                opened.close()


class _Bounded:
    """A connected socket from which no more than _ANSWER_BYTES_MAX are read."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._left = _ANSWER_BYTES_MAX

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self) -> bytes:
        """What came; b"" at the end. Raises _AnswerError where it goes on for too long."""
        if self._left <= 0:
            raise _AnswerError(f"the answer goes on after {_ANSWER_BYTES_MAX} bytes")
        data = await asyncio.get_running_loop().sock_recv(self._socket, min(_READ_BYTES, self._left))
        self._left -= len(data)
        return data


async def _http(peer: _Bounded, path: str) -> CheckOutcome:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES_MAX)
    headers = [("host", "localhost"), ("user-agent", "outrider-check"), ("accept", "*/*"), ("connection", "close")]
    try:
        request = http.send(h11.Request(method="GET", target=path or "/", headers=headers))
        assert request is not None, "a request is bytes to send"
        await peer.send(request)
        response = await _next_response(http, peer)
        if 200 <= response.status_code < 400:
            return CheckOutcome(passing=True, output=f"HTTP {response.status_code}")
        body = await _body_start(http, peer)
    except h11.ProtocolError as error:
        raise _AnswerError(f"HTTP: {error}") from error
    return CheckOutcome(passing=False, output=f"HTTP {response.status_code}: {body.decode(errors='replace')}")


async def _next_response(http: h11.Connection, peer: _Bounded) -> h11.Response:
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await peer.receive()
            if not data:
                raise _AnswerError(_ENDED)
            http.receive_data(data)
        elif isinstance(event, h11.Response):
            return event


async def _body_start(http: h11.Connection, peer: _Bounded) -> bytes:
    body = b""
    while len(body) < _BODY_BYTES_MAX:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await peer.receive())
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        else:
            break
    return body[:_BODY_BYTES_MAX]


async def _grpc(peer: _Bounded, service: str) -> CheckOutcome:
    """`grpc.health.v1.Health/Check`, as https://github.com/grpc/grpc/blob/master/doc/health-checking.md has it."""
    http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    http.initiate_connection()
    stream = http.get_next_available_stream_id()
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "outrider-check"),
    ]
    message = HealthCheckRequest(service=service).SerializeToString()
    http.send_headers(stream, headers)
    http.send_data(stream, b"\0" + len(message).to_bytes(4) + message, end_stream=True)
    try:
        return await _grpc_answer(http, peer)
    except (H2Error, ValueError) as error:
        raise _AnswerError(f"gRPC: {error}") from error


async def _grpc_answer(http: H2Connection, peer: _Bounded) -> CheckOutcome:
    body, headers = b"", dict[str, str]()
    while True:
        await peer.send(http.data_to_send())
        data = await peer.receive()
        if not data:
            raise _AnswerError(_ENDED)
        for event in http.receive_data(data):
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    headers.update((str(name), str(value)) for name, value in event.headers or ())
                case h2.events.DataReceived():
                    body += event.data or b""
                case h2.events.StreamEnded():
                    return _grpc_outcome(headers, body)
                case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                    raise _AnswerError(f"the server ended the call: HTTP/2 error {event.error_code}")
                case _:
                    pass  # settings, pings, window updates: h2 answers them itself


def _grpc_outcome(headers: dict[str, str], body: bytes) -> CheckOutcome:
    if headers.get(":status") != "200":
        return CheckOutcome(passing=False, output=f"HTTP {headers.get(':status', 'without a status')}, not gRPC")
    code = headers.get("grpc-status", "none")
    if code != "0":
        return CheckOutcome(passing=False, output=f"gRPC status {code}: {headers.get('grpc-message', '')}")
    try:
        answer = HealthCheckResponse.FromString(body[_GRPC_PREFIX_BYTES:])
    except DecodeError as error:
        raise _AnswerError("not gRPC: the answer is no HealthCheckResponse") from error
    number = answer.status
    names = {
        value.number: value.name for value in HealthCheckResponse.DESCRIPTOR.enum_types_by_name["ServingStatus"].values
    }
    return CheckOutcome(passing=number == HealthCheckResponse.SERVING, output=names.get(number, f"status {number}"))


def _reason(error: OSError) -> str:
    # asyncio puts words of its own in place of the system's.
    return os.strerror(error.errno) if error.errno else str(error)


def _printable(text: str) -> str:
    shown = "".join(character if character in _PRINTABLE or ord(character) > 159 else "?" for character in text)
    return shown if len(shown) <= OUTPUT_CHARS_MAX else shown[: OUTPUT_CHARS_MAX - 3] + "..."
