"""Agents without hosts: real certificates, real streams over `bench.wire`, nothing behind them. Owns one loop for all.

Each does as a real agent does: greets, beats as often as it is told, takes up assignments and says that they run, and
dials again with the same pauses when its stream ends. `python -m bench.swarm CA CLUSTER TARGET FIRST COUNT` is one
process of several (`bench.swarms`): it obeys the words that `_obey` knows, a line each, until its input ends.
"""

import datetime as dt
import heapq
import itertools
import json
import os
import random
import resource
import select
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bench.wire import EndedError, Wire
from outrider import codec
from outrider.config import host_port
from outrider.ids import NodeId
from outrider.model.fleet import answer_interval_s
from outrider.model.job import MIB
from outrider.model.node import Fingerprint, Node
from outrider.tls import CONTROLLER_NAME, Identity, IdentityKind
from outrider.v1 import allocation_pb2, fleet_pb2, node_pb2

# As `agent.fleet`.
SILENCE_S = 2.0
GREETING_S, GREETING_MAX_S = 5.0, 20.0
BACKOFF_S, BACKOFF_MAX_S = 0.05, 5.0

# Of one process: thousands of handshakes share a core here, which real agents do not, and none would end in time.
GREETINGS_MAX = 200

_METHOD = "/outrider.v1.FleetService/Session"
_STDIN = 0
_ACTS_MAX = 50  # in a row: then those are heard that have spoken


class Issuer:
    """Certificates of nodes, from the fleet's own CA. One key for all: who they are is in the certificate."""

    def __init__(self, ca: Path, cluster: str) -> None:
        self._ca_pem = (ca / "ca.crt").read_text()
        self._ca = x509.load_pem_x509_certificate(self._ca_pem.encode())
        key = serialization.load_pem_private_key((ca / "ca.key").read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._ca_key, self._cluster = key, cluster
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def context(self, node: NodeId) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self._ca_pem)
        context.set_alpn_protocols(["h2"])
        file = os.memfd_create(node)
        try:
            os.write(file, self._certificate(node).public_bytes(serialization.Encoding.PEM) + self._key_pem)
            context.load_cert_chain(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
        return context

    def _certificate(self, node: NodeId) -> x509.Certificate:
        uri = Identity(kind=IdentityKind.NODE, name=node, cluster=self._cluster).uri
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
            .issuer_name(self._ca.subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._ca_key, hashes.SHA256())
        )


class Agent:
    """One conversation after the other. At `due_s` it has something to do, whatever it hears until then."""

    def __init__(self, swarm: "Swarm", node: NodeId) -> None:
        self.due_s = 0.0
        self.wire: Wire | None = None
        self.polled: tuple[int, int] | None = None  # its file, and for what
        self._swarm, self._node = swarm, node
        self._context: ssl.SSLContext | None = None
        self._failures = self._late = 0
        self._dialled_s = 0.0
        self._silent_at_s = 0.0
        self._interval_s = 0.0  # 0: not welcomed yet
        self._sequence = 0
        self._sent_s: dict[int, float] = {}
        self._outbox: list[fleet_pb2.AgentMessage] = []

    def act(self, now_s: float) -> None:
        """It is `due_s`. Raises EndedError."""
        if self.wire is None and len(self._swarm.greeting) >= GREETINGS_MAX:
            self._swarm.plan(self, now_s + BACKOFF_S)
        elif self.wire is None:
            self._dial(now_s)
        elif now_s >= self._silent_at_s or not self._interval_s:
            raise EndedError("not a word")
        else:
            self._beat(now_s)

    def listen(self, now_s: float) -> None:
        """Its socket has something. Raises EndedError."""
        assert self.wire is not None
        for message in self.wire.go_on():
            self._take(fleet_pb2.ControllerMessage.FromString(message), now_s)

    def end(self, now_s: float) -> None:
        """And dial again after a while."""
        if self.wire is not None:
            self.wire.close()
            self.wire = None
            self._swarm.greeting.discard(self)
        welcomed, lived_s = self._interval_s > 0, now_s - self._dialled_s
        self._late = self._late + 1 if not welcomed and lived_s >= self._greeting_s() else 0
        self._failures = 0 if welcomed and lived_s > BACKOFF_MAX_S else self._failures + 1
        delay_s = min(BACKOFF_S * 2 ** min(self._failures, 10), BACKOFF_MAX_S)
        self._swarm.plan(self, now_s + delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    def _dial(self, now_s: float) -> None:
        self._context = self._context or self._swarm.issuer.context(self._node)
        self._dialled_s, self._interval_s, self._sequence = now_s, 0.0, 0
        self._sent_s.clear()
        self._outbox.clear()
        self.wire = Wire(self._swarm.target, self._context, CONTROLLER_NAME, _METHOD)
        self._swarm.greeting.add(self)
        self._send(fleet_pb2.AgentMessage(hello=_hello(self._node)))
        self._swarm.plan(self, now_s + self._greeting_s())

    def _greeting_s(self) -> float:
        return min(GREETING_S * (1 + self._late), GREETING_MAX_S)

    def _beat(self, now_s: float) -> None:
        for message in self._outbox:
            self._send(message)
        self._outbox.clear()
        self._sequence += 1
        self._sent_s[self._sequence] = now_s
        self._send(fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(sequence=self._sequence)))
        self._swarm.plan(self, now_s + self._interval_s)

    def _send(self, message: fleet_pb2.AgentMessage) -> None:
        assert self.wire is not None
        self.wire.send(message.SerializeToString())

    def _take(self, message: fleet_pb2.ControllerMessage, now_s: float) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._swarm.greeting.discard(self)
                self._interval_s = message.welcome.heartbeat_interval_s
                self._swarm.plan(self, now_s + random.uniform(0, self._interval_s))  # noqa: S311 - spread
            case "heartbeat":
                self._interval_s = message.heartbeat.interval_s or self._interval_s
                if (sent_s := self._sent_s.pop(message.heartbeat.sequence, None)) is not None:
                    self._swarm.echo_s.append(now_s - sent_s)
                    self._sent_s = {at: sent for at, sent in self._sent_s.items() if at > message.heartbeat.sequence}
            case "assignments":
                for alloc in message.assignments.assignments:
                    self._swarm.assigned_s.setdefault(alloc.alloc, now_s)
                self._answer(message.assignments)
            case _:
                pass
        self._silent_at_s = now_s + max(SILENCE_S, 2 * answer_interval_s(self._interval_s) + 0.2)

    def _answer(self, told: fleet_pb2.Assignments) -> None:
        """With the next heartbeat: it runs, or has stopped as asked."""
        if told.assignments:
            reports = fleet_pb2.Reports(reports=[_report(one) for one in told.assignments])
            self._outbox.append(fleet_pb2.AgentMessage(reports=reports))
        self._outbox.append(fleet_pb2.AgentMessage(applied=fleet_pb2.Applied(generation=told.generation)))


class Swarm:
    """All of them dial at once, and go on until the end of `run`."""

    def __init__(self, issuer: Issuer, target: tuple[str, int], numbers: range) -> None:
        self.issuer, self.target = issuer, target
        self.echo_s: list[float] = []
        self.assigned_s: dict[str, float] = {}
        self.greeting: set[Agent] = set()  # who dialled and is not welcomed yet
        self._order = itertools.count()
        self._plans: list[tuple[float, int, Agent]] = []
        self._poll = select.epoll()
        self._polled: dict[int, Agent] = {}
        for number in numbers:
            self.plan(Agent(self, NodeId(f"s{number}")), 0.0)

    def plan(self, agent: Agent, due_s: float) -> None:
        """In place of what it had planned."""
        agent.due_s = due_s
        heapq.heappush(self._plans, (due_s, next(self._order), agent))

    def run(self) -> None:
        """Until the input ends."""
        self._poll.register(_STDIN, select.EPOLLIN)
        while True:
            wait_s = max(0.0, self._plans[0][0] - time.monotonic())
            for file, _ in self._poll.poll(wait_s):
                if file != _STDIN:
                    self._do(self._polled[file], Agent.listen)
                elif not self._obey(sys.stdin.readline().strip()):
                    return
            now_s = time.monotonic()
            for _ in range(_ACTS_MAX):
                if self._plans[0][0] > now_s:
                    break
                due_s, _, agent = heapq.heappop(self._plans)
                if due_s == agent.due_s:  # else it planned anew
                    self._do(agent, Agent.act)

    def _do(self, agent: Agent, what: Callable[[Agent, float], None]) -> None:
        now_s = time.monotonic()
        try:
            what(agent, now_s)
        except EndedError:
            if agent.polled is not None:
                del self._polled[agent.polled[0]]
                agent.polled = None
            agent.end(now_s)  # which closes what is polled
        if agent.wire is not None:
            wanted = agent.wire.fileno(), agent.wire.wants
            if agent.polled is None:
                self._poll.register(*wanted)
                self._polled[wanted[0]] = agent
            elif agent.polled != wanted:
                self._poll.modify(*wanted)
            agent.polled = wanted

    def _obey(self, word: str) -> bool:
        """`clear` forgets the heartbeats' echoes, `count` tells how many assignments came, `tell` all that was
        measured. False: the input has ended."""
        answer: object = len(self.assigned_s)
        if word == "clear":
            self.echo_s.clear()
        elif word == "tell":
            answer = [self.echo_s, list(self.assigned_s.values())]
        if word:
            print(json.dumps(answer), flush=True)
        return bool(word)


def _report(told: allocation_pb2.Assignment) -> allocation_pb2.AllocReport:
    stops = told.desired == allocation_pb2.DESIRED_STOP
    status = allocation_pb2.ALLOC_STATUS_COMPLETE if stops else allocation_pb2.ALLOC_STATUS_RUNNING
    return allocation_pb2.AllocReport(alloc=told.alloc, status=status)


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


def main(ca: str, cluster: str, target: str, first: str, count: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a socket for each
    Swarm(Issuer(Path(ca), cluster), host_port(target), range(int(first), int(first) + int(count))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
