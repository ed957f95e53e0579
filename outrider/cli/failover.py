"""A fleet behind several addresses: each call goes to the controller that answered last, and on to the next where that
one is away or says that nobody leads.

Owns when a call may be made again: always where no controller can have begun it, else only what reads; and what is
watched whole is watched on. Looks like a channel to the generated stubs, which ask it for nothing but calls. Several
threads may call; a channel that was given up is closed with the rest, at the end.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import grpc

from outrider.errors import PeerError

PATIENCE_S: Final = 15.0  # a leader is replaced in about two seconds, Consul's own in eight
_CONNECT_S: Final = 2.0  # handshake and all: one that was stopped takes the connection and says nothing
_PAUSE_S: Final = 0.2
_CODE_METADATA: Final = "outrider-code"
_NOBODY_LEADS: Final = frozenset({"no-leader", "not-leader"})
NOT_BEGUN: Final = "RST_STREAM with error code 7"  # REFUSED_STREAM: a server with too many calls begins no more
_READS: Final = ("Get", "List", "Watch", "Read", "Check", "Inspect", "Explain")
_WHOLE: Final = "WatchJob"  # each answer says all of it: where it breaks off, another may go on

T = TypeVar("T")
Open = Callable[[str], grpc.Channel]  # raises PeerError where nobody is there


class FailoverChannel:
    """`targets` in the order in which they are asked at first. Use as a context, as a channel is."""

    def __init__(self, targets: tuple[str, ...], open_one: Open, *, patience_s: float = PATIENCE_S) -> None:
        self._targets, self._open, self._patience_s = targets, open_one, patience_s
        self._lock = threading.Lock()
        self._at = 0
        self._channels: dict[str, grpc.Channel] = {}
        self._given_up: list[grpc.Channel] = []

    def __enter__(self) -> grpc.Channel:
        return cast("grpc.Channel", self)

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            for channel in (*self._channels.values(), *self._given_up):
                channel.close()

    def unary_unary(self, path: str, *serializers: Any, **more: Any) -> Callable[..., Any]:
        def call(request: Any, timeout: float) -> Any:
            def once(channel: grpc.Channel) -> Any:
                return channel.unary_unary(path, *serializers, **more)(request, timeout=timeout)

            return self._ask(once, reads=_reads(path))

        return call

    def unary_stream(self, path: str, *serializers: Any, **more: Any) -> Callable[..., Any]:
        def call(request: Any, timeout: float) -> _Answers:
            deadline_s = time.monotonic() + timeout

            def once(channel: grpc.Channel) -> tuple[Any, Any]:
                left_s = max(0.1, deadline_s - time.monotonic())
                answers: Any = channel.unary_stream(path, *serializers, **more)(request, timeout=left_s)
                return answers, next(answers, None)

            def begin() -> tuple[Any, Any]:
                return self._ask(once, reads=_reads(path))

            def leave() -> None:
                self._leave(self._targets[self._at])

            return _Answers(begin, leave if path.endswith(f"/{_WHOLE}") else None)

        return call

    def stream_unary(self, path: str, *serializers: Any, **more: Any) -> Callable[..., Any]:
        """Requests that cannot be said twice go to whoever takes a connection, and nowhere else."""
        return lambda requests, timeout: self._ask(_itself, reads=True).stream_unary(path, *serializers, **more)(
            requests, timeout=timeout
        )

    def stream_stream(self, path: str, *serializers: Any, **more: Any) -> Callable[..., Any]:
        return lambda requests, timeout: self._ask(_itself, reads=True).stream_stream(path, *serializers, **more)(
            requests, timeout=timeout
        )

    def _ask(self, act: Callable[[grpc.Channel], T], *, reads: bool) -> T:
        """One controller after the other, until the patience ends: the last raises what it met."""
        deadline_s = time.monotonic() + self._patience_s
        while True:
            for _ in self._targets:
                target = self._targets[self._at]
                try:
                    return act(self._channel(target))
                except (grpc.RpcError, PeerError) as error:
                    if not (isinstance(error, PeerError) or _may_go_on(error, reads=reads)):
                        raise
                    self._leave(target)
                    if time.monotonic() > deadline_s:
                        raise
            time.sleep(_PAUSE_S)

    def _channel(self, target: str) -> grpc.Channel:
        with self._lock:
            if target in self._channels:
                return self._channels[target]
        channel = self._open(target)
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            channel.close()
            raise PeerError(f"{target}: no answer within {_CONNECT_S:g} s; is a controller running there?") from error
        with self._lock:
            return self._channels.setdefault(target, channel)

    def _leave(self, target: str) -> None:
        with self._lock:
            if self._targets[self._at] == target:
                self._at = (self._at + 1) % len(self._targets)
            if target in self._channels:
                self._given_up.append(self._channels.pop(target))


class _Answers:
    """Those of one stream; with `leave`, which gives up whoever broke off, those of the streams after it too."""

    def __init__(self, begin: Callable[[], tuple[Any, Any]], leave: Callable[[], None] | None) -> None:
        self._begin, self._leave = begin, leave
        self._answers, self._first = begin()

    def __iter__(self) -> "_Answers":
        return self

    def __next__(self) -> Any:
        while self._first is None:
            try:
                return next(self._answers)
            except (grpc.RpcError, StopIteration) as error:
                broke_off = isinstance(error, StopIteration) or _may_go_on(error, reads=True)
                if self._leave is None or not broke_off:
                    raise
                self._leave()
            time.sleep(_PAUSE_S)
            self._answers, self._first = self._begin()
        first, self._first = self._first, None
        return first

    def cancel(self) -> object:
        self._leave = None
        return self._answers.cancel()


def _itself(channel: grpc.Channel) -> grpc.Channel:
    return channel


def _reads(path: str) -> bool:
    return path.rpartition("/")[2].startswith(_READS)


def _may_go_on(error: grpc.RpcError, *, reads: bool) -> bool:
    """Whether the next controller may be asked: nobody began it, or it changes nothing."""
    call = cast("grpc.Call", cast("object", error))
    if call.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    code = {item[0]: item[1] for item in call.trailing_metadata() or ()}.get(_CODE_METADATA, "")
    details = call.details() or ""
    return reads or code in _NOBODY_LEADS or NOT_BEGUN in details or "failed to connect" in details.lower()
