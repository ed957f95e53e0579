"""The mesh on a cluster of three real Consul servers, under load: sidecars route on, whichever of them die.

A controller's mesh writes and watches at the first server; two real Envoys do what it tells, and a caller calls
through them all the while, one new connection after the other, without trying twice.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.core.mesh_view import updated
from agent.leaves import signing_request
from controller.core.mesh_intent import Interests, OwnedIntention, ServiceRegistration
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.mesh import Mesh as ControlPlane
from controller.mesh.shapes import ConsulService, Txn, TxnService
from outrider.errors import PeerError
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Leaf, MeshUpdate, MeshView
from tests.faults.consul_cluster import ConsulCluster, Server, consul_cluster
from tests.integration.processes import until
from tests.integration.sidecar_mesh import PUBLIC_PORT, Mesh, calling, free_port, served
from tests.integration.test_interoperation import Echo, say
from tests.integration.test_mesh import CLUSTER, RealRecord, Running, node, running
from tests.integration.test_mesh_secured import issued_by

pytestmark = [
    pytest.mark.host,
    pytest.mark.deep,
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="module"),
]

WAIT_S = 60.0
WEB, DB = ServiceName("web"), ServiceName("db")
CALLER, CALLEE, OTHER = AllocId("00000000c1"), AllocId("00000000d1"), AllocId("00000000d2")
NODE = NodeId("n1")
IN_CONSUL = f"{CLUSTER}-{NODE}"
HEARD = b"db hello\n"


class AtServer(RealRecord):
    """A Consul that is there already."""

    def __init__(self, url: str) -> None:
        self.url = url


class Calls:
    """One after the other, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.done = self.failed = 0

    async def run(self) -> None:
        while True:
            answer = await say(self._port)
            self.done += 1
            self.failed += answer != HEARD
            await asyncio.sleep(0.02)

    async def go_on(self) -> None:
        """Some more are made, from now on."""
        before = self.done
        await until(lambda: self.done > before + 20, "calls go on", WAIT_S)


class Fleet:
    """web calls db, both behind real sidecars that know what the controller's mesh tells them."""

    def __init__(self, consul: ConsulCluster, mesh: Mesh, control: Running, port: int) -> None:
        self.consul, self.mesh, self.control = consul, mesh, control
        self.own, *self.others = consul.servers
        self._view = MeshView()
        self._address = mesh.address()
        self.port = free_port()
        at = NodeId(IN_CONSUL)
        self._callee = msgspec.structs.replace(mesh.spec(CALLEE, served("db", port)), node=at)
        self._caller = msgspec.structs.replace(mesh.spec(CALLER, calling("web", ("db", self.port))), node=at)
        control.mesh.deliver = self._take

    async def start(self) -> None:
        self.register(CALLEE)
        self.control.mesh.set_intentions((OwnedIntention(source=WEB, destination=DB, job=JobName("shop")),))
        self._take(NODE, self.control.mesh.full(NODE))
        await until(lambda: self._view.roots.trust_domain != "", "the roots are known", WAIT_S)
        await until(lambda: bool(self.endpoints()), "db is known", WAIT_S)
        for spec in (self._callee, self._caller):
            files = await self.mesh.sidecars.add(spec)
            self.mesh.sidecars.set_leaf(await self.issued(spec.services[0].service))
            await self.mesh.run_envoy(spec, files)
        for spec in (self._callee, self._caller):
            await self.mesh.sidecars.ready(spec.alloc, WAIT_S)
        await until(self.answers, "web may call db", WAIT_S)

    def register(self, *allocs: AllocId, passing: bool = True) -> None:
        """db's instances: each is the one that there really is."""
        wanted = (
            ServiceRegistration(
                alloc=alloc,
                service=DB,
                protocol=Protocol.TCP,
                job=JobName("shop"),
                port=2000,
                local_address=self._callee.local_address,
                local_port=PUBLIC_PORT,
                passing=passing,
            )
            for alloc in allocs
        )
        self.control.mesh.set_node(node(NODE, *wanted))

    def endpoints(self) -> set[str]:
        """The healthy ones, as the sidecars have them."""
        service = self._view.services.get(DB)
        return {one.id for one in service.endpoints if one.healthy} if service is not None else set()

    def roots(self) -> tuple[str, ...]:
        return self._view.roots.certificates_pem

    async def issued(self, service: ServiceName) -> Leaf:
        request = signing_request(ec.generate_private_key(ec.SECP256R1()), "spiffe://unused")
        return await self.control.mesh.issue(service, request)

    async def answers(self) -> bool:
        return await say(self.port) == HEARD

    async def silent(self) -> bool:
        return await say(self.port) == b""

    async def passing(self, server: Server) -> set[str]:
        """db's proxies that are healthy, by this server's own word."""

        def ask() -> set[str]:
            rows = server.get("health/connect/db?passing&stale")
            assert isinstance(rows, list)
            return {row["Service"]["ID"] for row in rows}

        try:
            return await asyncio.to_thread(ask)
        except (OSError, ValueError):
            return {"no answer"}

    async def everywhere(self, *instances: str) -> None:
        for server in self.consul.servers:

            async def known(server: Server = server) -> bool:
                return await self.passing(server) == set(instances)

            await until(known, f"{server.name} has {instances or 'nobody'}", WAIT_S)

    async def whole(self) -> None:
        await until(self.consul.ready, "Consul is whole", WAIT_S)
        await until(lambda: self.control.mesh.reachable, "its answers are heard", WAIT_S)

    async def led_by_another(self) -> Server:
        """A server other than the controller's own that leads Raft."""
        await self.whole()
        while (leader := await asyncio.to_thread(self.consul.leader)) is self.own:
            self.own.kill()
            await until(self._elected, "another one leads", WAIT_S)
            self.consul.start_server(self.own)
            await self.whole()
        return leader

    async def _elected(self) -> bool:
        def ask() -> bool:
            led = self.others[0].get("status/leader")
            return isinstance(led, str) and bool(led) and not led.endswith(f":{self.own.rpc}")

        with contextlib.suppress(OSError, ValueError):
            return await asyncio.to_thread(ask)
        return False

    def _take(self, told: NodeId, update: MeshUpdate) -> None:
        self.control.take(told, update)
        self._view = updated(self._view, update)
        # Virtual addresses are of this test's own, for there is one loopback.
        services = {
            name: msgspec.structs.replace(one, virtual_address=self._address)
            for name, one in self._view.services.items()
        }
        self.mesh.sidecars.set_view(msgspec.structs.replace(self._view, services=services))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    def prepare(control: ControlPlane) -> None:
        control.set_services({WEB: (0, Protocol.TCP), DB: (1, Protocol.TCP)})
        control.set_interests(NODE, Interests(called=frozenset({DB}), placed=frozenset({WEB, DB})))

    directory: Path = tmp_path_factory.mktemp("consuls")
    async with (
        consul_cluster(directory) as consul,
        Echo(b"db") as echo,
        Mesh() as mesh,
        running(AtServer(consul.servers[0].url), prepare) as control,
    ):
        made = Fleet(consul, mesh, control, echo.port)
        await made.start()
        yield made


@contextlib.asynccontextmanager
async def no_call_fails(fleet: Fleet) -> AsyncIterator[Calls]:
    """While what is inside happens, and for some calls after it."""
    await fleet.whole()
    await until(fleet.answers, "web calls db", WAIT_S)
    calls = Calls(fleet.port)
    task = asyncio.create_task(calls.run(), name="calls")
    try:
        await calls.go_on()
        yield calls
        await calls.go_on()
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert calls.failed == 0, f"{calls.failed} of {calls.done} calls failed"


async def test_every_server_knows_what_is_registered_and_its_health_decides(fleet: Fleet) -> None:
    await fleet.everywhere(f"{CALLEE}-db-proxy")
    fleet.register(CALLEE, passing=False)
    await fleet.everywhere()
    await until(fleet.silent, "a sick instance gets no calls", WAIT_S)
    fleet.register(CALLEE, OTHER)
    await fleet.everywhere(f"{CALLEE}-db-proxy", f"{OTHER}-db-proxy")
    fleet.register(CALLEE)
    await fleet.everywhere(f"{CALLEE}-db-proxy")
    await until(fleet.answers, "it is well again", WAIT_S)


async def test_an_intention_decides_whichever_server_is_asked(fleet: Fleet) -> None:
    await fleet.control.mesh.create_intention(WEB, DB, Action.DENY, "an incident")
    await until(fleet.silent, "denied by hand", WAIT_S)
    for server in fleet.consul.servers:
        at = ConsulAdapter(server.url)
        try:
            await at.probe()

            async def denied(at: ConsulAdapter = at) -> bool:
                _, found = await at.watch_intentions(0)
                return any((one.source_name, one.destination_name, one.action) == (WEB, DB, "deny") for one in found)

            await until(denied, f"{server.name} says so", WAIT_S)
        finally:
            await at.close()
    assert await fleet.control.mesh.delete_intention(WEB, DB)
    await until(fleet.answers, "the job's own line holds again", WAIT_S)


async def test_with_the_leader_lost_calls_go_on_and_so_do_writes(fleet: Fleet) -> None:
    leader = await fleet.led_by_another()
    async with no_call_fails(fleet) as calls:
        leader.kill()
        await calls.go_on()
        fleet.register(CALLEE, OTHER)
        await until(lambda: len(fleet.endpoints()) == 2, "written through the next leader, and told", WAIT_S)
        fleet.register(CALLEE)
        await until(lambda: len(fleet.endpoints()) == 1, "and taken out", WAIT_S)
        fleet.consul.start_server(leader)
        await fleet.whole()
    await fleet.everywhere(f"{CALLEE}-db-proxy")


async def test_without_a_quorum_calls_go_on_by_what_was_known_last(fleet: Fleet) -> None:
    async with no_call_fails(fleet) as calls:
        for server in fleet.others:
            server.kill()
        await until(lambda: not fleet.control.mesh.reachable, "it shows", WAIT_S)
        assert fleet.endpoints() == {f"{CALLEE}-db"}
        fleet.register(CALLEE, OTHER)  # wanted meanwhile
        await calls.go_on()
        for server in fleet.others:
            fleet.consul.start_server(server)
        await fleet.whole()
        await until(lambda: len(fleet.endpoints()) == 2, "what was wanted meanwhile is there", WAIT_S)
        fleet.register(CALLEE)
        await until(lambda: len(fleet.endpoints()) == 1, "and goes", WAIT_S)


async def test_what_others_changed_while_its_server_was_away_is_repaired(fleet: Fleet) -> None:
    async with no_call_fails(fleet) as calls:
        fleet.own.kill()
        await until(lambda: not fleet.control.mesh.reachable, "it shows", WAIT_S)
        await calls.go_on()
    at = ConsulAdapter(fleet.others[0].url)
    try:
        await at.probe()
        proxy = ConsulService(id=f"{CALLEE}-db-proxy", service="db-sidecar-proxy")
        ghost = ConsulService(id="ghost-db", service="db", port=9)

        async def meddled() -> bool:
            changes = [
                Txn(service=TxnService(verb="delete", node=IN_CONSUL, service=proxy)),
                Txn(service=TxnService(verb="set", node=IN_CONSUL, service=ghost)),
            ]
            with contextlib.suppress(PeerError):  # while the other two agree on who leads
                return not (await at.transact(changes)).errors
            return False

        await until(meddled, "others change the catalog", WAIT_S)
    finally:
        await at.close()
    fleet.consul.start_server(fleet.own)
    await fleet.whole()
    await fleet.everywhere(f"{CALLEE}-db-proxy")

    async def exact() -> bool:
        return await fleet.control.registered(IN_CONSUL) == {f"{CALLEE}-db", f"{CALLEE}-db-proxy"}

    await until(exact, "the ghost is gone", WAIT_S)
    await until(fleet.answers, "web calls db", WAIT_S)


async def test_consuls_root_is_rotated_and_no_call_fails(fleet: Fleet) -> None:
    await fleet.whole()
    (old,) = fleet.roots()
    async with no_call_fails(fleet) as calls:
        # Another key is another root, which the old one signs crosswise.
        key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        config = {"Provider": "consul", "Config": {"PrivateKey": key.decode(), "RootCert": ""}}
        url = f"{fleet.others[1].url}/v1/connect/ca/configuration"
        async with aiohttp.ClientSession() as session, session.put(url, json=config) as answer:
            assert answer.status == 200, await answer.text()
        await until(lambda: len(fleet.roots()) == 2, "sidecars trust both roots", WAIT_S)
        new, kept = fleet.roots()
        assert kept == old
        await calls.go_on()
        for service in (DB, WEB):  # one after the other: for a while each trusts what the other shows
            issued: list[Leaf] = []

            async def renewed(service: ServiceName = service, issued: list[Leaf] = issued) -> bool:
                with contextlib.suppress(PeerError):  # as an agent, which asks again
                    issued.append(await fleet.issued(service))
                return bool(issued) and issued_by(issued[-1], new)

            await until(renewed, "Consul's agent renews the leaf", 2 * WAIT_S)
            assert not issued[-1].superseded
            fleet.mesh.sidecars.set_leaf(issued[-1])
            await calls.go_on()
