"""A controller for tests of the agent: the real wire with mTLS, the real CA and JoinService, scripted wishes.

Lives in a network namespace made for the test, as the agent that it starts does.
"""
# ruff: noqa: ASYNC220, ASYNC240 - a test may block its own loop

import asyncio
import contextlib
import datetime as dt
import hashlib
import itertools
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controller.ca import FleetCa
from controller.join import Admit, JoinService
from outrider import codec
from outrider.clock import wall_s
from outrider.errors import RefusedError
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment, Generation
from outrider.model.mesh import Leaf, MeshService, MeshUpdate, ServiceIntentions, TrustRoots, spiffe_id
from outrider.tokens import join_token
from outrider.v1 import allocation_pb2, fleet_pb2, fleet_pb2_grpc, mesh_pb2
from tests.integration.network_lab import NODE, Lab
from tests.integration.processes import until

DATACENTER = "dc1"
TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555.consul"


class FakeController(fleet_pb2_grpc.FleetServiceServicer):
    """Says what the test says, hears what the agent says."""

    def __init__(self, heartbeat_interval_s: float = 0.5) -> None:
        self.hellos: list[fleet_pb2.Hello] = []
        self.reports: dict[AllocId, AllocReport] = {}
        self.history: list[AllocReport] = []
        self.applied: Generation | None = None
        self.mesh_applied = 0
        self.fingerprints = 0
        self.fingerprint_snapshots: tuple[str, ...] = ()
        self.leaves: Counter[str] = Counter()
        self.leaf_life_s = 3600.0
        self.secrets: dict[str, tuple[int, bytes]] = {}  # name -> version and value, of every allocation
        self.refuse_leaves = False
        self.silent = False  # answers no heartbeat
        self.away = False  # nor welcomes anybody
        self.protocol = 1
        self.tunnels: dict[str, asyncio.Queue[fleet_pb2.TunnelFrame | None]] = {}
        self.tunnel_inputs: dict[str, asyncio.Queue[fleet_pb2.TunnelFrame]] = {}
        self._heartbeat_interval_s = heartbeat_interval_s
        self._outgoing: asyncio.Queue[fleet_pb2.ControllerMessage] | None = None
        self._unacknowledged: dict[int, fleet_pb2.ControllerMessage] = {}  # said in a session that broke off, perhaps
        self._counter = 0
        self._mesh_version = 0
        self._mesh_key = ec.generate_private_key(ec.SECP256R1())
        self._mesh_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh root")])
        self._root = self._sign_root()

    async def Session(  # noqa: N802 - the wire's name
        self, request_iterator: AsyncIterator[fleet_pb2.AgentMessage], context: Any
    ) -> AsyncIterator[fleet_pb2.ControllerMessage]:
        first = await anext(request_iterator)
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        outgoing = self._outgoing = asyncio.Queue()
        self.reports = {}
        self._hear_reports(first.hello.reports)
        self.hellos.append(first.hello)
        self._acknowledged(first.hello.acknowledged.counter)
        for message in self._unacknowledged.values():
            outgoing.put_nowait(message)
        yield fleet_pb2.ControllerMessage(
            welcome=fleet_pb2.Welcome(
                cluster="test", heartbeat_interval_s=self._heartbeat_interval_s, protocol=self.protocol
            )
        )
        reading = asyncio.create_task(self._read(request_iterator, outgoing))
        try:
            while True:
                yield await outgoing.get()
        finally:
            reading.cancel()

    async def IssueLeaf(  # noqa: N802 - the wire's name
        self, request: fleet_pb2.IssueLeafRequest, context: Any
    ) -> fleet_pb2.IssueLeafResponse:
        self.leaves[request.service] += 1
        if self.refuse_leaves:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not placed on this node")
        leaf = self._sign(request.service, request.csr_pem)
        return fleet_pb2.IssueLeafResponse(leaf=codec.to_wire(leaf, mesh_pb2.Leaf))

    async def GetSecrets(  # noqa: N802 - the wire's name
        self, _request: fleet_pb2.GetSecretsRequest, _context: Any
    ) -> fleet_pb2.GetSecretsResponse:
        values = (
            fleet_pb2.SecretValue(name=name, version=version, value=value)
            for name, (version, value) in self.secrets.items()
        )
        return fleet_pb2.GetSecretsResponse(secrets=values)

    async def Tunnel(  # noqa: N802 - the wire's name
        self, request_iterator: AsyncIterator[fleet_pb2.TunnelFrame], _context: Any
    ) -> AsyncIterator[fleet_pb2.TunnelFrame]:
        name = (await anext(request_iterator)).tunnel

        async def read() -> None:
            async for frame in request_iterator:
                self.tunnels[name].put_nowait(frame)
            self.tunnels[name].put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while True:
                yield await self.tunnel_inputs[name].get()
        finally:
            reading.cancel()

    def assign(self, *assignments: Assignment, full: bool = False, removed: tuple[AllocId, ...] = ()) -> Generation:
        self._counter += 1
        generation = Generation(epoch=1, counter=self._counter)
        message = fleet_pb2.Assignments(
            generation=codec.to_wire(generation, allocation_pb2.Generation),
            full=full,
            assignments=[codec.to_wire(each, allocation_pb2.Assignment) for each in assignments],
            removed=removed,
        )
        self._unacknowledged[self._counter] = fleet_pb2.ControllerMessage(assignments=message)
        self._say(self._unacknowledged[self._counter])
        return generation

    def mesh(self, *services: MeshService, intentions: tuple[ServiceIntentions, ...] = ()) -> int:
        """The whole mesh, as it is now."""
        self._mesh_version += 1
        roots = TrustRoots(datacenter=DATACENTER, trust_domain=TRUST_DOMAIN, certificates_pem=(self._root,))
        update = MeshUpdate(
            version=self._mesh_version, full=True, services=services, intentions=intentions, roots=roots
        )
        self._say(fleet_pb2.ControllerMessage(mesh_update=codec.to_wire(update, mesh_pb2.MeshUpdate)))
        return self._mesh_version

    def open_tunnel(self, **request: Any) -> str:
        name = secrets.token_hex(4)
        self.tunnels[name], self.tunnel_inputs[name] = asyncio.Queue(), asyncio.Queue()
        self._say(fleet_pb2.ControllerMessage(open_tunnel=fleet_pb2.OpenTunnel(tunnel=name, **request)))
        return name

    async def tunnelled(self, name: str, *, timeout_s: float = 30.0) -> tuple[bytes, fleet_pb2.TunnelEnd]:
        """All its output, and how it ended."""
        output = bytearray()
        async with asyncio.timeout(timeout_s):
            while (frame := await self.tunnels[name].get()) is not None:
                if frame.WhichOneof("frame") == "end":
                    return bytes(output), frame.end
                output += frame.stdout + frame.stderr
        raise AssertionError(f"the tunnel broke off after {output!r}")

    def status(self, alloc: AllocId) -> AllocStatus | None:
        report = self.reports.get(alloc)
        return report.status if report else None

    def passing(self, alloc: AllocId) -> bool:
        report = self.reports.get(alloc)
        return report is not None and bool(report.checks) and all(check.passing for check in report.checks)

    def _say(self, message: fleet_pb2.ControllerMessage) -> None:
        assert self._outgoing is not None, "no agent is connected"
        self._outgoing.put_nowait(message)

    async def _read(
        self,
        requests: AsyncIterator[fleet_pb2.AgentMessage],
        outgoing: asyncio.Queue[fleet_pb2.ControllerMessage],
    ) -> None:
        async for message in requests:
            match message.WhichOneof("message"):
                case "heartbeat" if not (self.silent or self.away):
                    outgoing.put_nowait(fleet_pb2.ControllerMessage(heartbeat=message.heartbeat))
                case "reports":
                    self._hear_reports(message.reports.reports)
                case "applied":
                    self.applied = codec.from_wire(message.applied.generation, Generation)
                    self._acknowledged(self.applied.counter)
                case "mesh_applied":
                    self.mesh_applied = message.mesh_applied.version
                case "fingerprint_changed":
                    self.fingerprints += 1
                    self.fingerprint_snapshots = tuple(message.fingerprint_changed.fingerprint.snapshots)

    def _acknowledged(self, counter: int) -> None:
        for heard in [said for said in self._unacknowledged if said <= counter]:
            del self._unacknowledged[heard]

    def _hear_reports(self, reports: Any) -> None:
        for report in reports:
            value = codec.from_wire(report, AllocReport)
            self.reports[value.alloc] = value
            self.history.append(value)

    def _sign_root(self) -> str:
        return self._certificate(self._mesh_name, self._mesh_key.public_key(), (), ca=True)

    def _sign(self, service: str, csr_pem: str) -> Leaf:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [spiffe_id(TRUST_DOMAIN, DATACENTER, ServiceName(service))]
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)])
        pem = self._certificate(subject, key, uris, ca=False)
        return Leaf(service=ServiceName(service), certificate_pem=pem, expires_at_s=wall_s() + self.leaf_life_s)

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, uris: Any, *, ca: bool) -> str:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._mesh_name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if uris:
            alternatives = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=True)
        certificate = builder.sign(self._mesh_key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


class AgentFleet:
    """One fake controller and one real agent process, with directories of their own."""

    def __init__(self, controller: FakeController, directory: Path, run: Path, config: Path, ca: FleetCa) -> None:
        self.controller = controller
        self.directory = directory
        self.run = run
        self.data = directory / "data"
        self.config = config
        self.ca = ca
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Returns once the agent has greeted the controller."""
        known = len(self.controller.hellos)
        log = (self.directory / "agent.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "--config", str(self.config)], stdout=log, stderr=log
            )
        await until(lambda: len(self.controller.hellos) > known or self.process.poll() is not None, "Hello")  # type: ignore[union-attr]
        assert self.process.poll() is None, self.log()[-3000:]

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        self.process = None
        return code

    def purge(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "agent", "--config", str(self.config), "--purge"],
            timeout=60,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def log(self) -> str:
        return (self.directory / "agent.log").read_text()

    def shell(self, command: str) -> str:
        """What a command says in the node's namespace."""
        return subprocess.run(["sh", "-c", command], check=False, timeout=20, capture_output=True, text=True).stdout

    def workload_pids(self, needle: str) -> list[int]:
        """Host pids of processes in this node's sandboxes whose command line contains `needle`."""
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if needle in command and f"/{self.run.name}/" in (path / "cgroup").read_text():
                    pids.append(int(path.name))
        return sorted(pids)

    def processes(self) -> list[str]:
        """Command lines of whatever on this host speaks of this node."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if self.run.name in command or str(self.directory) in command:
                    found.append(command)
        return found


_tests = itertools.count(1)
_test = [0]


def alloc_id(number: int) -> AllocId:
    """The test's own: of several that share a node none finds another's allocations, nor their logs."""
    return AllocId(f"{_test[0]:05x}{number:05x}")


@contextlib.asynccontextmanager
async def one_test(fleet: AgentFleet) -> AsyncIterator[AgentFleet]:
    """A running node for it, with nothing on it, afterwards too. Caches keep what they have."""
    _test[0] = next(_tests)
    yield fleet
    if fleet.process is None:
        await fleet.start()
    fleet.controller.assign(full=True)
    await until(lambda: not list((fleet.data / "allocations").iterdir()), "all is gone")


def admit_once(token: str) -> Admit:
    """Lets one node in, as a journal with one token of one use does."""
    left = {hashlib.sha256(token.encode()).hexdigest()}

    async def admit(token_sha256: str, node: NodeId, key_sha256: str) -> None:
        if token_sha256 not in left:
            raise RefusedError("bad-token", f"node {node} with key {key_sha256}: the token is unknown or used up")
        left.remove(token_sha256)

    return admit


@contextlib.asynccontextmanager
async def agent_fleet(*, ca: FleetCa | None = None, **settings: object) -> AsyncIterator[AgentFleet]:
    """In this thread's network namespace. The test starts the agent; nothing of it stays on the host, come what may."""
    name = f"t{secrets.token_hex(4)}"
    directory = Path(tempfile.mkdtemp(prefix="outrider-agent-"))
    directory.chmod(0o711)
    run = Path("/run/outrider") / name
    ca = ca or FleetCa(directory / "ca", "test")
    files = ca.issue_server(["127.0.0.1"])
    token = join_token(ca_sha256=ca.sha256, secret=secrets.token_urlsafe(32))
    chain = files.certificate.read_bytes() + files.ca.read_bytes()
    server, controller = grpc.aio.server(), FakeController()
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(controller, server)
    joins = grpc.aio.server()
    service = JoinService(cluster="test", ca=ca, admit=admit_once(token), refused=Counter())
    fleet_pb2_grpc.add_JoinServiceServicer_to_server(service, joins)
    pair = [(files.key.read_bytes(), chain)]
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials(pair, files.ca.read_bytes(), require_client_auth=True)
    )
    join_port = joins.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    await server.start()
    await joins.start()
    config = directory / "agent.yaml"
    document: Mapping[str, object] = {
        "cluster": "test",
        "node": name,
        "data": str(directory / "data"),
        "run": str(run),
        "address": NODE,
        "controllers": [f"127.0.0.1:{port}"],
        "join": {"address": f"127.0.0.1:{join_port}", "token": token},
        "host_image": True,
        **settings,
    }
    config.write_text(yaml.safe_dump(dict(document)))
    fleet = AgentFleet(controller, directory, run, config, ca)
    try:
        yield fleet
    finally:
        try:
            if fleet.process is not None:
                fleet.kill()
            fleet.purge()
        finally:
            await server.stop(None)
            await joins.stop(None)
        shutil.rmtree(directory)


@pytest.fixture
async def fleet(node: Lab) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - it is where this thread then lives
    async with agent_fleet() as made:
        yield made
