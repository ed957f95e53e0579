"""A mesh of real Envoys on loopback addresses, for tests: a sidecar per service, no sandbox.

Each Envoy runs in a mount namespace of its own, as a user of its own, with its directory bound where a sandbox has it.
"""

import asyncio
import itertools
import json
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Endpoint, Intention, MeshService, MeshView, TrustRoots
from outrider.model.traffic import RateLimit
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from sidecar.sidecars import SidecarFiles, Sidecars
from tests.integration.certificates import Authority

TRUST_DOMAIN = "3b0a7b6e-test.consul"
NODE = NodeId("node-1")
PUBLIC_PORT = 15100
T = TypeVar("T")
_ENTER = """
mount -t tmpfs tmpfs /run && mkdir -p /run/outrider/sidecar && : > /run/outrider/envoy
mount --bind "$1" /run/outrider/sidecar && mount --bind "$2" /run/outrider/envoy
user=$3; shift 3
exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --pdeathsig KILL -- "$@"
"""


class Mesh:
    """`async with Mesh() as mesh`: an authority, a view that tests change, and Envoys."""

    def __init__(self) -> None:
        # Of its own among tests that run at the same time: by chance, one of 47,000.
        self._net = f"127.{64 + secrets.randbelow(187)}.{1 + secrets.randbelow(250)}"
        self._hosts = itertools.count(1)
        self.directory = Path(tempfile.mkdtemp(prefix="outrider-mesh-"))
        self.authority = Authority(TRUST_DOMAIN, "dc1")
        self.roots = [self.authority.certificate_pem]
        self.services: dict[ServiceName, MeshService] = {}
        self.intentions: dict[ServiceName, tuple[Intention, ...]] = {}
        self.rates: dict[ServiceName, RateLimit | None] = {}
        self.envoys: dict[AllocId, asyncio.subprocess.Process] = {}
        self.sidecars = Sidecars(run_directory=self.directory / "run", now_s=time.time)
        self.thief_port = 0  # where a caller without an intention calls, in tests that have one
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.directory.chmod(0o711)
        await self._stack.enter_async_context(self.sidecars)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for envoy in self.envoys.values():
            await _end(envoy)
        await self._stack.aclose()
        shutil.rmtree(self.directory)

    async def restart_agent(self, *specs: SidecarSpec) -> None:
        """A new Sidecars over the same directory, as after the agent's restart; leaves and view come again."""
        await self._stack.aclose()
        self.sidecars = Sidecars(run_directory=self.directory / "run", now_s=time.time)
        await self._stack.enter_async_context(self.sidecars)
        for spec in specs:
            await self.sidecars.add(spec)

    def address(self) -> str:
        return f"{self._net}.{next(self._hosts)}"

    def service(self, name: str, protocol: Protocol, *endpoints: Endpoint) -> MeshService:
        """Adds or replaces a service in the view; its virtual address stays."""
        known = self.services.get(ServiceName(name))
        service = MeshService(
            name=ServiceName(name),
            virtual_address=known.virtual_address if known else self.address(),
            protocol=protocol,
            endpoints=endpoints,
        )
        self.services[service.name] = service
        return service

    def intend(self, destination: str, *rules: tuple[str, Action]) -> None:
        self.intentions[ServiceName(destination)] = tuple(
            Intention(source=source, destination=destination, action=action, id=f"id-{source.replace('*', 'any')}")
            for source, action in rules
        )

    def publish(self) -> None:
        roots = TrustRoots(datacenter="dc1", trust_domain=TRUST_DOMAIN, certificates_pem=tuple(self.roots))
        self.sidecars.set_view(
            MeshView(
                services=dict(self.services), intentions=dict(self.intentions), rates=dict(self.rates), roots=roots
            )
        )

    def spec(self, alloc: AllocId, *services: SidecarService) -> SidecarSpec:
        return SidecarSpec(
            alloc=alloc,
            node=NODE,
            uid=200_000 + secrets.randbelow(60_000_000),
            local_address=self.address(),
            services=services,
        )

    async def launch(self, spec: SidecarSpec) -> SidecarFiles:
        """Adds the sidecar and starts its Envoy; not ready yet."""
        files = await self.sidecars.add(spec)
        for service in spec.services:
            self.sidecars.set_leaf(self.authority.leaf(service.service))
        await self.run_envoy(spec, files)
        return files

    async def run_envoy(self, spec: SidecarSpec, files: SidecarFiles) -> None:
        with self.log_file(spec.alloc).open("ab") as log:
            self.envoys[spec.alloc] = await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "--propagation", "private", "sh", "-ec", _ENTER, "sh"),
                *(str(files.directory), str(files.binary), str(spec.uid), *files.argv),
                stdout=log,
                stderr=log,
            )

    async def start(self, *specs: SidecarSpec) -> None:
        for spec in specs:
            await self.launch(spec)
        for spec in specs:
            await self.sidecars.ready(spec.alloc, 15)

    async def stop_envoy(self, alloc: AllocId) -> None:
        await _end(self.envoys.pop(alloc))

    def log_file(self, alloc: AllocId) -> Path:
        return self.directory / f"{alloc}.log"

    def log(self, alloc: AllocId) -> list[dict[str, Any]]:
        """The sidecar's access log so far."""
        lines = self.log_file(alloc).read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def served(name: str, port: int, protocol: Protocol = Protocol.TCP) -> SidecarService:
    """A service whose workload listens on `port`."""
    return SidecarService(service=ServiceName(name), public_port=PUBLIC_PORT, workload_port=port, protocol=protocol)


def calling(name: str, *upstreams: tuple[str, int | None]) -> SidecarService:
    """A service that only calls. Sidecars share the machine's loopback here: one caller has an upstream's virtual
    address, others say a port."""
    return SidecarService(
        service=ServiceName(name),
        public_port=PUBLIC_PORT,
        upstreams=tuple(SidecarUpstream(service=ServiceName(to), local_port=port) for to, port in upstreams),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def endpoint(spec: SidecarSpec) -> Endpoint:
    """The endpoint that `spec`'s first service is, as its node's peers dial it."""
    return Endpoint(
        id=f"{spec.alloc}-proxy",
        node=spec.node,
        address="192.0.2.1",
        port=9,
        local_address=spec.local_address,
        local_port=spec.services[0].public_port,
        alloc=spec.alloc,
        outrider=True,
    )


async def until(probe: Callable[[], T | Awaitable[T]], deadline_s: float = 10) -> T:
    """Waits until `probe` gives something true, and returns that."""
    async with asyncio.timeout(deadline_s):
        while True:
            found = probe()
            value = await found if isinstance(found, Awaitable) else found
            if value:
                return value
            await asyncio.sleep(0.01)


async def get(url: str, **options: Any) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(options.pop("method", "GET"), url, **options) as response,
    ):
        return response.status, await response.text()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
