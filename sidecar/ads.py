"""The gRPC server that all of a node's Envoys speak to: delta ADS, and access logs of refusals.

One server on one unix socket. Who calls is told by a token in the first message, and gets its own configuration and
nothing else. Tasks: per ADS stream a reader and a writer. Queues: none; the writer is level-triggered.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from outrider.ids import AllocId
from outrider.log import Log
from sidecar.bootstrap import TOKEN_KEY
from sidecar.core.resources import Kind
from sidecar.core.subscription import Rejection, Request, Response, Subscription, Versions
from sidecar.render import KINDS, TYPE_URLS

_REQUEST_BYTES_MAX = 1 << 20
_STOP_GRACE_S = 0.2
_RBAC_DETAILS = "rbac_access_denied_matched_policy["
_log = Log("sidecar.ads")


class Client(Protocol):
    """One sidecar, as the server sees it."""

    name: AllocId
    rendered: Mapping[Kind, Mapping[str, discovery_pb2.Resource]]
    versions: Versions
    complete: bool  # nothing is sent before: an Envoy that starts with half a configuration serves half of it

    def connected(self, stream: "Stream") -> None: ...
    def disconnected(self, stream: "Stream") -> None: ...
    def answered(self, rejection: Rejection | None) -> None: ...
    def kept(self, name: str) -> bool: ...  # a resource that nobody speaks of for now
    def whose(self, log: str) -> AllocId: ...  # a log of refusals, by its name


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One ADS stream: what its Envoy has, and the bell to ring when there is something new for it."""

    subscription: Subscription
    changed: asyncio.Event


Identify = Callable[[str], Client | None]
Refused = Callable[[AllocId, str, str], None]  # allocation, source's SPIFFE id, policy


class AdsServer:
    """`identify` maps a token to its sidecar; `refused` takes each refusal that an Envoy reports."""

    def __init__(self, *, socket: Path, identify: Identify, refused: Refused) -> None:
        self._socket, self._identify, self._refused = socket, identify, refused
        self._server: grpc.aio.Server | None = None
        self.tokens_refused = 0
        self.resources_sent = 0

    async def start(self) -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", _REQUEST_BYTES_MAX)])
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(_Discovery(self), server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(_AccessLogs(self), server)
        server.add_insecure_port(f"unix:{self._socket}")
        await server.start()
        # Reached through each sidecar's own directory, which only that sidecar's user may enter.
        self._socket.chmod(0o666)
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)

    async def client(self, node: base_pb2.Node, context: Any) -> Client:
        """The sidecar whose token `node` carries; ends the call where it is nobody's."""
        client = self._identify(_token(node))
        if client is None:
            self.tokens_refused += 1
            _log.warning("token refused", claims_to_be=node.id, refused_total=self.tokens_refused)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token names no sidecar of this node")
            raise AssertionError("abort raises")
        return client

    def report(self, alloc: AllocId, common: accesslog_pb2.AccessLogCommon, details: str) -> None:
        if not details.startswith(_RBAC_DETAILS):
            return
        names = common.tls_properties.peer_certificate_properties.subject_alt_name
        source = next((name.uri for name in names if name.uri), "")
        self._refused(alloc, source, details.removeprefix(_RBAC_DETAILS).rstrip("]"))


class _Discovery(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]  # untyped
    def __init__(self, server: AdsServer) -> None:
        self._server = server

    async def DeltaAggregatedResources(self, requests: AsyncIterator[Any], context: Any) -> None:  # noqa: N802
        first = await anext(requests, None)
        if first is None:
            return
        client = await self._server.client(first.node, context)
        stream = Stream(Subscription(client.kept), asyncio.Event())
        client.connected(stream)
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(client, stream, context), name=f"ads-writer-{client.name}")
                _receive(client, stream, first)
                async for message in requests:
                    _receive(client, stream, message)
                writer.cancel()
        finally:
            client.disconnected(stream)

    async def _write(self, client: Client, stream: Stream, context: Any) -> None:
        while True:
            await stream.changed.wait()
            stream.changed.clear()
            if not client.complete:
                continue
            for response in stream.subscription.responses(client.versions):
                self._server.resources_sent += len(response.changed)
                await context.write(_message(client, response))


class _AccessLogs(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]  # untyped
    def __init__(self, server: AdsServer) -> None:
        self._server = server

    async def StreamAccessLogs(self, messages: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        alloc: AllocId | None = None
        async for message in messages:
            if alloc is None:  # the first message says who speaks, and in which log
                client = await self._server.client(message.identifier.node, context)
                alloc = client.whose(message.identifier.log_name)
            for entry in message.http_logs.log_entry:
                self._server.report(alloc, entry.common_properties, entry.response.response_code_details)
            for entry in message.tcp_logs.log_entry:
                common = entry.common_properties
                self._server.report(alloc, common, common.connection_termination_details)
        return als_pb2.StreamAccessLogsResponse()


def _receive(client: Client, stream: Stream, message: discovery_pb2.DeltaDiscoveryRequest) -> None:
    kind = KINDS.get(message.type_url)
    if kind is None:
        return  # a type nobody told it to ask for; nothing to give
    rejection = stream.subscription.receive(
        Request(
            kind=kind,
            subscribe=tuple(message.resource_names_subscribe),
            unsubscribe=tuple(message.resource_names_unsubscribe),
            versions=dict(message.initial_resource_versions),
            nonce=message.response_nonce,
            error=message.error_detail.message if message.HasField("error_detail") else "",
        )
    )
    if rejection is not None:
        _log.error(
            "configuration refused",
            sidecar=client.name,
            kind=rejection.kind,
            names=rejection.names,
            why=rejection.error,
        )
    stream.changed.set()
    client.answered(rejection)


def _message(client: Client, response: Response) -> discovery_pb2.DeltaDiscoveryResponse:
    rendered = client.rendered.get(response.kind, {})
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=TYPE_URLS[response.kind],
        nonce=response.nonce,
        # A name that went between the decision and here is told by the next response.
        resources=[rendered[name] for name in response.changed if name in rendered],
        removed_resources=response.removed,
    )


def _token(node: base_pb2.Node) -> str:
    value = node.metadata.fields.get(TOKEN_KEY)
    return value.string_value if value is not None else ""
