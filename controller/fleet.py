"""FleetService: the agents' sessions, leaves and tunnels. A node is who its certificate says, whatever a message says.

Tasks: two for each session (read, write) and two for each tunnel, in the call's own TaskGroup.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from controller.ca import FleetCa, requested_key
from controller.core import mesh_intent, pace, sealed
from controller.core.events import (
    AgentApplied,
    AgentConnected,
    AgentDisconnected,
    AgentReported,
    FiguresReported,
    FingerprintChanged,
    HeartbeatReceived,
)
from controller.parts import Parts
from controller.rpc import Context, Edge, duplex, unary, within, write
from controller.sessions import AgentSession
from controller.tunnels import Tunnel
from outrider import codec
from outrider.clock import monotonic_s
from outrider.config import host_port
from outrider.errors import InputError, OutriderError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.keys import key_sha256, peer_key_sha256
from outrider.log import Log
from outrider.model.allocation import AllocFigures, AllocReport, Generation
from outrider.model.fleet import answer_interval_s
from outrider.model.mesh import ObservedRefusal
from outrider.model.node import Fingerprint, Node
from outrider.tls import IdentityKind, peer_identity
from outrider.v1 import allocation_pb2, fleet_pb2, fleet_pb2_grpc, mesh_pb2

PROTOCOL = 1
HELLO_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
LEAF_TIMEOUT_S = 10.0
TUNNEL_WRITE_TIMEOUT_S = 60.0

_Message = TypeVar("_Message")


class FleetService(Edge, fleet_pb2_grpc.FleetServiceServicer):
    def __init__(self, parts: Parts, *, ca: FleetCa, trust: Callable[[], fleet_pb2.Trust]) -> None:
        super().__init__(log=Log("fleet"), refused=parts.refused)
        self._cluster = parts.cluster
        self._trust = trust
        self._ca = ca
        self._engine = parts.engine
        self._mesh = parts.mesh
        self._keyring = parts.keyring
        self._sessions = parts.sessions
        self._tunnels = parts.tunnels
        self._refusals = parts.refusals

    def authorize(self, context: Context, method: str, request: Any) -> None:
        self._node(context)

    @duplex
    async def Session(self, request_iterator: AsyncIterator[fleet_pb2.AgentMessage], context: Context) -> None:
        """One agent, from its Hello until either side ends it."""
        node_id = self._node(context)
        if not self._engine.acts:  # a welcome would tell the agent that it is not alone
            raise RefusedError("unavailable", "this controller cannot tell whether it leads: look for another")
        hello = await _first(request_iterator, "Hello")
        node, acknowledged, reports = self._greeted(node_id, hello)
        session = self._sessions.begin(node_id)
        self.log.info("session began", node=node_id, session=session.id, peer=context.peer())
        try:
            await self._engine.tell(
                AgentConnected(session=session.id, node=node, acknowledged=acknowledged, reports=reports)
            )
            # Not before: who is welcomed believes that it was heard, and what must never run twice runs on.
            session.send(self._welcome())
            if hello.hello.HasField("trusting"):
                session.trusting = hello.hello.trusting
                session.send(fleet_pb2.ControllerMessage(trust=self._trust()))
            self._sessions.deliver(node_id, self._mesh.full(node_id))
            await self._serve(session, request_iterator, context)
        finally:
            if self._sessions.finish(session):
                self._mesh.disconnected(node_id)
            self._engine.post(AgentDisconnected(session=session.id, node=node_id, reason=session.reason))
            self.log.info("session ended", node=node_id, session=session.id, reason=session.reason)
        if session.error is not None:
            raise session.error

    @unary
    async def IssueLeaf(self, request: fleet_pb2.IssueLeafRequest, context: Context) -> fleet_pb2.IssueLeafResponse:
        """The node authorizer: the journal places the service on the caller's node, or there is no leaf."""
        node, service = self._node(context), ServiceName(request.service)
        if not mesh_intent.may_hold_leaf(self._engine.state, node, service):
            raise RefusedError("denied", f"service {service[:80]!r} is not placed on node {node}")
        async with within(LEAF_TIMEOUT_S, f"a leaf for {service}"):
            leaf = await self._mesh.issue(service, request.csr_pem)
        return fleet_pb2.IssueLeafResponse(leaf=codec.to_wire(leaf, mesh_pb2.Leaf))

    @unary
    async def GetSecrets(self, request: fleet_pb2.GetSecretsRequest, context: Context) -> fleet_pb2.GetSecretsResponse:
        """The same authorizer: an allocation that is to run on the caller's node names them, or they are not told."""
        node, alloc = self._node(context), AllocId(request.alloc)
        found = sealed.held_by(self._engine.state, node, alloc)
        if found is None:
            raise RefusedError("denied", f"allocation {alloc[:80]!r} is not to run on node {node}")
        values = [
            fleet_pb2.SecretValue(name=put.name, version=put.version, value=self._keyring.open(put)) for put in found
        ]
        return fleet_pb2.GetSecretsResponse(secrets=values)

    @unary
    async def RenewCertificate(
        self, request: fleet_pb2.RenewCertificateRequest, context: Context
    ) -> fleet_pb2.RenewCertificateResponse:
        """For the caller's name and the caller's key alone: another key comes with another join."""
        node, csr_pem = self._node(context), request.csr_pem.encode()
        if key_sha256(requested_key(csr_pem)) != peer_key_sha256(context):
            raise RefusedError("denied", f"node {node} asks for another key than it shows; join again with a token")
        issued = await asyncio.to_thread(self._ca.issue_node, csr_pem, node)
        self.log.info("certificate renewed", node=node, serial=issued.serial)
        return fleet_pb2.RenewCertificateResponse(certificate_pem=issued.pem.decode())

    @duplex
    async def Tunnel(self, request_iterator: AsyncIterator[fleet_pb2.TunnelFrame], context: Context) -> None:
        """Ends when the operator's call does; that one ends when this one breaks off."""
        first = await _first(request_iterator, "a frame with the tunnel's id")
        tunnel = self._tunnels.claim(first.tunnel, self._node(context))
        try:
            async with asyncio.TaskGroup() as group:
                down = group.create_task(_read_tunnel(tunnel, request_iterator), name=f"tunnel-{tunnel.node}-read")
                up = group.create_task(_write_tunnel(tunnel, context), name=f"tunnel-{tunnel.node}-write")
                await tunnel.closed.wait()
                down.cancel()
                up.cancel()
        finally:
            tunnel.to_operator.close()

    def _node(self, context: Context) -> NodeId:
        identity = peer_identity(context)
        if identity is None or identity.kind is not IdentityKind.NODE or identity.cluster != self._cluster:
            shown = identity.uri if identity else "no certificate of a fleet"
            raise RefusedError("denied", f"only nodes of {self._cluster} may call this; the caller shows {shown}")
        node = NodeId(identity.name)
        revoked = self._engine.state.access.revoked_keys
        if revoked and revoked.get(peer_key_sha256(context)) == node:  # to read a key takes a while
            raise RefusedError("denied", f"the certificate of node {node} was revoked; it may join again with a token")
        return node

    def _greeted(
        self, node_id: NodeId, message: fleet_pb2.AgentMessage
    ) -> tuple[Node, Generation, tuple[AllocReport, ...]]:
        if not message.HasField("hello"):
            raise InputError(f"node {node_id}: the first message must be Hello")
        hello = message.hello
        if hello.protocol != PROTOCOL:
            raise RefusedError(
                "protocol",
                f"node {node_id} speaks protocol {hello.protocol}, this controller {PROTOCOL}: upgrade the older",
            )
        node = codec.from_wire(hello.node, Node)
        if node.id != node_id:
            raise RefusedError("denied", f"the certificate is node {node_id}'s and does not speak for {node.id[:80]!r}")
        _check_addresses(node)
        return node, codec.from_wire(hello.acknowledged, Generation), _reports(hello.reports)

    def _welcome(self) -> fleet_pb2.ControllerMessage:
        welcome = fleet_pb2.Welcome(
            cluster=self._cluster, heartbeat_interval_s=pace.heartbeat_interval_s(self._engine.state), protocol=PROTOCOL
        )
        return fleet_pb2.ControllerMessage(welcome=welcome)

    async def _serve(
        self, session: AgentSession, requests: AsyncIterator[fleet_pb2.AgentMessage], context: Context
    ) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(session, requests), name=f"session-{session.node}-read")
            writing = group.create_task(_write(session, context), name=f"session-{session.node}-write")
            await session.ended.wait()
            reading.cancel()
            writing.cancel()

    async def _read(self, session: AgentSession, requests: AsyncIterator[fleet_pb2.AgentMessage]) -> None:
        try:
            async for message in requests:
                await self._take(session, message)
        except OutriderError as error:
            session.end(error)
        session.end("the agent closed the stream")

    async def _take(self, session: AgentSession, message: fleet_pb2.AgentMessage) -> None:
        node, at = session.node, session.id
        match message.WhichOneof("message"):
            case "heartbeat":
                self._answer(session, message.heartbeat.sequence)
                self._engine.heartbeat(HeartbeatReceived(session=at, node=node))
            case "reports":
                reports = _reports(message.reports.reports)
                await self._engine.tell(AgentReported(session=at, node=node, reports=reports))
            case "applied":
                generation = codec.from_wire(message.applied.generation, Generation)
                await self._engine.tell(AgentApplied(session=at, node=node, generation=generation))
            case "mesh_applied":
                self._mesh.acknowledged(node, message.mesh_applied.version)
            case "fingerprint_changed":
                fingerprint = codec.from_wire(message.fingerprint_changed.fingerprint, Fingerprint)
                await self._engine.tell(FingerprintChanged(session=at, node=node, fingerprint=fingerprint))
            case "figures":
                figures = tuple(codec.from_wire(each, AllocFigures) for each in message.figures.figures)
                await self._engine.tell(FiguresReported(session=at, node=node, figures=figures))
            case "trusting":
                session.trusting = message.trusting
            case "refusals":
                observed = tuple(codec.from_wire(each, ObservedRefusal) for each in message.refusals.refusals)
                self._refusals.add(node, observed)
            case kind:
                raise InputError(f"node {node}: a session's message cannot be {kind or 'empty'}")

    def _answer(self, session: AgentSession, sequence: int) -> None:
        """A sign of life, now and then. None where another controller may lead: the agent looks for that one."""
        interval_s, now_s = pace.heartbeat_interval_s(self._engine.state), monotonic_s()
        # Half a heartbeat early: else every other answer would wait for the next.
        if self._engine.acts and now_s >= session.answered_s + answer_interval_s(interval_s) - interval_s / 2:
            session.answered_s = now_s
            echo = fleet_pb2.Heartbeat(sequence=sequence, interval_s=interval_s)
            session.send(fleet_pb2.ControllerMessage(heartbeat=echo))


async def _write(session: AgentSession, context: Context) -> None:
    try:
        while True:
            await write(context, await session.next(), WRITE_TIMEOUT_S)
    except OutriderError as error:
        session.end(error)


async def _read_tunnel(tunnel: Tunnel, requests: AsyncIterator[fleet_pb2.TunnelFrame]) -> None:
    async for frame in requests:
        await tunnel.to_operator.put(frame)
    tunnel.to_operator.close()


async def _write_tunnel(tunnel: Tunnel, context: Context) -> None:
    try:
        while (frame := await tunnel.to_agent.get()) is not None:
            await write(context, frame, TUNNEL_WRITE_TIMEOUT_S)
    except OutriderError:
        tunnel.to_operator.close()  # the operator is told that the node broke off


async def _first(requests: AsyncIterator[_Message], what: str) -> _Message:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            return await anext(requests)
    except (TimeoutError, StopAsyncIteration) as error:
        raise InputError(f"expected {what} within {HELLO_TIMEOUT_S:g} s") from error


def _reports(messages: Iterable[allocation_pb2.AllocReport]) -> tuple[AllocReport, ...]:
    return tuple(codec.from_wire(message, AllocReport) for message in messages)


def _check_addresses(node: Node) -> None:
    try:
        ipaddress.IPv4Address(node.address)
        if node.metrics_address:
            host_port(node.metrics_address)
    except ValueError as error:
        raise InputError(f"node {node.id}: {error}") from error
