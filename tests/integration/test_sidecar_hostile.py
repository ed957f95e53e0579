"""What goes wrong around sidecars, or is made to: contained, told of in words, and over when its cause is."""

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action
from sidecar.core.intent import SidecarSpec
from tests.integration.certificates import Authority
from tests.integration.sidecar_mesh import TRUST_DOMAIN, Mesh, calling, endpoint, get, served, until

pytestmark = pytest.mark.host

API, API_2, WEB = AllocId("00000000d1"), AllocId("00000000d2"), AllocId("00000000d3")


class Shop:
    """web calls api, of which there are two copies."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.copies: list[SidecarSpec] = []
        self.url = ""

    async def start(self, port: int) -> None:
        self.copies = [self.mesh.spec(alloc, served("api", port, Protocol.HTTP)) for alloc in (API, API_2)]
        self.mesh.intend("api", ("web", Action.ALLOW))
        self.serve(*self.copies)
        await self.mesh.start(*self.copies, self.mesh.spec(WEB, calling("web", ("api", None))))
        self.url = f"http://{next(iter(self.mesh.services.values())).virtual_address}:15001/"

    def serve(self, *copies: SidecarSpec) -> None:
        """These are in the catalog, from now on."""
        self.mesh.service("api", Protocol.HTTP, *map(endpoint, copies))
        self.mesh.publish()

    @property
    def public(self) -> tuple[str, int]:
        """Where api's first sidecar takes calls, from whoever reaches it."""
        return self.copies[0].local_address, self.copies[0].services[0].public_port


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="api")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with Mesh() as mesh:
        shop = Shop(mesh)
        await shop.start(runner.addresses[0][1])
        yield shop
    await runner.cleanup()


async def test_an_endpoint_that_flaps_ten_times_a_second_fails_no_request(shop: Shop) -> None:
    statuses: list[int] = []
    flapping = True

    async def call() -> None:
        while flapping:
            statuses.append((await get(shop.url))[0])

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(call())
        for number in range(20):
            shop.serve(*shop.copies[: 1 + number % 2])
            before = len(statuses)
            await until(lambda before=before: len(statuses) > before + 4)
        flapping = False
    assert set(statuses) == {200}
    assert await shop.mesh.sidecars.acknowledged(10) == ()


async def test_a_certificate_that_expired_is_named_as_the_reason_and_the_next_one_mends_it(shop: Shop) -> None:
    shop.mesh.sidecars.set_leaf(shop.mesh.authority.leaf("api", expired=True))
    assert await shop.mesh.sidecars.acknowledged(10) == ()

    async def refused() -> str:
        """Connections that were made before live on: only a new one proves anything."""
        status, text = await get(shop.url)
        return text if status == 503 else ""

    for alloc in (API, API_2):  # connections of before end with their Envoys
        await shop.mesh.stop_envoy(alloc)
    for spec in shop.copies:
        await shop.mesh.sidecars.remove(spec.alloc)
        await shop.mesh.run_envoy(spec, await shop.mesh.sidecars.add(spec))
        await shop.mesh.sidecars.ready(spec.alloc, 15)
    text = await until(refused)
    assert "CERTIFICATE_VERIFY_FAILED" in text
    shop.mesh.sidecars.set_leaf(shop.mesh.authority.leaf("api"))
    assert await shop.mesh.sidecars.acknowledged(10) == ()

    async def mended() -> bool:
        return (await get(shop.url))[0] == 200

    await until(mended, 20)


async def test_who_reaches_a_public_port_needs_a_certificate_of_this_mesh(shop: Shop) -> None:
    forged = Authority(TRUST_DOMAIN, "dc1").leaf("web")  # the right name, signed by somebody else
    true = shop.mesh.authority.leaf("web")
    assert await _speak(shop, b"GET / HTTP/1.1\r\nhost: api\r\n\r\n", None) == b""
    for leaf, answered in ((None, False), (forged, False), (true, True)):
        context = _context(leaf.certificate_pem + leaf.key_pem if leaf is not None else None)
        said = await _speak(shop, b"GET / HTTP/1.1\r\nhost: api\r\nconnection: close\r\n\r\n", context)
        assert (b"200 OK" in said) is answered
    for noise in (b"\x16\x03\x01\x02\x00\x01", bytes(range(256)) * 64):
        assert b"HTTP/1.1" not in await _speak(shop, noise, None)
    assert (await get(shop.url))[0] == 200


async def test_ten_megabytes_of_headers_are_refused_by_the_callers_own_sidecar(shop: Shop) -> None:
    host, _, port = shop.url.removeprefix("http://").strip("/").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nhost: api\r\nx-large: " + b"a" * (10 << 20) + b"\r\n\r\n")
    answer = b""
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    assert not answer or answer.startswith(b"HTTP/1.1 431"), answer[:80]
    assert (await get(shop.url))[0] == 200


def _context(identity: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if identity is not None:
        with tempfile.TemporaryDirectory() as directory:
            pem = Path(directory) / "identity.pem"
            pem.write_text(identity)
            context.load_cert_chain(pem)
    return context


async def _speak(shop: Shop, words: bytes, tls: ssl.SSLContext | None) -> bytes:
    """What api's public port answers; b"" where it hangs up."""
    try:
        reader, writer = await asyncio.open_connection(*shop.public, ssl=tls)
    except OSError:
        return b""
    try:
        writer.write(words)
        if tls is None:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 15)
    except OSError:
        return b""
    finally:
        writer.close()
