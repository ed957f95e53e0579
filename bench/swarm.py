"""Agents without hosts: real certificates, real streams, nothing behind them. Owns their tasks, one each.

Each does as a real agent does: greets, beats as often as it is told, takes up assignments and says that they run, and
dials again with the same pauses when its stream ends. `python -m bench.swarm CA CLUSTER TARGET FIRST COUNT` is one
process of many (`bench.swarms`): it obeys the words that `main` knows, a line each, until its input ends.
"""

import asyncio
import contextlib
import datetime as dt
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Self

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outrider import codec
from outrider.ids import NodeId
from outrider.model.allocation import AllocReport, AllocStatus, Assignment, Desired
from outrider.model.job import MIB
from outrider.model.node import Fingerprint, Node
from outrider.tls import CONTROLLER_NAME, Identity, IdentityKind
from outrider.v1 import allocation_pb2, fleet_pb2, fleet_pb2_grpc, node_pb2

SILENCE_S = 5.0
BACKOFF_S, BACKOFF_MAX_S = 0.05, 5.0
_GREETING_S = 20.0


class Swarm:
    """`async with`: all of them dial at once, and go on until the end of the block."""

    def __init__(self, ca: Path, cluster: str, target: str, numbers: range) -> None:
        self.echo_s: list[float] = []
        self.assigned_s: dict[str, float] = {}
        self._target, self._numbers, self._cluster = target, numbers, cluster
        self._ca_pem = (ca / "ca.crt").read_bytes()
        self._ca = x509.load_pem_x509_certificate(self._ca_pem)
        key = serialization.load_pem_private_key((ca / "ca.key").read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._ca_key = key
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for number in self._numbers:
            node = NodeId(f"s{number}")
            self._tasks.append(asyncio.create_task(self._live(node, self._credentials(node)), name=node))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _credentials(self, node: NodeId) -> grpc.ChannelCredentials:
        key = ec.generate_private_key(ec.SECP256R1())
        uri = Identity(kind=IdentityKind.NODE, name=node, cluster=self._cluster).uri
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
            .issuer_name(self._ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._ca_key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return grpc.ssl_channel_credentials(self._ca_pem, pem, certificate.public_bytes(serialization.Encoding.PEM))

    async def _live(self, node: NodeId, credentials: grpc.ChannelCredentials) -> None:
        failures = 0
        while True:
            began_s = time.monotonic()
            with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError, ConnectionError):
                await self._converse(node, credentials)
            failures = 0 if time.monotonic() - began_s > BACKOFF_MAX_S else failures + 1
            delay_s = min(BACKOFF_S * 2 ** min(failures, 10), BACKOFF_MAX_S)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _converse(self, node: NodeId, credentials: grpc.ChannelCredentials) -> None:
        options = (("grpc.ssl_target_name_override", CONTROLLER_NAME), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(self._target, credentials, options=options) as channel:
            stream = fleet_pb2_grpc.FleetServiceStub(channel).Session()  # type: ignore[call-arg]  # as `agent.fleet`
            async with asyncio.timeout(_GREETING_S):
                await stream.write(fleet_pb2.AgentMessage(hello=_hello(node)))
                welcome = await stream.read()
            if not isinstance(welcome, fleet_pb2.ControllerMessage):
                raise ConnectionError("not welcomed")
            await _Session(self, stream, welcome.welcome.heartbeat_interval_s).run()


class _Session:
    def __init__(
        self,
        swarm: Swarm,
        stream: "grpc.aio.StreamStreamCall[fleet_pb2.AgentMessage, fleet_pb2.ControllerMessage]",
        interval_s: float,
    ) -> None:
        self._swarm, self._stream, self._interval_s = swarm, stream, interval_s
        self._sent_s: dict[int, float] = {}
        self._outbox: list[fleet_pb2.AgentMessage] = []

    async def run(self) -> None:
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message = await self._stream.read()
                if not isinstance(message, fleet_pb2.ControllerMessage):
                    return
                self._take(message)
        finally:
            beating.cancel()
            self._stream.cancel()

    async def _beat(self) -> None:
        sequence = 0
        await asyncio.sleep(random.uniform(0, self._interval_s))  # noqa: S311 - spread
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `run` tells how it ended
            while True:
                sequence += 1
                self._sent_s[sequence] = time.monotonic()
                beat = fleet_pb2.Heartbeat(sequence=sequence)
                for message in (*self._outbox, fleet_pb2.AgentMessage(heartbeat=beat)):
                    await self._stream.write(message)
                self._outbox.clear()
                await asyncio.sleep(self._interval_s)

    def _take(self, message: fleet_pb2.ControllerMessage) -> None:
        match message.WhichOneof("message"):
            case "heartbeat":
                sent_s = self._sent_s.pop(message.heartbeat.sequence, None)
                if sent_s is not None:
                    self._swarm.echo_s.append(time.monotonic() - sent_s)
                self._interval_s = message.heartbeat.interval_s or self._interval_s
            case "assignments":
                now_s = time.monotonic()
                for alloc in message.assignments.assignments:
                    self._swarm.assigned_s.setdefault(alloc.alloc, now_s)
                self._answer(message.assignments)
            case _:
                pass

    def _answer(self, told: fleet_pb2.Assignments) -> None:
        """With the next heartbeat: it runs, or has stopped as asked."""
        reports = [_report(codec.from_wire(each, Assignment)) for each in told.assignments]
        if reports:
            wire = [codec.to_wire(report, allocation_pb2.AllocReport) for report in reports]
            self._outbox.append(fleet_pb2.AgentMessage(reports=fleet_pb2.Reports(reports=wire)))
        self._outbox.append(fleet_pb2.AgentMessage(applied=fleet_pb2.Applied(generation=told.generation)))


def _report(assignment: Assignment) -> AllocReport:
    stopped = assignment.desired is Desired.STOP
    return AllocReport(alloc=assignment.alloc, status=AllocStatus.COMPLETE if stopped else AllocStatus.RUNNING)


def _hello(node: NodeId) -> fleet_pb2.Hello:
    fingerprint = Fingerprint(
        cpu_millis=4000,
        memory_bytes=8192 * MIB,
        disk_bytes=100_000 * MIB,
        host_image=True,
        runtimes={"crun": "1", "conmon": "2"},
    )
    described = Node(id=node, address="127.0.0.1", fingerprint=fingerprint)
    return fleet_pb2.Hello(node=codec.to_wire(described, node_pb2.Node), protocol=1)


async def main(ca: str, cluster: str, target: str, first: str, count: str) -> None:
    """`clear` forgets the heartbeats' echoes, `count` tells how many assignments came, `tell` all that was measured."""
    words = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    async with Swarm(Path(ca), cluster, target, range(int(first), int(first) + int(count))) as swarm:
        while word := (await words.readline()).decode().strip():
            answer: object = len(swarm.assigned_s)
            if word == "clear":
                swarm.echo_s.clear()
            elif word == "tell":
                answer = [swarm.echo_s, list(swarm.assigned_s.values())]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(*sys.argv[1:]))
