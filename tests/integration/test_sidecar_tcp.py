"""TCP between real Envoys: identities, grants and revocations, rotation, changes of endpoints."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action, spiffe_id
from sidecar.core.intent import SidecarSpec
from tests.integration.certificates import Authority
from tests.integration.sidecar_mesh import TRUST_DOMAIN, Mesh, calling, endpoint, free_port, served, until

pytestmark = pytest.mark.host

DB, DB_2, WEB = AllocId("00000000d1"), AllocId("00000000d2"), AllocId("00000000e1")


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh:
        yield mesh


@asynccontextmanager
async def _workload(name: bytes, *, greets: bool = False) -> AsyncIterator[int]:
    """Answers each line with its name and the line; the port it listens on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if greets:
            writer.write(b"greeting\n")
        while line := await reader.readline():
            writer.write(name + b" " + line)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


class Shop:
    """web, admin and thief -> db, all callers in one sidecar."""

    def __init__(self, mesh: Mesh, port: int) -> None:
        self.mesh = mesh
        self.db = mesh.spec(DB, served("db", port))
        self.ports = {name: free_port() for name in ("web", "admin", "thief")}
        self.callers = mesh.spec(WEB, *(calling(name, ("db", to)) for name, to in self.ports.items()))

    async def start(self) -> None:
        self.mesh.service("db", Protocol.TCP, endpoint(self.db))
        self.allow("web", "admin")
        await self.mesh.start(self.db, self.callers)

    def allow(self, *sources: str) -> None:
        rules = [(source, Action.ALLOW) for source in sources]
        self.mesh.intend("db", *rules, *([] if "*" in sources else [("*", Action.DENY)]))
        self.mesh.publish()

    async def connect(self, source: str) -> "Connection":
        return Connection(*await asyncio.open_connection("127.0.0.1", self.ports[source]))


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, line: bytes = b"ping") -> bytes:
        """The answer; b"" where the connection was closed instead."""
        try:
            self._writer.write(line + b"\n")
            return await asyncio.wait_for(self._reader.readline(), 5)
        except ConnectionError:
            return b""

    async def closed(self) -> bool:
        try:
            return await asyncio.wait_for(self._reader.read(1), 5) == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def test_a_connection_is_logged_with_both_identities_and_counted(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        connection = await shop.connect("web")
        assert await connection.ask() == b"db ping\n"
        await connection.close()
        inbound = (await until(lambda: mesh.log(DB)))[0]
        outbound = (await until(lambda: mesh.log(WEB)))[0]
        assert (
            inbound["caller"]
            == outbound["identity"]
            == spiffe_id(TRUST_DOMAIN, "dc1", shop.callers.services[0].service)
        )
        assert inbound["identity"] == outbound["callee"] == spiffe_id(TRUST_DOMAIN, "dc1", shop.db.services[0].service)
        stats = (await mesh.sidecars.stats(DB)).inbound[0]
        assert (stats.destination, stats.connections) == ("db", 1)
        assert stats.bytes_sent > 0
        assert stats.bytes_received > 0


async def test_a_refused_connection_is_named_to_the_agent(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        connection = await shop.connect("thief")
        assert await connection.ask() == b""
        await connection.close()
        refusal = await asyncio.wait_for(mesh.sidecars.refusals.get(), 5)
        assert refusal.source_spiffe == f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/thief"
        assert (refusal.rule, refusal.intention_id) == ("deny:*->db:id-any", "id-any")
        assert (await mesh.sidecars.stats(DB)).inbound[0].refused == 1
        assert (await until(lambda: mesh.log(DB)))[0]["details"] == f"rbac_access_denied_matched_policy[{refusal.rule}]"


async def test_anyone_means_services_not_whatever_else_the_authority_signed(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        shop.allow("*")
        for service, name in (("thief", f"spiffe://{TRUST_DOMAIN}/agent/client/dc/dc1/id/x"), ("admin", "")):
            mesh.sidecars.set_leaf(mesh.authority.leaf(service, name))
        assert await mesh.sidecars.acknowledged(5) == ()
        for caller, answer in (("thief", b""), ("admin", b"db ping\n")):
            connection = await shop.connect(caller)
            assert await connection.ask() == answer
            await connection.close()
        refusal = await asyncio.wait_for(mesh.sidecars.refusals.get(), 5)
        assert (refusal.source_spiffe, refusal.rule) == (f"spiffe://{TRUST_DOMAIN}/agent/client/dc/dc1/id/x", "")


async def test_a_peer_under_another_name_is_not_talked_to(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        wrong = mesh.authority.leaf("db", f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/impostor")
        mesh.sidecars.set_leaf(wrong)
        assert await mesh.sidecars.acknowledged(5) == ()
        connection = await shop.connect("web")
        assert await connection.ask() == b""
        await connection.close()
        outbound = (await until(lambda: mesh.log(WEB)))[0]
        assert "CERTIFICATE_VERIFY_FAILED" in outbound["connect_error"]


async def test_a_refused_caller_of_a_server_that_speaks_first_is_cut_at_its_own_first_byte(mesh: Mesh) -> None:
    """Envoy asks RBAC at the first byte of the caller: until then it may hear a greeting, as with any Envoy mesh."""
    async with _workload(b"db", greets=True) as port:
        shop = Shop(mesh, port)
        await shop.start()
        connection = await shop.connect("thief")
        assert await connection.ask() in (b"greeting\n", b"")
        assert await connection.ask() == b""
        await connection.close()


async def test_a_grant_leaves_open_connections_and_a_revocation_cuts_them(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        web = await shop.connect("web")
        assert await web.ask() == b"db ping\n"
        shop.allow("web", "admin", "thief")
        assert await mesh.sidecars.acknowledged(5) == ()
        thief = await shop.connect("thief")
        assert await thief.ask() == b"db ping\n"
        assert await web.ask() == b"db ping\n"
        shop.allow("web", "admin")
        cut = asyncio.create_task(thief.closed(), name="cut")
        while not cut.done():  # those who may call never meet a closed door meanwhile
            again = await shop.connect("web")
            assert await again.ask() == b"db ping\n"
            await again.close()
        assert cut.result()
        for connection in (web, thief):
            await connection.close()


async def test_a_view_that_does_not_know_the_service_yet_takes_nothing_away(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        sent = mesh.sidecars.resources_sent
        mesh.intentions.clear()
        mesh.publish()
        assert await mesh.sidecars.acknowledged(5) == ()
        assert mesh.sidecars.resources_sent == sent
        connection = await shop.connect("web")
        assert await connection.ask() == b"db ping\n"
        await connection.close()


async def test_leaves_and_roots_rotate_under_load_without_a_dropped_connection(mesh: Mesh) -> None:
    async with _workload(b"db") as port:
        shop = Shop(mesh, port)
        await shop.start()
        old = await shop.connect("web")
        assert await old.ask() == b"db ping\n"
        asked = 0
        done = asyncio.Event()

        async def load() -> None:
            nonlocal asked
            while not done.is_set():
                connection = await shop.connect("admin")
                assert await connection.ask() == b"db ping\n"
                await connection.close()
                asked += 1

        async def more() -> None:
            assert await mesh.sidecars.acknowledged(5) == ()
            goal = asked + 20
            await until(lambda: asked >= goal)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(), name="load")
            await more()
            for name in ("db", "admin"):
                mesh.sidecars.set_leaf(mesh.authority.leaf(name))
            await more()
            fresh = Authority(TRUST_DOMAIN, "dc1")
            mesh.roots.insert(0, fresh.certificate_pem)
            mesh.publish()
            await more()
            for name in ("db", "admin", "web", "thief"):
                mesh.sidecars.set_leaf(fresh.leaf(name))
            await more()
            mesh.roots.pop()
            mesh.publish()
            await more()
            done.set()
        assert await old.ask() == b"db ping\n"
        await old.close()


async def test_new_connections_follow_the_endpoints_and_open_ones_stay(mesh: Mesh) -> None:
    async with _workload(b"db") as port, _workload(b"other") as other_port:
        shop = Shop(mesh, port)
        await shop.start()
        other: SidecarSpec = mesh.spec(DB_2, served("db", other_port))
        await mesh.start(other)
        old = await shop.connect("web")
        assert await old.ask() == b"db ping\n"
        mesh.service("db", Protocol.TCP, endpoint(other))
        mesh.publish()
        assert await mesh.sidecars.acknowledged(5) == ()
        fresh = await shop.connect("web")
        assert await fresh.ask() == b"other ping\n"
        assert await old.ask() == b"db ping\n"
        for connection in (old, fresh):
            await connection.close()
