"""A controller that does not lead: passes operators' calls and joins on to the leader, and tells agents who that is.

Holds no fleet state. Owns one channel to the present leader; tasks: one for each call that is passed on. Messages go
through as the bytes that they are. The leader judges the caller: the follower says who it is, and only a controller's
certificate makes that count.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, cast

import grpc
import grpc.aio

from controller.election import Election
from controller.rpc import (
    CALLER_METADATA,
    CODE_METADATA,
    LEADER_METADATA,
    PEER_METADATA,
    TOKEN_METADATA,
    Context,
)
from outrider.log import Log
from outrider.tls import Identity, IdentityKind, TlsFiles, channel, joining_channel, peer_identity

_PEOPLE: Final = (
    "/outrider.v1.OperatorService/",
    "/outrider.v1.StoreService/",
    "/outrider.v1.AccessService/",
    "/outrider.v1.ArchiveService/",
    "/outrider.v1.InsightService/",
)
_FLEET: Final = "/outrider.v1.FleetService/"
_JOIN: Final = "/outrider.v1.JoinService/"
_OPTIONS: Final = {
    "grpc.keepalive_time_ms": 2_000,
    "grpc.keepalive_timeout_ms": 1_000,
    "grpc.max_receive_message_length": -1,
}
_NOBODY: Final = "no controller leads at the moment: they are electing one; try again in a second"

_Behaviour = Callable[[AsyncIterator[bytes], Context], Any]


class Follower:
    def __init__(self, *, cluster: str, files: TlsFiles, election: Election, refused: Counter[str], log: Log) -> None:
        self._cluster, self._files, self._election = cluster, files, election
        self._refused, self._log = refused, log
        self._members: tuple[str, grpc.aio.Channel] | None = None
        self._joins: tuple[str, grpc.aio.Channel] | None = None

    def members(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """For the listener of operators and agents, and for the operator's socket."""
        return _Handlers({**dict.fromkeys(_PEOPLE, self._operate), _FLEET: self._redirect})

    def joins(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """For the listener without client certificates: users show tokens there, which the leader looks at."""
        return _Handlers({**dict.fromkeys(_PEOPLE, self._operate_by_token), _JOIN: self._join})

    async def close(self, *, grace_s: float | None = None) -> None:
        """Calls that are under way have so long. The next ones go by new connections, with what the files hold then."""
        kept, self._members, self._joins = (self._members, self._joins), None, None
        for each in kept:
            if each is not None:
                await each[1].close(grace=grace_s)

    async def _operate(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        caller = Identity(kind=IdentityKind.OPERATOR, name="cli", cluster=self._cluster)
        if not context.peer().startswith("unix:"):
            shown = peer_identity(context)
            if shown is None:
                await self._abort(context, grpc.StatusCode.PERMISSION_DENIED, "denied", "no certificate of a fleet")
                return
            caller = shown
        await self._pass_on(method, requests, context, ((CALLER_METADATA, caller.uri),))

    async def _operate_by_token(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        shown = dict(context.invocation_metadata() or ()).get(TOKEN_METADATA, "")
        await self._pass_on(method, requests, context, ((TOKEN_METADATA, str(shown)),))

    async def _pass_on(
        self,
        method: str,
        requests: AsyncIterator[bytes],
        context: Context,
        caller: tuple[tuple[str, str], ...],
    ) -> None:
        leader = self._election.leader
        if leader is None:
            await self._abort(context, grpc.StatusCode.UNAVAILABLE, "no-leader", _NOBODY)
            return
        if self._members is None or self._members[0] != leader.address:
            self._members = (leader.address, channel(leader.address, self._files, options=_OPTIONS))
        peer = context.peer()
        metadata = caller if peer.startswith("unix:") else (*caller, (PEER_METADATA, peer))
        await self._forward(self._members[1], method, requests, context, metadata)

    async def _join(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        leader = self._election.leader
        if leader is None:
            await self._abort(context, grpc.StatusCode.UNAVAILABLE, "no-leader", _NOBODY)
            return
        if self._joins is None or self._joins[0] != leader.join_address:
            self._joins = (leader.join_address, joining_channel(leader.join_address, self._files.ca))
        await self._forward(self._joins[1], method, requests, context, ())

    async def _redirect(self, _method: str, _requests: AsyncIterator[bytes], context: Context) -> None:
        leader = self._election.leader
        text = f"{leader.name} at {leader.address} leads" if leader is not None else _NOBODY
        address = leader.address if leader is not None else ""
        await self._abort(context, grpc.StatusCode.UNAVAILABLE, "not-leader", text, ((LEADER_METADATA, address),))

    async def _forward(
        self,
        to: grpc.aio.Channel,
        method: str,
        requests: AsyncIterator[bytes],
        context: Context,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        call = to.stream_stream(method)(  # type: ignore[call-arg]  # without serializers: the bytes as they are
            requests, metadata=metadata, timeout=context.time_remaining()
        )
        try:
            async for response in call:
                await context.write(response)
        except grpc.aio.AioRpcError as error:
            trailing = dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
            trailing.setdefault(CODE_METADATA, "unavailable")
            await context.abort(error.code(), error.details() or "", trailing_metadata=tuple(trailing.items()))
        finally:
            call.cancel()

    async def _abort(
        self,
        context: Context,
        status: grpc.StatusCode,
        code: str,
        text: str,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._refused[code] += 1
        await context.abort(status, text, trailing_metadata=((CODE_METADATA, code), *metadata))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
    """Every method of a service, by the service's prefix, as streams of bytes."""

    def __init__(self, services: dict[str, Callable[[str, AsyncIterator[bytes], Context], Any]]) -> None:
        self._services = services

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        method = str(handler_call_details.method)
        for prefix, behaviour in self._services.items():
            if method.startswith(prefix):
                return grpc.stream_stream_rpc_method_handler(_bound(behaviour, method))
        return None


def _bound(behaviour: Callable[[str, AsyncIterator[bytes], Context], Any], method: str) -> _Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> None:
        await behaviour(method, requests, context)

    return call
