"""The session with the controller: dials, greets, listens, reports, and dials again.

Owns the conversation alone: what is wanted goes to `FleetListener`, what is true comes from it. Tasks: `run`,
which reads, and one for each session that writes. Nothing queues up: what is not yet sent is one newest
report and figure for each allocation, the newest of each acknowledgement, and at most REFUSALS_MAX refusals. A new
session's Hello says it all anew.
"""

import asyncio
import contextlib
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import grpc
import grpc.aio

from agent.belongings.secrets import Secrets, SecretValue
from agent.trust import Trusting
from outrider import codec
from outrider.clock import monotonic_s, uptime_s
from outrider.errors import InputError, OutriderError, PeerError
from outrider.ids import AllocId, SecretName, ServiceName
from outrider.log import Log, set_level
from outrider.model.allocation import AllocFigures, AllocReport, Assignment, Generation
from outrider.model.fleet import answer_interval_s
from outrider.model.job import Value
from outrider.model.mesh import Leaf, MeshUpdate, ObservedRefusal
from outrider.model.node import Fingerprint, Node
from outrider.tls import TlsFiles, channel
from outrider.v1 import allocation_pb2, fleet_pb2, fleet_pb2_grpc, mesh_pb2, node_pb2

PROTOCOL = 1
REFUSALS_MAX = 64
_GREETING_S, _GREETING_MAX_S = 5.0, 20.0  # to connect and be welcomed; longer each time that it was too short
_SILENCE_S = 2.0  # the controller answers heartbeats now and then; without any message for so long it is away
_WRITE_S = 5.0
_INTERVAL_MIN_S = 0.05
_SECRETS_S = 10.0
_LEAF_S = 12.0  # the controller allows itself 10
_BACKOFF_S, _BACKOFF_MAX_S = 0.05, 5.0
_REDIRECTS_MAX = 3  # in a row without a pause: controllers may disagree while they elect one
_LEADER_METADATA = "outrider-leader"
_PROBE_SEQUENCE = 0  # a heartbeat that answers none: the controller wants a sign of life at once
# A dead connection must not keep its socket: the heartbeats notice it earlier.
_OPTIONS = {"grpc.keepalive_time_ms": 5_000, "grpc.keepalive_timeout_ms": 2_000, "grpc.max_receive_message_length": -1}

_Stream = grpc.aio.StreamStreamCall[fleet_pb2.AgentMessage, fleet_pb2.ControllerMessage]
TunnelStream = grpc.aio.StreamStreamCall[fleet_pb2.TunnelFrame, fleet_pb2.TunnelFrame]


class Greeting(Value, frozen=True, kw_only=True):
    """The whole truth of this node, for Hello."""

    node: Node
    acknowledged: Generation
    reports: tuple[AllocReport, ...]
    trusting: Trusting | None = None  # None: it is told nothing of the fleet's CA


class Wish(Value, frozen=True, kw_only=True):
    """Assignments as they came."""

    generation: Generation
    full: bool
    assignments: tuple[Assignment, ...]
    removed: tuple[AllocId, ...]


class FleetListener(Protocol):
    """Who takes what the controller says. None of it may wait for the controller."""

    def greeting(self) -> Greeting: ...
    async def heard(self, at_s: float) -> None: ...
    async def assigned(self, wish: Wish) -> None: ...
    def mesh_changed(self, update: MeshUpdate) -> None: ...
    def trust_told(self, roots_pem: tuple[str, ...], issuer_sha256: str) -> None: ...
    def tunnel_wanted(self, request: fleet_pb2.OpenTunnel) -> None: ...


class _Outbox:
    """What waits to be sent: the newest of each kind."""

    def __init__(self) -> None:
        self.reports: dict[AllocId, AllocReport] = {}
        self.applied: Generation | None = None
        self.mesh_applied: int | None = None
        self.fingerprint: Fingerprint | None = None
        self.figures: dict[AllocId, AllocFigures] = {}
        self.refusals: deque[ObservedRefusal] = deque(maxlen=REFUSALS_MAX)
        self.trusting: Trusting | None = None

    def messages(self) -> Iterator[fleet_pb2.AgentMessage]:
        """Reports come before what acknowledges them."""
        if self.reports:
            reports = [codec.to_wire(report, allocation_pb2.AllocReport) for report in self.reports.values()]
            yield fleet_pb2.AgentMessage(reports=fleet_pb2.Reports(reports=reports))
        if self.fingerprint is not None:
            fingerprint = codec.to_wire(self.fingerprint, node_pb2.Fingerprint)
            yield fleet_pb2.AgentMessage(fingerprint_changed=fleet_pb2.FingerprintChanged(fingerprint=fingerprint))
        if self.applied is not None:
            generation = codec.to_wire(self.applied, allocation_pb2.Generation)
            yield fleet_pb2.AgentMessage(applied=fleet_pb2.Applied(generation=generation))
        if self.mesh_applied is not None:
            yield fleet_pb2.AgentMessage(mesh_applied=fleet_pb2.MeshApplied(version=self.mesh_applied))
        if self.figures:
            figures = [codec.to_wire(each, allocation_pb2.AllocFigures) for each in self.figures.values()]
            yield fleet_pb2.AgentMessage(figures=fleet_pb2.Figures(figures=figures))
        if self.trusting is not None:
            yield fleet_pb2.AgentMessage(trusting=_trusting(self.trusting))
        if self.refusals:
            refusals = [codec.to_wire(refusal, mesh_pb2.ObservedRefusal) for refusal in self.refusals]
            yield fleet_pb2.AgentMessage(refusals=fleet_pb2.Refusals(refusals=refusals))


class FleetSession:
    def __init__(
        self, *, controllers: Sequence[str], tls: TlsFiles, listener: FleetListener, log: Log, rng: random.Random
    ) -> None:
        self._controllers = itertools.cycle(controllers)
        self._tls = tls
        self._listener = listener
        self._log = log
        self._rng = rng
        self._stub: fleet_pb2_grpc.FleetServiceAsyncStub | None = None
        self._welcomed = False  # in the present or the last session
        self._wake = asyncio.Event()
        self._probed = False
        self._beats_s: dict[int, float] = {}  # when a heartbeat was sent that is not answered yet
        self._interval_s = 1.0  # between heartbeats; the controller says it
        self._outbox = _Outbox()

    @property
    def connected(self) -> bool:
        return self._stub is not None

    async def run(self) -> None:
        """For ever: a session, and after it another. With the controller away everything on the node runs on."""
        failures, late, leader = 0, 0, ""
        task = asyncio.current_task()
        # Python 3.11's TaskGroup drops a cancellation that comes together with an error: ask for it by hand.
        while task is not None and not task.cancelling():
            began_s, controller = monotonic_s(), leader or next(self._controllers)
            leader, greeting_s = "", min(_GREETING_S * (1 + late), _GREETING_MAX_S)
            try:
                await self._converse(controller, greeting_s)
            except* (OutriderError, grpc.RpcError, TimeoutError) as group:
                reason = "; ".join(_reason(error) for error in _all_of(group))
                leader = next((told for error in _all_of(group) if (told := _leader(error))), "")
                self._log.warning("session ended", controller=controller, reason=reason)
            if leader and failures < _REDIRECTS_MAX:
                failures += 1
                continue
            lived_s = monotonic_s() - began_s
            # A controller to which a whole fleet returns gets to everybody only where they wait for it.
            late = late + 1 if not self._welcomed and lived_s >= greeting_s else 0
            failures = 0 if self._welcomed and lived_s > _BACKOFF_MAX_S else failures + 1
            delay_s = min(_BACKOFF_S * 2 ** min(failures, 10), _BACKOFF_MAX_S)
            await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))

    def report(self, report: AllocReport) -> None:
        self._outbox.reports[report.alloc] = report
        self._wake.set()

    def applied(self, generation: Generation) -> None:
        self._outbox.applied = generation
        self._wake.set()

    def mesh_applied(self, version: int) -> None:
        self._outbox.mesh_applied = version
        self._wake.set()

    def fingerprint_changed(self, fingerprint: Fingerprint) -> None:
        self._outbox.fingerprint = fingerprint
        self._wake.set()

    def measured(self, figures: Iterable[AllocFigures]) -> None:
        """Older ones of the same allocations, not sent yet, are left out."""
        self._outbox.figures.update({each.alloc: each for each in figures})
        self._wake.set()

    def trusts(self, trusting: Trusting) -> None:
        self._outbox.trusting = trusting
        self._wake.set()

    def refused(self, refusal: ObservedRefusal) -> None:
        """Beyond REFUSALS_MAX the oldest are left out."""
        self._outbox.refusals.append(refusal)
        self._wake.set()

    async def issue_leaf(self, service: ServiceName, csr_pem: str) -> Leaf:
        """Raises PeerError where the controller is away or says no."""
        if self._stub is None:
            raise PeerError(f"leaf of {service}: no controller is connected")
        request = fleet_pb2.IssueLeafRequest(service=service, csr_pem=csr_pem)
        try:
            response = await self._stub.IssueLeaf(request, timeout=_LEAF_S)
        except grpc.RpcError as error:
            raise PeerError(f"leaf of {service}: {_reason(error)}") from error
        return codec.from_wire(response.leaf, Leaf)

    async def secrets(self, alloc: AllocId) -> Secrets:
        """Raises PeerError where the controller is away or says no."""
        if self._stub is None:
            raise PeerError("none is connected")
        try:
            response = await self._stub.GetSecrets(fleet_pb2.GetSecretsRequest(alloc=alloc), timeout=_SECRETS_S)
        except grpc.RpcError as error:
            raise PeerError(_reason(error)) from error
        return {
            SecretName(secret.name): SecretValue(version=secret.version, content=secret.value)
            for secret in response.secrets
        }

    async def renew_certificate(self, csr_pem: str) -> str:
        """The node's certificate anew. Raises PeerError where the controller is away or says no."""
        if self._stub is None:
            raise PeerError("certificate: no controller is connected")
        try:
            request = fleet_pb2.RenewCertificateRequest(csr_pem=csr_pem)
            return (await self._stub.RenewCertificate(request, timeout=_LEAF_S)).certificate_pem
        except grpc.RpcError as error:
            raise PeerError(f"certificate: {_reason(error)}") from error

    def open_tunnel(self) -> TunnelStream:
        """Raises PeerError where no controller is connected."""
        if self._stub is None:
            raise PeerError("no controller is connected")
        return self._stub.Tunnel()  # type: ignore[call-arg]  # as above

    async def _converse(self, controller: str, greeting_s: float) -> None:
        self._welcomed = False
        async with channel(controller, self._tls, options=_OPTIONS) as connection:
            stub = fleet_pb2_grpc.FleetServiceStub(connection)
            stream: _Stream = stub.Session()  # type: ignore[call-arg]  # grpc-stubs knows only the call with an iterator
            try:
                async with asyncio.timeout(greeting_s):
                    self._interval_s = await self._greet(stream)
                self._stub, self._welcomed = stub, True
                self._log.info("session began", controller=controller)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write(stream), name="fleet-write")
                    await self._read(stream)
            finally:
                self._stub = None
                stream.cancel()

    async def _greet(self, stream: _Stream) -> float:
        """The heartbeat interval, in seconds."""
        greeting = self._listener.greeting()
        self._outbox = _Outbox()  # all of it is in the greeting
        sent_s = uptime_s()
        hello = fleet_pb2.Hello(
            node=codec.to_wire(greeting.node, node_pb2.Node),
            acknowledged=codec.to_wire(greeting.acknowledged, allocation_pb2.Generation),
            reports=[codec.to_wire(report, allocation_pb2.AllocReport) for report in greeting.reports],
            protocol=PROTOCOL,
            trusting=_trusting(greeting.trusting) if greeting.trusting is not None else None,
        )
        await stream.write(fleet_pb2.AgentMessage(hello=hello))
        message = await stream.read()
        if not isinstance(message, fleet_pb2.ControllerMessage):
            raise PeerError(f"not welcomed: {await stream.details() or 'the stream ended'}")
        if message.WhichOneof("message") != "welcome" or message.welcome.protocol != PROTOCOL:
            raise PeerError(f"expected Welcome of protocol {PROTOCOL}: controller and agent are of different versions")
        await self._listener.heard(sent_s)
        return max(message.welcome.heartbeat_interval_s, _INTERVAL_MIN_S)

    async def _read(self, stream: _Stream) -> None:
        while True:
            silence_s = max(_SILENCE_S, 2 * answer_interval_s(self._interval_s) + 0.2)
            try:
                async with asyncio.timeout(silence_s):
                    message = await stream.read()
            except TimeoutError as error:
                raise PeerError(f"no message for {silence_s:g} s, heartbeats unanswered") from error
            if not isinstance(message, fleet_pb2.ControllerMessage):
                raise PeerError(f"closed by the controller: {await stream.details() or 'without a reason'}")
            await self._take(message)

    async def _take(self, message: fleet_pb2.ControllerMessage) -> None:
        match message.WhichOneof("message"):
            case "heartbeat":
                if message.heartbeat.interval_s > 0:
                    self._interval_s = max(message.heartbeat.interval_s, _INTERVAL_MIN_S)
                # What was sent before the answered one was heard too, or never will be.
                for sequence in [sent for sent in self._beats_s if sent < message.heartbeat.sequence]:
                    del self._beats_s[sequence]
                if (sent_s := self._beats_s.pop(message.heartbeat.sequence, None)) is not None:
                    await self._listener.heard(sent_s)
                if message.heartbeat.sequence == _PROBE_SEQUENCE:
                    self._probed = True
                    self._wake.set()
            case "assignments":
                await self._listener.assigned(_wish(message.assignments))
            case "mesh_update":
                self._listener.mesh_changed(codec.from_wire(message.mesh_update, MeshUpdate))
            case "trust":
                self._listener.trust_told(tuple(message.trust.roots_pem), message.trust.issuer_sha256)
            case "open_tunnel":
                self._listener.tunnel_wanted(message.open_tunnel)
            case "log_level":
                set_level(message.log_level)
                self._log.warning("log level set", level=message.log_level)
            case kind:
                raise InputError(f"the controller sent {kind or 'an unknown message'}: it may be of a newer version")

    async def _write(self, stream: _Stream) -> None:
        """One writer: what is pending as soon as it is, a heartbeat when one is due."""
        beat_at_s = monotonic_s() + self._interval_s
        self._beats_s = {}
        for sequence in itertools.count(1):
            while monotonic_s() < beat_at_s and not self._probed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_at_s - monotonic_s()):
                        await self._wake.wait()
                self._wake.clear()
                pending, self._outbox = self._outbox, _Outbox()
                for message in pending.messages():
                    await _send(stream, message)
            self._probed = False
            self._beats_s[sequence] = uptime_s()
            beat_at_s = monotonic_s() + self._interval_s
            await _send(stream, fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(sequence=sequence)))


async def _send(stream: _Stream, message: fleet_pb2.AgentMessage) -> None:
    try:
        async with asyncio.timeout(_WRITE_S):
            await stream.write(message)
    except TimeoutError as error:
        raise PeerError(f"took no message for {_WRITE_S:g} s") from error
    except asyncio.InvalidStateError as error:  # the call ended, and its reader has yet to hear of it
        raise PeerError("ended while a message was written") from error


def _trusting(trusting: Trusting) -> fleet_pb2.Trusting:
    return fleet_pb2.Trusting(roots_sha256=trusting.roots_sha256, issuer_sha256=trusting.issuer_sha256)


def _wish(message: fleet_pb2.Assignments) -> Wish:
    return Wish(
        generation=codec.from_wire(message.generation, Generation),
        full=message.full,
        assignments=tuple(codec.from_wire(each, Assignment) for each in message.assignments),
        removed=tuple(AllocId(alloc) for alloc in message.removed),
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error) or type(error).__name__


def _leader(error: BaseException) -> str:
    """Where the leader is, if that is what the controller said: it follows itself."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return ""
    return str(dict(cast("Iterable[tuple[str, str]]", error.trailing_metadata() or ())).get(_LEADER_METADATA, ""))


def _all_of(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _all_of(error)
        else:
            yield error
