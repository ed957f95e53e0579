"""How long a changed endpoint takes from Consul to every sidecar: a real Consul, a real controller, the agent's own
session, relay and ADS server, and real Envoys (1, 20, 50), or a thousand clients that speak ADS as Envoys do.

The clock runs from before the write to Consul's catalog until the last sidecar has acknowledged; each Envoy's own
list of clusters is then read as the proof. The Envoys have network namespaces of their own, and no sandbox.
"""

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp

from agent.fleet import FleetSession, Greeting, Wish
from agent.leaves import Leaves
from agent.mesh_relay import MeshRelay
from bench.figure import emit, percentile
from outrider.ids import AllocId, GroupName, JobName, NodeId, ServiceName, TaskName
from outrider.log import Log
from outrider.model.allocation import Generation
from outrider.model.job import MIB, Group, Job, Service, Task, Upstream
from outrider.model.mesh import Leaf, MeshUpdate, MeshView
from outrider.model.node import Fingerprint, Node
from outrider.v1 import fleet_pb2
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from sidecar.sidecars import SidecarFiles, Sidecars
from tests.integration.consul import real_consul
from tests.integration.controllers import Controller, healthy, submit
from tests.integration.processes import until

ENVOYS = (1, 20, 50)
CLIENTS = 1000
CHANGES = 100
_FIRST_PORT = 9000
_CALLER, _CALLEE = ServiceName("caller"), ServiceName("callee")
_NODE = NodeId("n1")
_HOLDER = AllocId("f" * 10)  # of the caller's certificate
_DEADLINE_S = 100.0
_PAUSE_S = 0.1  # between changes: each is told alone
_PUBLIC_PORT = 15100
_LOG = Log("bench")
_ENTER = """
ip link set lo up && ip route add local 198.18.0.0/15 dev lo
mount -t tmpfs tmpfs /run && mkdir -p /run/outrider/sidecar && : > /run/outrider/envoy
mount --bind "$1" /run/outrider/sidecar && mount --bind "$2" /run/outrider/envoy
shift 2
exec setpriv --pdeathsig KILL -- "$@"
"""


def run() -> None:
    for count in ENVOYS:
        _tell(f"at_{count}", _measured(count, envoys=True))
    _tell(f"at_{CLIENTS}_clients", _measured(CLIENTS, envoys=False))


def _tell(where: str, times_ms: Sequence[float]) -> None:
    emit(f"propagation.ms_p50_{where}", percentile(times_ms, 0.50), "ms")
    # Consul's own figure is of 10,000 nodes, and of its servers alone.
    emit(f"propagation.ms_p99_{where}", percentile(times_ms, 0.99), "ms", peer="Consul, published", peer_value=1000.0)


def _measured(count: int, *, envoys: bool) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as place:
        directory = Path(place)
        directory.chmod(0o711)
        with real_consul(directory) as consul:
            return asyncio.run(_on_a_controller(directory, consul.url, count, envoys=envoys))


async def _on_a_controller(directory: Path, consul: str, count: int, *, envoys: bool) -> list[float]:
    controller = Controller(directory, consul={"url": consul})
    await controller.start()
    try:
        async with (
            aiohttp.ClientSession(consul) as catalog,
            Sidecars(run_directory=directory / "agent", now_s=time.time) as sidecars,
        ):
            return await _changes(controller, catalog, sidecars, count, envoys=envoys)
    finally:
        await controller.kill()


async def _changes(
    controller: Controller, catalog: aiohttp.ClientSession, sidecars: Sidecars, count: int, *, envoys: bool
) -> list[float]:
    await _register(catalog, _FIRST_PORT)
    node = _Node(sidecars)
    node.session = FleetSession(
        controllers=[controller.at["listen"]],
        tls=await controller.join(_NODE),
        listener=node,
        log=_LOG,
        rng=random.Random(1),  # noqa: S311
    )
    async with asyncio.TaskGroup() as group:
        work = [group.create_task(part, name="node") for part in (node.session.run(), node.relay.run())]
        async with controller.operator() as operator:
            await submit(operator, _job())
        await until(lambda: _CALLEE in node.view.services, "the controller tells of the callee", _DEADLINE_S)
        node.leaves.acquire(_HOLDER, [_CALLER], group)
        files = []
        for number in range(count):
            files.append(await sidecars.add(_spec(number)))
            await asyncio.sleep(0)  # the session's heartbeats go on
        async with _envoys(files) if envoys else _clients(files):
            for number in range(count if envoys else 0):
                await sidecars.ready(_alloc(number), _DEADLINE_S)
            ports = [_FIRST_PORT + 1 + at % 2 for at in range(CHANGES)]
            times_ms = [await node.change(catalog, port) for port in ports]
            if envoys:
                await _prove(files, ports[-1])
        node.leaves.release(_HOLDER)
        for task in work:
            task.cancel()
    return times_ms


class _Node:
    """An agent's part between the controller and the sidecars, without what starts workloads."""

    def __init__(self, sidecars: Sidecars) -> None:
        self.view = MeshView()
        self.session: FleetSession
        self.leaves = Leaves(issue=self._issue, give=sidecars.set_leaf, log=_LOG, rng=random.Random(1))  # noqa: S311
        self.relay = MeshRelay(show=self._show, acknowledged=sidecars.acknowledged, applied=self._applied, log=_LOG)
        self._sidecars = sidecars
        self._generation = Generation()
        self._awaited_port, self._shown, self._told = 0, False, asyncio.Event()

    async def change(self, catalog: aiohttp.ClientSession, port: int) -> float:
        """Moves the callee to `port`: milliseconds until every sidecar has it."""
        await asyncio.sleep(_PAUSE_S)
        self._awaited_port, self._shown = port, False
        self._told.clear()
        began_s = time.perf_counter()
        await _register(catalog, port)
        async with asyncio.timeout(_DEADLINE_S):
            await self._told.wait()
        return (time.perf_counter() - began_s) * 1000

    # As `FleetListener` has it.

    def greeting(self) -> Greeting:
        fingerprint = Fingerprint(
            cpu_millis=4000, memory_bytes=4096 * MIB, disk_bytes=100_000 * MIB, host_image=True,
            runtimes={"crun": "1", "conmon": "2"},
        )  # fmt: skip
        node = Node(id=_NODE, address="127.0.0.1", metrics_address="127.0.0.1:9", fingerprint=fingerprint)
        return Greeting(node=node, acknowledged=self._generation, reports=())

    async def heard(self, at_s: float) -> None: ...

    async def assigned(self, wish: Wish) -> None:
        self._generation = wish.generation
        for assignment in wish.assignments:
            self.session.report(healthy(assignment))
        self.session.applied(wish.generation)

    def mesh_changed(self, update: MeshUpdate) -> None:
        self.relay.take(update)

    def trust_told(self, roots_pem: tuple[str, ...], issuer_sha256: str) -> None:
        raise AssertionError(f"{len(roots_pem)} roots, {issuer_sha256}: it greets as one that knows nothing of that")

    def tunnel_wanted(self, request: fleet_pb2.OpenTunnel) -> None:  # noqa: ARG002
        raise AssertionError("nobody asks for logs here")

    async def _issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        return await self.session.issue_leaf(service, csr_pem)

    def _show(self, view: MeshView) -> None:
        self.view = view
        self.leaves.set_roots(view.roots)
        self._sidecars.set_view(view)
        callee = view.services.get(_CALLEE)
        self._shown = callee is not None and [one.port for one in callee.endpoints] == [self._awaited_port]

    def _applied(self, version: int) -> None:
        self.session.mesh_applied(version)
        if self._shown:
            self._told.set()


def _job() -> Job:
    service = Service(name=_CALLER, upstreams=(Upstream(service=_CALLEE),))
    task = Task(name=TaskName("sleep"), command=("sleep", "infinity"))
    return Job(name=JobName("callers"), groups=(Group(name=GroupName("caller"), services=(service,), tasks=(task,)),))


def _spec(number: int) -> SidecarSpec:
    service = SidecarService(service=_CALLER, public_port=_PUBLIC_PORT, upstreams=(SidecarUpstream(service=_CALLEE),))
    return SidecarSpec(alloc=_alloc(number), node=_NODE, uid=0, local_address="127.0.0.1", services=(service,))


def _alloc(number: int) -> AllocId:
    return AllocId(f"{number:010x}")


async def _register(catalog: aiohttp.ClientSession, port: int) -> None:
    """The callee, outside of the fleet, as anybody registers a proxy in Consul."""
    entry = {
        "Node": "outside",
        "Address": "127.0.0.1",
        "Service": {
            "Kind": "connect-proxy", "ID": "callee-proxy", "Service": "callee-proxy", "Port": port,
            "Proxy": {"DestinationServiceName": _CALLEE},
        },
    }  # fmt: skip
    async with catalog.put("/v1/catalog/register", json=entry) as answer:
        assert answer.status == 200, await answer.text()


@contextlib.asynccontextmanager
async def _envoys(files: Sequence[SidecarFiles]) -> AsyncIterator[None]:
    processes = []
    try:
        for one in files:
            words = ("unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec", _ENTER, "sh")
            with (one.directory / "envoy.log").open("ab") as log:
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *words, str(one.directory), str(one.binary), *one.argv, stdout=log, stderr=log
                    )
                )
        yield
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def _clients(files: Sequence[SidecarFiles]) -> AsyncIterator[None]:
    """In a process of their own; entered once each has its first configuration."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.ads_clients"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for one in files:
            process.stdin.write(f"{one.directory}\n".encode())
        process.stdin.write(b"\n")
        async with asyncio.timeout(_DEADLINE_S):
            assert (await process.stdout.readline()).strip() == b"ready"
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _prove(files: Sequence[SidecarFiles], port: int) -> None:
    """Every Envoy's own list of clusters has the newest endpoint and no other."""
    for one in files:
        connector = aiohttp.UnixConnector(str(one.directory / "admin.sock"))
        async with (
            aiohttp.ClientSession("http://envoy", connector=connector) as admin,
            admin.get("/clusters") as answer,
        ):
            text = await answer.text()
        ports = {line.split("::")[1] for line in text.splitlines() if "outbound/" in line and "::127.0.0.1:" in line}
        assert ports == {f"127.0.0.1:{port}"}, text
