"""A real controller process on loopback, and an honest scripted agent, for the tests of the controller's edges."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from outrider import codec
from outrider.ids import AllocId, GroupName, JobName, NodeId, PortName, ServiceName, TaskName
from outrider.model.allocation import (
    AllocReport,
    AllocStatus,
    Assignment,
    CheckReport,
    Desired,
    Generation,
    TaskReport,
    TaskStatus,
)
from outrider.model.job import MIB, Group, Job, Network, Port, Service, Task
from outrider.model.mesh import MeshUpdate
from outrider.model.node import Fingerprint, Node
from outrider.tls import TlsFiles, channel, joining_channel
from outrider.v1 import allocation_pb2, fleet_pb2, fleet_pb2_grpc, job_pb2, node_pb2, operator_pb2, operator_pb2_grpc
from tests.integration.processes import until

CLUSTER = "edge-test"
CALL_S = 10.0


class Controller:
    """One data directory, and the process that runs on it from time to time."""

    def __init__(self, directory: Path, **configuration: object) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.socket = directory / "run/operator.sock"
        self.log = directory / "controller.log"
        self.at: dict[str, str] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.configuration = {
            "cluster": CLUSTER,
            "data": str(self.data),
            "listen": "127.0.0.1:0",
            "join_listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "operator_socket": str(self.socket),
            "adopt_intentions": True,
            "join_token_file": str(self.data / "join-token"),
            **configuration,
        }

    async def start(self) -> None:
        """Returns once it is ready."""
        await self.launch()
        await until(self._ready, f"the controller is ready; see {self.log}")

    async def launch(self) -> None:
        """Returns at once: one of several may follow for a while."""
        path = self.directory / "controller.yaml"
        path.write_text(yaml.safe_dump(self.configuration))
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "controller", "--config", str(path), stdout=log, stderr=log
            )

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        return await self._end(signal.SIGTERM)

    def serves(self) -> bool:
        """It leads or follows, as its newest word says."""
        told = [line["event"] for line in self._lines() if line["event"] in ("ready", "term ends", "following")]
        return bool(told) and told[-1] != "term ends"

    def leads(self) -> bool:
        """Its newest word is that it is ready; not that its term ended."""
        told = [line["event"] for line in self._lines() if line["event"] in ("ready", "term ends", "following")]
        return bool(told) and told[-1] == "ready"

    def events(self, name: str) -> list[dict[str, object]]:
        """The log's lines of that event."""
        return [line for line in self._lines() if line["event"] == name]

    def _lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def rss_mb(self) -> float:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB

    @property
    def ca(self) -> Path:
        return self.data / "ca/ca.crt"

    @property
    def token(self) -> str:
        return (self.data / "join-token").read_text()

    @property
    def operator_files(self) -> TlsFiles:
        ca = self.data / "ca"
        return TlsFiles(ca=ca / "operator.ca", certificate=ca / "operator.crt", key=ca / "operator.key")

    @contextlib.asynccontextmanager
    async def operator(self) -> AsyncIterator["operator_pb2_grpc.OperatorServiceAsyncStub"]:
        """Over the unix socket."""
        async with grpc.aio.insecure_channel(f"unix:{self.socket}") as connection:
            yield operator_pb2_grpc.OperatorServiceStub(connection)

    async def join(self, node: NodeId, token: str | None = None) -> TlsFiles:
        """Raises grpc.aio.AioRpcError where the controller says no."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        csr = request.public_bytes(serialization.Encoding.PEM).decode()
        listen = self.at.get("join_listen", str(self.configuration["join_listen"]))
        async with joining_channel(listen, self.ca) as connection:
            join = fleet_pb2.JoinRequest(token=self.token if token is None else token, node=node, csr_pem=csr)
            response = await fleet_pb2_grpc.JoinServiceStub(connection).Join(join, timeout=CALL_S)
        files = TlsFiles(
            ca=self.directory / f"{node}.ca",
            certificate=self.directory / f"{node}.crt",
            key=self.directory / f"{node}.key",
        )
        files.ca.write_text(response.ca_pem)
        files.certificate.write_text(response.certificate_pem)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.returncode is None, self.log.read_text()
        ready = self.events("ready")
        if ready:
            self.at = {key: str(value) for key, value in ready[0].items()}
        return bool(ready)

    async def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(CALL_S):
            return await process.wait()


class Agent:
    """An honest agent without a host: takes up what it is told, and reports what a test says."""

    def __init__(self, controller: Controller, node: NodeId, files: TlsFiles) -> None:
        self.node = Node(
            id=node,
            address="127.0.0.1",
            metrics_address="127.0.0.1:9",
            fingerprint=Fingerprint(
                cpu_millis=4000, memory_bytes=4096 * MIB, disk_bytes=100_000 * MIB, host_image=True,
                runtimes={"crun": "1", "conmon": "2"},
            ),
        )  # fmt: skip
        self.files = files
        self.assignments: dict[AllocId, Assignment] = {}
        self.mesh: list[MeshUpdate] = []
        self.tunnels: list[fleet_pb2.OpenTunnel] = []
        self.log_levels: list[str] = []
        self.probes = 0
        self.echoed = 0
        self.acknowledged = Generation()
        self.reports: dict[AllocId, AllocReport] = {}
        self.tells: Callable[[Assignment], AllocReport] | None = healthy
        self.ended: grpc.aio.AioRpcError | None = None  # how the controller ended the newest session
        self._controller = controller
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._stream: grpc.aio.StreamStreamCall[fleet_pb2.AgentMessage, fleet_pb2.ControllerMessage]

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator["fleet_pb2_grpc.FleetServiceAsyncStub"]:
        """Connected, with heartbeats, from entry to exit."""
        async with channel(self._controller.at["listen"], self.files) as connection:
            stub = fleet_pb2_grpc.FleetServiceStub(connection)
            self._stream = stub.Session()
            await self._stream.write(fleet_pb2.AgentMessage(hello=self.hello()))
            welcome = await self._stream.read()
            assert isinstance(welcome, fleet_pb2.ControllerMessage), await self._stream.details()
            assert welcome.welcome.cluster == CLUSTER
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._read(), name="agent-read"),
                    group.create_task(self._beat(welcome.welcome.heartbeat_interval_s), name="agent-beat"),
                ]
                yield stub
                for task in tasks:
                    task.cancel()
            self._stream.cancel()

    def hello(self) -> fleet_pb2.Hello:
        return fleet_pb2.Hello(
            node=codec.to_wire(self.node, node_pb2.Node),
            acknowledged=codec.to_wire(self.acknowledged, allocation_pb2.Generation),
            reports=[codec.to_wire(report, allocation_pb2.AllocReport) for report in self.reports.values()],
            protocol=1,
        )

    async def report(self, *reports: AllocReport) -> None:
        self.reports.update({report.alloc: report for report in reports})
        messages = [codec.to_wire(report, allocation_pb2.AllocReport) for report in reports]
        await self.write(fleet_pb2.AgentMessage(reports=fleet_pb2.Reports(reports=messages)))

    async def write(self, message: fleet_pb2.AgentMessage) -> None:
        async with self._writing:
            await self._stream.write(message)

    async def _beat(self, interval_s: float) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` tells how it ended
            await self._beat_on(interval_s)

    async def _beat_on(self, interval_s: float) -> None:
        sequence = 0
        while self.ended is None:
            sequence += 1
            await self.write(fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(sequence=sequence)))
            await asyncio.sleep(interval_s)  # as an agent does

    async def _read(self) -> None:
        self.ended = None
        try:
            with contextlib.suppress(asyncio.InvalidStateError):  # a write after the end: `read` says how it ended
                await self._take_all()
            await self._stream.read()
        except grpc.aio.AioRpcError as error:
            self.ended = error

    async def _take_all(self) -> None:
        while isinstance(message := await self._stream.read(), fleet_pb2.ControllerMessage):
            match message.WhichOneof("message"):
                case "assignments":
                    await self._assigned(message.assignments)
                case "mesh_update":
                    update = codec.from_wire(message.mesh_update, MeshUpdate)
                    self.mesh.append(update)
                    applied = fleet_pb2.MeshApplied(version=update.version)
                    await self.write(fleet_pb2.AgentMessage(mesh_applied=applied))
                case "heartbeat":
                    self.probes += message.heartbeat.sequence == 0
                    self.echoed = max(self.echoed, message.heartbeat.sequence)
                case "log_level":
                    self.log_levels.append(message.log_level)
                case "open_tunnel":
                    self.tunnels.append(message.open_tunnel)

    async def _assigned(self, message: fleet_pb2.Assignments) -> None:
        told = [codec.from_wire(each, Assignment) for each in message.assignments]
        if message.full:
            self.assignments.clear()
        self.assignments.update({each.alloc: each for each in told})
        for removed in message.removed:
            self.assignments.pop(AllocId(removed), None)
        self.acknowledged = codec.from_wire(message.generation, Generation)
        applied = fleet_pb2.Applied(generation=message.generation)
        await self.write(fleet_pb2.AgentMessage(applied=applied))
        if self.tells is not None and told:
            await self.report(*map(self.tells, told))


def healthy(assignment: Assignment) -> AllocReport:
    """What an agent says of a workload that runs well, or that has stopped as asked."""
    stopped = assignment.desired is Desired.STOP
    return AllocReport(
        alloc=assignment.alloc,
        status=AllocStatus.COMPLETE if stopped else AllocStatus.RUNNING,
        tasks=tuple(
            TaskReport(name=task.name, status=TaskStatus.EXITED if stopped else TaskStatus.RUNNING)
            for task in assignment.group.tasks
        ),
        checks=tuple(CheckReport(service=each.name, passing=not stopped) for each in assignment.group.services),
        local_address="10.0.0.2",
    )


def web_job(count: int = 1) -> Job:
    service = Service(name=ServiceName("web"), port=PortName("http"))
    group = Group(
        name=GroupName("web"),
        count=count,
        tasks=(Task(name=TaskName("server"), command=("sleep", "infinity")),),
        network=Network(ports=(Port(name=PortName("http")),)),
        services=(service,),
    )
    return Job(name=JobName("shop"), groups=(group,))


async def submit(stub: "operator_pb2_grpc.OperatorServiceAsyncStub", job: Job) -> operator_pb2.SubmitJobResponse:
    request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
    return await stub.SubmitJob(request, timeout=CALL_S)


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    controller = Controller(tmp_path)
    try:
        await controller.start()
        yield controller
    finally:
        await controller.kill()
