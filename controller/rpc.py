"""What the controller's gRPC edges share: listeners' options, and errors as statuses with a stable code.

Owns no service and no socket.
"""

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio

from outrider.errors import InputError, OutriderError, PeerError, RefusedError
from outrider.log import Log
from outrider.tls import Identity, IdentityKind, parse_identity, peer_identity

CODE_METADATA = "outrider-code"
LEADER_METADATA = "outrider-leader"  # where the leader listens, from a controller that does not lead
CALLER_METADATA = "outrider-caller"  # for whom a controller passes a call on
PEER_METADATA = "outrider-peer"  # and from which address
TOKEN_METADATA = "authorization"  # noqa: S105 - a header, "Bearer TOKEN"
REQUEST_BYTES_MAX = 16 * 1024 * 1024

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")
_Stream = Callable[[Any, Request, Context], AsyncGenerator[Response, None]]

# Keepalive: both ends notice a silent peer within seconds; a client that pings faster is cut off.
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

_STATUS = {
    "not-found": grpc.StatusCode.NOT_FOUND,
    "denied": grpc.StatusCode.PERMISSION_DENIED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "too-many-calls": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "quota": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "bad-token": grpc.StatusCode.UNAUTHENTICATED,
    "bad-csr": grpc.StatusCode.INVALID_ARGUMENT,
    "ambiguous": grpc.StatusCode.INVALID_ARGUMENT,
    "conflict": grpc.StatusCode.ABORTED,
    "slow-listener": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too-many-listeners": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too-many-tunnels": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too-many-attempts": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Edge:
    """A service's base: who may call, and what became of the calls that were refused."""

    def __init__(self, *, log: Log, refused: Counter[str]) -> None:
        self.log = log
        self.refused = refused  # by code; shared by all services

    def authorize(self, context: Context, method: str, request: Any) -> None:
        """Raises RefusedError where the caller may not. `request`: an iterator where the caller sends a stream."""
        raise NotImplementedError

    async def admit(self) -> None:
        """Waits until answers are good. Raises OutriderError where they will not be."""

    def concluded(self, method: str, failure: OutriderError | None) -> None:
        """The call ended: well, or with `failure`. May raise OutriderError: then the caller is told that instead."""

    def _conclude(self, method: str, failure: OutriderError | None) -> OutriderError | None:
        try:
            self.concluded(method, failure)
        except OutriderError as error:
            self.log.warning("call not recorded", method=method, reason=str(error))
            return error
        return failure

    async def abort(self, context: Context, error: OutriderError) -> NoReturn:
        """End the call with what `error` says."""
        status, code = _meaning(error)
        self.refused[code] += 1
        self.log.info("call refused", peer=context.peer(), code=code, message=str(error))
        await context.abort(status, str(error), trailing_metadata=((CODE_METADATA, code),))


def caller(context: Context) -> Identity | None:
    """Who calls; where a controller passes the call on, whoever called that one. None: no certificate of a fleet."""
    identity = peer_identity(context)
    if identity is None or identity.kind is not IdentityKind.CONTROLLER:
        return identity
    named = dict(context.invocation_metadata() or ()).get(CALLER_METADATA, "")
    passed_on = parse_identity(named if isinstance(named, str) else named.decode(errors="replace"))
    return passed_on if passed_on is not None and passed_on.cluster == identity.cluster else identity


def unary(
    method: Callable[[Any, Request, Context], Awaitable[Response]],
) -> Callable[[Any, Request, Context], Awaitable[Response]]:
    """A unary method of an Edge: errors become statuses."""

    @functools.wraps(method)
    async def call(self: Edge, request: Request, context: Context) -> Response:
        failure: OutriderError | None = None
        try:
            self.authorize(context, method.__name__, request)
            await self.admit()
            response = await method(self, request, context)
        except OutriderError as error:
            failure = error
        failure = self._conclude(method.__name__, failure)
        if failure is not None:
            await self.abort(context, failure)
        return response

    return call


def stream(*, write_timeout_s: float) -> Callable[[_Stream[Request, Response]], _Stream[Request, Response]]:
    """A method that answers with a stream. A caller that takes nothing for `write_timeout_s` is ended as too slow."""

    def decorate(method: _Stream[Request, Response]) -> _Stream[Request, Response]:
        @functools.wraps(method)
        async def call(self: Edge, request: Request, context: Context) -> None:
            async with contextlib.aclosing(method(self, request, context)) as responses:
                async for response in responses:
                    await write(context, response, write_timeout_s)

        return duplex(call)

    return decorate


def duplex(
    method: Callable[[Any, Request, Context], Awaitable[None]],
) -> Callable[[Any, Request, Context], AsyncGenerator[Any, None]]:
    """A method that writes its answers itself."""

    @functools.wraps(method)
    async def call(self: Edge, request: Request, context: Context) -> None:
        failure: OutriderError | None = None
        try:
            self.authorize(context, method.__name__, request)
            await self.admit()
            await method(self, request, context)
        except OutriderError as error:
            failure = error
        failure = self._conclude(method.__name__, failure)
        if failure is not None:
            await self.abort(context, failure)

    # A coroutine, where the stubs expect a generator: when the caller hangs up, its clean-up runs at once.
    return cast("Callable[[Any, Request, Context], AsyncGenerator[Any, None]]", call)


@contextlib.asynccontextmanager
async def within(timeout_s: float, what: str) -> AsyncIterator[None]:
    """A deadline for an answer of the mesh or of a caller. Raises PeerError, which says `what` did not come."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise PeerError(f"{what}: no answer within {timeout_s:g} s; try again") from error


async def write(context: Context, response: object, timeout_s: float) -> None:
    """Raises RefusedError("slow-listener") where the caller takes nothing for so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(response)
    except TimeoutError as error:
        raise RefusedError("slow-listener", f"nothing was taken for {timeout_s:g} s") from error


def _meaning(error: OutriderError) -> tuple[grpc.StatusCode, str]:
    match error:
        case RefusedError():
            return _STATUS.get(error.code, grpc.StatusCode.FAILED_PRECONDITION), error.code
        case InputError():
            return grpc.StatusCode.INVALID_ARGUMENT, "bad-input"
        case PeerError():
            return grpc.StatusCode.UNAVAILABLE, "unavailable"
        case _:
            return grpc.StatusCode.INTERNAL, "internal"
