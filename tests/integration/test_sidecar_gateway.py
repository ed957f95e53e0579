"""A gateway by a real Envoy: hosts and paths, HTTP/1.1 and HTTP/2, TLS, connections; and callers who mean no good."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
from aiohttp import web
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived

from outrider.errors import PeerError
from outrider.ids import AllocId, SecretName, ServiceName
from outrider.model.gateway import GatewayRoute
from outrider.model.job import Protocol
from outrider.model.mesh import Action
from sidecar.core.intent import SidecarGateway
from tests.integration.sidecar_mesh import Mesh, calling, endpoint, free_port, get, served

pytestmark = pytest.mark.host

WEB, API, DB, EDGE = AllocId("00000000c1"), AllocId("00000000c2"), AllocId("00000000c3"), AllocId("00000000c9")
CERTIFICATE = SecretName("edge-tls")


class Edge:
    """edge lets callers from outside to web, to api below /api/, and to db's port."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.plain, self.tls, self.tcp = free_port(), free_port(), free_port()
        self.address = ""

    async def start(self, ports: dict[str, int]) -> None:
        specs = [
            self.mesh.spec(alloc, served(name, ports[name], protocol))
            for alloc, name, protocol in (
                (WEB, "web", Protocol.HTTP),
                (API, "api", Protocol.HTTP),
                (DB, "db", Protocol.TCP),
            )
        ]
        for spec in specs:
            service = spec.services[0]
            self.mesh.service(service.service, service.protocol, endpoint(spec))
            self.mesh.intend(service.service, ("edge", Action.ALLOW))
        routes = (
            GatewayRoute(to=ServiceName("web"), host="shop.example"),
            GatewayRoute(to=ServiceName("api"), host="shop.example", prefix="/api/"),
            GatewayRoute(to=ServiceName("api"), host="*.api.example"),
        )
        gateway = (
            SidecarGateway(port=self.plain, routes=routes),
            SidecarGateway(port=self.tls, routes=routes, secret=CERTIFICATE),
            SidecarGateway(port=self.tcp, to=ServiceName("db")),
        )
        caller = calling("edge", ("web", None), ("api", None), ("db", None))
        spec = self.mesh.spec(EDGE, msgspec.structs.replace(caller, gateway=gateway))
        self.address = spec.local_address
        self.mesh.publish()
        for each in specs:
            await self.mesh.launch(each)
        await self.mesh.launch(spec)
        with pytest.raises(PeerError, match="secret edge-tls"):
            await self.mesh.sidecars.ready(EDGE, 0.1)
        leaf = self.mesh.authority.leaf("edge", "https://shop.example")
        self.mesh.sidecars.set_gateway_certificate(EDGE, CERTIFICATE, leaf.certificate_pem + leaf.key_pem)
        for alloc in (WEB, API, DB, EDGE):
            await self.mesh.sidecars.ready(alloc, 15)

    async def ask(self, path: str, host: str = "shop.example", **headers: str) -> tuple[int, str]:
        return await get(f"http://{self.address}:{self.plain}{path}", headers={"host": host, **headers})


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    def answering(name: str) -> web.Application:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(text=f"{name} {request.path} {request.headers.get('x-forwarded-for', '-')}")

        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", answer)
        return app

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"db " + await reader.readline())
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        ports = {}
        for name in ("web", "api"):
            runner = web.AppRunner(answering(name))
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports[name] = runner.addresses[0][1]
        server = await stack.enter_async_context(await asyncio.start_server(greet, "127.0.0.1", 0))
        ports["db"] = server.sockets[0].getsockname()[1]
        edge = Edge(await stack.enter_async_context(Mesh()))
        await edge.start(ports)
        yield edge


async def test_hosts_and_the_longest_prefix_choose_and_the_rest_is_told_so(edge: Edge) -> None:
    assert (await edge.ask("/a"))[1].startswith("web /a ")
    assert (await edge.ask("/api/a"))[1].startswith("api /api/a ")
    assert (await edge.ask("/apiary"))[1].startswith("web ")
    assert (await edge.ask("/x", "v1.api.example:8443"))[1].startswith("api ")
    status, text = await edge.ask("/", "other.example")
    assert (status, text) == (404, "outrider: this gateway has no route for the host and path that were asked for\n")
    # What the caller claims stands before what was seen.
    seen = (await edge.ask("/"))[1].split()[2]
    assert (await edge.ask("/", **{"x-forwarded-for": "203.0.113.9"}))[1].split()[2] == f"203.0.113.9,{seen}"
    reader, writer = await asyncio.open_connection(edge.address, edge.tcp)
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.read(), 10) == b"db hello\n"
    writer.close()


async def test_tls_speaks_both_versions_of_http_and_a_malformed_greeting_is_nobodys_harm(edge: Edge) -> None:
    trusting = ssl.create_default_context(cadata=edge.mesh.authority.certificate_pem)
    trusting.check_hostname = False  # the test's authority signs URIs
    url = f"https://{edge.address}:{edge.tls}/"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, ssl=trusting, headers={"host": "shop.example"}) as response,
    ):
        assert (response.status, (await response.text())[:3]) == (200, "web")
    assert await _http2_status(edge, trusting) == "200"
    for greeting in (
        _client_hello(b"shop..example\xff"),
        _client_hello(b""),
        b"\x16\x03\x01\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        assert b"HTTP/1.1 200" not in await _until_refused(edge.address, edge.tls, greeting, end=True)
    assert (await edge.ask("/"))[0] == 200


async def test_ten_megabytes_of_headers_and_a_caller_who_dawdles_are_cut_off_and_others_served(edge: Edge) -> None:
    reader, slow = await asyncio.open_connection(edge.address, edge.plain)
    slow.write(b"GET / HTTP/1.1\r\nhost: shop.example\r\nx-a: ")  # and nothing more: its end is not told
    large = await _until_refused(
        edge.address,
        edge.plain,
        b"GET / HTTP/1.1\r\nhost: shop.example\r\nx-large: " + b"a" * (10 << 20) + b"\r\n\r\n",
    )
    assert not large or large.startswith(b"HTTP/1.1 431"), large[:80]
    assert (await edge.ask("/", bad_name="x"))[0] == 400, "what some servers read as bad-name"
    assert (await edge.ask("/"))[0] == 200
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.startswith(b"HTTP/1.1 408"), answer[:80]
    slow.close()


async def _until_refused(address: str, port: int, request: bytes, *, end: bool = False) -> bytes:
    """What was answered; b"" where it hung up on us in the middle."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(request)
        await writer.drain()
        if end:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 15)
    except OSError:
        return b""
    finally:
        writer.close()


async def _http2_status(edge: Edge, trusting: ssl.SSLContext) -> str:
    trusting.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(edge.address, edge.tls, ssl=trusting, server_hostname="shop.example")
    http = H2Connection(H2Configuration(header_encoding="utf-8"))
    http.initiate_connection()
    names = ((":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "shop.example"))
    http.send_headers(1, list(names), end_stream=True)
    try:
        async with asyncio.timeout(15):
            while True:
                writer.write(http.data_to_send())
                for event in http.receive_data(await reader.read(65_536)):
                    if isinstance(event, ResponseReceived):
                        return str(dict(event.headers or ())[":status"])
    finally:
        writer.close()


def _client_hello(name: bytes) -> bytes:
    """TLS 1.2's greeting with `name` as server name, whatever is in it."""
    entry = b"\x00" + len(name).to_bytes(2) + name
    listed = len(entry).to_bytes(2) + entry
    extensions = b"\x00\x00" + len(listed).to_bytes(2) + listed
    body = (
        b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\xc0\x2b" + b"\x01\x00" + len(extensions).to_bytes(2) + extensions
    )
    hello = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(hello).to_bytes(2) + hello
