"""What the controller's gRPC edges share: listeners' options, and errors as statuses with a stable code.

Owns no service and no socket.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio

from outrider.errors import InputError, OutriderError, PeerError, RefusedError
from outrider.log import Log

CODE_METADATA = "outrider-code"
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


async def abort(context: Context, error: OutriderError, log: Log) -> NoReturn:
    """End the call with what `error` says."""
    status, code = _meaning(error)
    log.info("call refused", peer=context.peer(), code=code, message=str(error))
    await context.abort(status, str(error), trailing_metadata=((CODE_METADATA, code),))


def unary(
    method: Callable[[Any, Request, Context], Awaitable[Response]],
) -> Callable[[Any, Request, Context], Awaitable[Response]]:
    """A unary method of a service that has `authorize(context)` and `log`: errors become statuses."""

    @functools.wraps(method)
    async def call(self: Any, request: Request, context: Context) -> Response:
        try:
            self.authorize(context)
            return await method(self, request, context)
        except OutriderError as error:
            await abort(context, error, self.log)

    return call


def stream(*, write_timeout_s: float) -> Callable[[_Stream[Request, Response]], _Stream[Request, Response]]:
    """The same for a method that answers with a stream. A caller that takes nothing for so long is a slow listener."""

    def decorate(method: _Stream[Request, Response]) -> _Stream[Request, Response]:
        @functools.wraps(method)
        async def call(self: Any, request: Request, context: Context) -> None:
            try:
                self.authorize(context)
                async with contextlib.aclosing(method(self, request, context)) as responses:
                    async for response in responses:
                        await _write(context, response, write_timeout_s)
            except OutriderError as error:
                await abort(context, error, self.log)

        # A coroutine that writes, where the stubs expect a generator: when the caller hangs up, its clean-up runs at once.
        return cast("_Stream[Request, Response]", call)

    return decorate


async def _write(context: Context, response: object, timeout_s: float) -> None:
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
