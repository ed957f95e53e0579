"""A service outside of Outrider, with Consul's own sidecar (`consul connect proxy`), calls one inside and is called."""

import asyncio
import itertools
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.core.mesh_view import updated
from agent.leaves import signing_request
from controller.core.mesh_intent import Interests, ServiceRegistration
from controller.mesh.mesh import Mesh as ControlPlane
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import Action, MeshView
from sidecar.core.intent import SidecarService, SidecarSpec, SidecarUpstream
from tests.integration.consul import RealConsul
from tests.integration.sidecar_mesh import PUBLIC_PORT, Mesh, free_port, until
from tests.integration.test_mesh import RealRecord, Running, node, running

pytestmark = [pytest.mark.host, pytest.mark.deep]

ALLOC, NODE = AllocId("00000000f1"), NodeId("n1")
DB, OUTSIDE = ServiceName("db"), ServiceName("outside")


class Echo:
    """Answers each line with its name before it."""

    def __init__(self, name: bytes) -> None:
        self._name = name
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if line := await reader.readline():
            writer.write(self._name + b" " + line)
        writer.close()


class Inside:
    """db: registered by the controller's mesh, behind a real sidecar, which calls outside too."""

    def __init__(self, mesh: Mesh, control: Running, port: int) -> None:
        self.mesh, self._control = mesh, control
        self.calls = free_port()  # where db's workload calls outside
        service = SidecarService(
            service=DB,
            public_port=PUBLIC_PORT,
            workload_port=port,
            upstreams=(SidecarUpstream(service=OUTSIDE, local_port=self.calls),),
        )
        self.spec: SidecarSpec = msgspec.structs.replace(mesh.spec(ALLOC, service), node=NodeId("test-n1"))
        self._addresses = {name: mesh.address() for name in (DB, OUTSIDE)}

    async def start(self) -> None:
        registered = ServiceRegistration(
            alloc=ALLOC, service=DB, protocol=Protocol.TCP, job=JobName("shop"), port=PUBLIC_PORT, passing=True
        )
        self._control.mesh.set_node(msgspec.structs.replace(node("n1", registered), address=self.spec.local_address))
        self._control.connect(NODE)
        await until(lambda: self.view().roots.trust_domain, 20)
        files = await self.mesh.sidecars.add(self.spec)
        request = signing_request(ec.generate_private_key(ec.SECP256R1()), "spiffe://unused")
        self.mesh.sidecars.set_leaf(await self._control.mesh.issue(DB, request))
        await self.mesh.run_envoy(self.spec, files)
        await until(self.shown, 20)
        await self.mesh.sidecars.ready(ALLOC, 20)

    def view(self) -> MeshView:
        """What the controller told the node; virtual addresses are of this test's own, for there is one loopback."""
        view = MeshView()
        for _, update in self._control.updates:
            view = updated(view, update)
        services = {
            name: msgspec.structs.replace(one, virtual_address=self._addresses[name])
            for name, one in view.services.items()
        }
        return msgspec.structs.replace(view, services=services)

    def shown(self) -> bool:
        """Tells the sidecar what there is; whether that has the other service."""
        view = self.view()
        self.mesh.sidecars.set_view(view)
        return OUTSIDE in view.services and bool(view.services[OUTSIDE].endpoints)


class Outside:
    """outside: registered with Consul's agent as its users do it, and `consul connect proxy` beside it."""

    def __init__(self, consul: RealConsul, port: int) -> None:
        self._consul, self._port = consul, port
        self.calls = free_port()  # where outside's workload calls db
        self._proxy: asyncio.subprocess.Process | None = None

    async def start(self, log: Path) -> None:
        proxy = {"upstreams": [{"destination_name": DB, "local_bind_port": self.calls}]}
        sidecar = {"port": free_port(), "address": "127.0.0.1", "proxy": proxy, "checks": []}
        service = {"name": OUTSIDE, "port": self._port, "connect": {"sidecar_service": sidecar}}
        url = f"{self._consul.url}/v1/agent/service/register"
        async with aiohttp.ClientSession() as session, session.put(url, json=service) as answer:
            assert answer.status == 200, await answer.text()
        words = ("connect", "proxy", "-sidecar-for", OUTSIDE, "-http-addr", self._consul.url, "-log-level", "debug")
        with log.open("ab") as file:
            self._proxy = await asyncio.create_subprocess_exec(self._consul.program, *words, stdout=file, stderr=file)

    async def stop(self) -> None:
        if self._proxy is not None:
            self._proxy.kill()
            await self._proxy.wait()


async def say(port: int) -> bytes:
    """What a line is answered with; b"" where nobody lets us."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    try:
        writer.write(b"hello\n")
        return await asyncio.wait_for(reader.read(), 10)
    except OSError:
        return b""
    finally:
        writer.close()


async def test_consuls_own_proxy_calls_a_sidecar_and_is_called_by_one_as_intentionssay(tmp_path: Path) -> None:
    record = RealRecord(tmp_path)
    await record.start()

    def prepare(control: ControlPlane) -> None:
        control.set_services({DB: (0, Protocol.TCP), OUTSIDE: (1, Protocol.TCP)})
        control.set_interests(NODE, Interests(called=frozenset({DB, OUTSIDE}), placed=frozenset({DB})))

    async with Echo(b"inside") as inner, Echo(b"outside") as outer, Mesh() as mesh, running(record, prepare) as control:
        outside = Outside(record._consul, outer.port)
        try:
            await outside.start(tmp_path / "proxy.log")
            inside = Inside(mesh, control, inner.port)
            await inside.start()

            async def answers(*, inwards: bytes, outwards: bytes) -> bool:
                inside.shown()
                return (await say(outside.calls), await say(inside.calls)) == (inwards, outwards)

            heard, told = b"inside hello\n", b"outside hello\n"
            pairs = ((OUTSIDE, DB), (DB, OUTSIDE))
            for allowed in itertools.product((False, True), repeat=2):
                for (source, destination), action in zip(pairs, allowed, strict=True):
                    verdict = Action.ALLOW if action else Action.DENY
                    await control.mesh.create_intention(source, destination, verdict)
                inwards, outwards = heard if allowed[0] else b"", told if allowed[1] else b""
                await until(lambda i=inwards, o=outwards: answers(inwards=i, outwards=o), 30)
        finally:
            await outside.stop()
            await record.stop()
