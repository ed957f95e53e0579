"""Guests for tests: the example's, and its neighbours in the mesh, under a scripted controller."""

import asyncio
import hashlib
from pathlib import Path

import msgspec
import pytest

from examples.vm import guest as example
from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import (
    MIB,
    Check,
    CheckKind,
    Driver,
    File,
    Group,
    GuestFile,
    Image,
    ImageKind,
    Network,
    Port,
    Resources,
    RestartPolicy,
    Service,
    Task,
    Upstream,
)
from outrider.model.job import Protocol as MeshProtocol
from outrider.model.mesh import (
    PUBLIC_PORT,
    Action,
    Endpoint,
    Intention,
    MeshService,
    ServiceIntentions,
    virtual_address,
)
from outrider.v1 import fleet_pb2
from tests.integration.agent_fleet import AgentFleet
from tests.integration.processes import comm

GUEST, API, VISITOR = AllocId("00000000a1"), AllocId("00000000b1"), AllocId("00000000c1")
BOOT_S = 60.0  # three at once on a busy machine


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder with the example's guest."""
    return example.build()


def file(path: Path) -> GuestFile:
    return GuestFile(reference=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def image(built: Path, disk: Path | None) -> Image:
    whole = file(disk) if disk is not None else GuestFile(reference="", sha256="")
    return Image(
        kind=ImageKind.DISK,
        reference=whole.reference,
        sha256=whole.sha256,
        kernel=file(built / "vmlinux"),
        initrd=file(built / "initrd"),
    )


def machine(disk: Image, alloc: AllocId, *, attempts: int = 0, disk_bytes: int = 64 * MIB) -> Assignment:
    """A guest that nobody calls."""
    task = Task(
        name=TaskName("machine"),
        driver=Driver.VM,
        image=disk,
        resources=Resources(cpu_millis=500, memory_bytes=128 * MIB, disk_bytes=disk_bytes),
        kill_timeout_s=20.0,
    )
    restart = RestartPolicy(attempts=attempts, delay_s=0.1)
    group = Group(name=GroupName("guest"), tasks=(task,), restart=restart)
    return Assignment(alloc=alloc, job=JobName("machines"), job_version=1, group=group, index=0)


def serving(built: Path) -> Assignment:
    """The example's guest: it serves `guest`, and calls `api`."""
    alone = machine(image(built, built / "disk.qcow2"), GUEST, attempts=3)
    service = Service(
        name=ServiceName("guest"),
        port=PortName("http"),
        protocol=MeshProtocol.HTTP,
        check=Check(kind=CheckKind.HTTP, path="/", interval_s=0.5, timeout_s=2.0),
        upstreams=(Upstream(service=ServiceName("api")),),
    )
    network = Network(ports=(Port(name=PortName("http")),))
    given = File(path="www/index.html", content=b"hello from a guest\n")
    (task,) = alone.group.tasks
    tasks = (msgspec.structs.replace(task, files=(given,)),)
    group = msgspec.structs.replace(alone.group, tasks=tasks, services=(service,), network=network)
    return msgspec.structs.replace(alone, group=group, mesh_ports={ServiceName("guest"): 20001})


def process(name: str, alloc: AllocId, service: Service, command: tuple[str, ...], mesh_port: int | None) -> Assignment:
    task = Task(name=TaskName(name), command=command, files=(File(path="index.html", content=b"from a process\n"),))
    ports = (Port(name=PortName("http")),) if service.port else ()
    group = Group(name=GroupName(name), tasks=(task,), services=(service,), network=Network(ports=ports))
    ports_outside = {service.name: mesh_port} if mesh_port else {}
    return Assignment(
        alloc=alloc, job=JobName("machines"), job_version=1, group=group, index=0, mesh_ports=ports_outside
    )


def neighbours() -> tuple[Assignment, Assignment]:
    api = Service(
        name=ServiceName("api"),
        port=PortName("http"),
        protocol=MeshProtocol.HTTP,
        check=Check(kind=CheckKind.HTTP, path="/", interval_s=0.5),
    )
    visitor = Service(name=ServiceName("visitor"), upstreams=(Upstream(service=ServiceName("guest")),))
    serve = ("python3", "-m", "http.server", "${port.http}", "--directory", "${task.dir}")
    return process("api", API, api, serve, 20002), process("visitor", VISITOR, visitor, ("sleep", "600"), None)


def mesh(fleet: AgentFleet) -> None:
    """As the controller would tell of it: who is where, and who may call whom."""

    def service(index: int, name: str, alloc: AllocId) -> MeshService:
        report = fleet.controller.reports.get(alloc)
        endpoint = Endpoint(
            id=name,
            node=fleet.run.name,
            address="192.0.2.99",
            port=1,
            local_address=report.local_address if report else "",
            local_port=PUBLIC_PORT,
            healthy=fleet.controller.passing(alloc),
            alloc=alloc,
            outrider=True,
        )
        return MeshService(
            name=ServiceName(name),
            virtual_address=virtual_address(index),
            protocol=MeshProtocol.HTTP,
            endpoints=(endpoint,) if report and report.local_address else (),
        )

    def allow(source: str, destination: str) -> ServiceIntentions:
        intention = Intention(source=source, destination=destination, action=Action.ALLOW, precedence=9)
        return ServiceIntentions(service=ServiceName(destination), intentions=(intention,))

    services = (service(0, "api", API), service(1, "guest", GUEST))
    fleet.controller.mesh(*services, intentions=(allow("guest", "api"), allow("visitor", "guest")))


async def calls(fleet: AgentFleet, url: str) -> str:
    """What a process behind its own sidecar gets."""
    script = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=8).read().decode(), end='')"
    request = fleet_pb2.ExecRequest(alloc=VISITOR, command=["python3", "-c", script])
    output, _ = await fleet.controller.tunnelled(fleet.controller.open_tunnel(exec=request))
    return output.decode()


async def typed(fleet: AgentFleet, keys: str, *, until_seen: str, alloc: AllocId = GUEST) -> str:
    """Types at the console, reads until the answer, leaves: what went wrong, if anything did."""
    controller = fleet.controller
    tunnel = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=alloc, console=True))
    controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin=keys.encode()))
    seen = ""
    async with asyncio.timeout(20):
        while (frame := await controller.tunnels[tunnel].get()) is not None:
            if frame.WhichOneof("frame") == "end":
                error: str = frame.end.error
                return error
            seen += frame.stdout.decode(errors="replace")
            if f"{until_seen}\r\n" in seen:
                controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin_closed=True))
    raise AssertionError(f"the console broke off after {seen!r}")


async def ran(fleet: AgentFleet, *command: str, alloc: AllocId = GUEST, tty: bool = False) -> tuple[bytes, int, str]:
    """What a program inside the guest said, its code, and why it did not run."""
    request = fleet_pb2.ExecRequest(alloc=alloc, command=command, tty=tty)
    output, end = await fleet.controller.tunnelled(fleet.controller.open_tunnel(exec=request))
    return output, end.exit_code, end.error


async def logs(fleet: AgentFleet, alloc: AllocId) -> str:
    request = fleet_pb2.LogsRequest(alloc=alloc, tail_lines=-1)
    output, _ = await fleet.controller.tunnelled(fleet.controller.open_tunnel(logs=request))
    return output.decode(errors="replace")


def emulators(fleet: AgentFleet) -> list[int]:
    """Without the inits before them."""
    pids = fleet.workload_pids("qemu-system-x86_64 -name")
    return [pid for pid in pids if comm(pid).startswith("qemu")]
