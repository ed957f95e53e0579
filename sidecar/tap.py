"""Requests that a sidecar passes on, as Envoy's tap tells of them, made into values; what may be secret stays here."""

import contextlib
from collections.abc import AsyncGenerator
from datetime import datetime
from json import JSONDecodeError, JSONDecoder
from typing import Any

from outrider.errors import PeerError
from outrider.ids import AllocId
from outrider.model.insight import TappedCall, TappedHeader
from sidecar.admin import Admin
from sidecar.core.resources import Pair
from sidecar.render_listener import tap_id

_PENDING_CHARS_MAX = 1 << 20
_TEXT_CHARS_MAX = 256
# What a request is like without what it is about or who makes it.
_HARMLESS = frozenset({
    "accept", "accept-encoding", "cache-control", "connection", "content-encoding", "content-length", "content-type",
    "date", "grpc-status", "grpc-timeout", "host", "retry-after", "server", "te", "traceparent", "transfer-encoding",
    "user-agent", "vary", "x-forwarded-proto", "x-request-id",
})  # fmt: skip


async def tapped_calls(
    admin: Admin, alloc: AllocId, pair: Pair, *, scope: str, headers: bool
) -> AsyncGenerator[TappedCall, None]:
    """Until closed. Raises PeerError."""
    decoder, pending = JSONDecoder(), ""
    async with contextlib.aclosing(admin.tap(tap_id(*pair, scope))) as pieces:
        async for piece in pieces:
            pending = (pending + piece.decode(errors="replace")).lstrip()
            while pending:
                try:
                    trace, end = decoder.raw_decode(pending)
                except JSONDecodeError:
                    break  # the rest of it is on its way
                pending = pending[end:].lstrip()
                yield tapped_call(trace["http_buffered_trace"], alloc, pair, headers=headers)
            if len(pending) > _PENDING_CHARS_MAX:
                raise PeerError(f"sidecar of {alloc}: its Envoy tells of a request without end")


def tapped_call(trace: dict[str, Any], alloc: AllocId, pair: Pair, *, headers: bool) -> TappedCall:
    """`trace`: Envoy's envoy.data.tap.v3.HttpBufferedTrace."""
    request, response = trace.get("request", {}), trace.get("response", {})
    asked, answered = _pairs(request), _pairs(response)
    began_s, ended_s = _at_s(request), _at_s(response)
    status = dict(answered).get(":status", "0")
    path = dict(asked).get(":path", "")
    return TappedCall(
        at_s=began_s,
        alloc=alloc,
        source=pair[0],
        destination=pair[1],
        method=dict(asked).get(":method", "")[:16],
        # Queries hold secrets as headers do.
        path=(path if headers else path.partition("?")[0])[:_TEXT_CHARS_MAX],
        status=int(status) if status.isdigit() else 0,
        duration_ms=max(0.0, ended_s - began_s) * 1000 if ended_s else 0.0,
        request=_shown(asked, headers=headers),
        response=_shown(answered, headers=headers),
    )


def _pairs(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(header.get("key", "")), str(header.get("value", ""))) for header in message.get("headers", ())]


def _shown(pairs: list[tuple[str, str]], *, headers: bool) -> tuple[TappedHeader, ...]:
    return tuple(
        TappedHeader(name=name[:_TEXT_CHARS_MAX], value=value[:_TEXT_CHARS_MAX])
        if headers or name in _HARMLESS
        else TappedHeader(name=name[:_TEXT_CHARS_MAX], redacted=True)
        for name, value in pairs
        if not name.startswith(":")
    )


def _at_s(message: dict[str, Any]) -> float:
    """0.0 where there was none: the caller hung up before an answer."""
    text = message.get("headers_received_time", "")
    return datetime.fromisoformat(text).timestamp() if text else 0.0
