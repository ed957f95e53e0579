"""The embedded catalog alone: what it keeps over restarts, and who may do what by which certificate."""

import asyncio
import contextlib
import json
import sqlite3
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controller.ca import FleetCa
from controller.catalog.catalog import Catalog
from outrider.errors import ConfigError, JournalError
from outrider.log import Log
from outrider.tls import CONTROLLER_NAME, TlsFiles, ssl_context
from tests.integration.processes import until

CLUSTER = "test"


def catalog_in(directory: Path, tls: ssl.SSLContext | None = None) -> Catalog:
    listen = ("127.0.0.1", 0) if tls is not None else None
    return Catalog(
        database=directory / "catalog.db",
        socket=directory / "catalog.sock",
        listen=listen,
        tls=tls,
        cluster=CLUSTER,
        log=Log("catalog"),
    )


@contextlib.asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Catalog]:
    catalog = catalog_in(directory)
    await catalog.start()
    try:
        yield catalog
    finally:
        await catalog.stop()


async def ask(directory: Path, method: str, path: str, body: Any = None) -> tuple[int, Any, int]:
    connector = aiohttp.UnixConnector(str(directory / "catalog.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        return await request(session, "http://catalog", method, path, body)


async def request(
    session: aiohttp.ClientSession, base: str, method: str, path: str, body: Any = None
) -> tuple[int, Any, int]:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    async with session.request(method, f"{base}/v1/{path}", data=data, server_hostname=CONTROLLER_NAME) as answer:
        text = await answer.text()
        found = json.loads(text) if "json" in answer.headers["Content-Type"] else text
        return answer.status, found, int(answer.headers.get("X-Consul-Index", "0"))


async def test_a_restart_keeps_everything_and_the_index_never_falls(tmp_path: Path) -> None:
    async with started(tmp_path) as catalog:
        root = catalog.ca.certificate_pem
        _, session, _ = await ask(tmp_path, "PUT", "session/create", {"TTL": "60s"})
        await ask(tmp_path, "PUT", f"kv/lock?acquire={session['ID']}", b"mine")
        await ask(tmp_path, "PUT", "kv/gone", b"x")
        await ask(tmp_path, "DELETE", "kv/gone")
        service = {"ID": "1", "Service": "web", "Port": 80}
        await ask(tmp_path, "PUT", "catalog/register", {"Node": "n", "Address": "10.0.0.1", "Service": service})
        body = {"SourceName": "web", "DestinationName": "api", "Action": "allow"}
        _, intention, _ = await ask(tmp_path, "POST", "connect/intentions", body)
        _, rows, before = await ask(tmp_path, "GET", "health/service/web")

    async with started(tmp_path) as again:
        assert again.ca.certificate_pem == root
        _, found, _ = await ask(tmp_path, "GET", "kv/lock")
        assert found[0]["Session"] == session["ID"]
        assert (await ask(tmp_path, "PUT", f"session/renew/{session['ID']}"))[0] == 200
        assert (await ask(tmp_path, "GET", "kv/gone"))[0] == 404
        _, kept, after = await ask(tmp_path, "GET", "health/service/web")
        assert kept == rows
        assert after > before
        assert (await ask(tmp_path, "GET", f"connect/intentions/{intention['ID']}"))[0] == 200


async def test_its_files_are_the_controllers_alone(tmp_path: Path) -> None:
    async with started(tmp_path):
        for name in ("catalog.db", "catalog.sock"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


async def test_a_blocked_query_is_answered_when_the_catalog_stops(tmp_path: Path) -> None:
    async with started(tmp_path) as catalog:
        _, _, index = await ask(tmp_path, "GET", "catalog/nodes")
        waiting = asyncio.create_task(ask(tmp_path, "GET", f"catalog/nodes?index={index}&wait=60s"))
        await until(lambda: catalog.waiting == 1, "the query waits")
    assert (await asyncio.wait_for(waiting, 5))[0] == 200


async def test_a_client_that_leaves_leaves_nothing_waiting(tmp_path: Path) -> None:
    async with started(tmp_path) as catalog:
        _, _, index = await ask(tmp_path, "GET", "catalog/nodes")
        waiting = asyncio.create_task(ask(tmp_path, "GET", f"catalog/nodes?index={index}&wait=60s"))
        await until(lambda: catalog.waiting == 1, "the query waits")
        waiting.cancel()
        await until(lambda: catalog.waiting == 0, "nobody waits")


async def test_refusals_are_counted_by_route_and_say_what_is_wrong(tmp_path: Path) -> None:
    async with started(tmp_path) as catalog:
        status, text, _ = await ask(tmp_path, "PUT", "catalog/register", {"Node": 7})
        assert (status, text) == (400, "Request decode failed: Expected `str`, got `int` - at `$.Node`\n")
        status, text, _ = await ask(tmp_path, "GET", "acl/tokens")
        assert status == 404
        assert "/v1/acl/tokens: the embedded catalog has no such endpoint" in text
        status, text, _ = await ask(tmp_path, "GET", "catalog/nodes?filter=Node==x")
        assert status == 400
        assert "?filter" in text
        assert catalog.requests["PUT /catalog/register", 400] == 1
        assert catalog.requests["unknown", 404] == 1


async def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(JournalError, match=r"catalog\.db"):
        await catalog_in(tmp_path).start()


async def test_a_port_without_certificates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"catalog\.listen"):
        Catalog(
            database=tmp_path / "c.db",
            socket=tmp_path / "c.sock",
            listen=("127.0.0.1", 0),
            tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
            cluster=CLUSTER,
            log=Log("catalog"),
        )


async def test_a_write_that_cannot_be_kept_is_not_acknowledged_and_ends_the_catalog(tmp_path: Path) -> None:
    async with started(tmp_path) as catalog:
        with sqlite3.connect(tmp_path / "catalog.db") as other:
            other.execute("DROP TABLE rows")
        status, text, _ = await ask(tmp_path, "PUT", "kv/x", b"y")
        assert (status, text[:8]) == (500, "not done")
        with pytest.raises(JournalError, match="cannot be written"):
            await asyncio.wait_for(catalog.failed(), 5)
        other.close()


READ = ("GET", "catalog/nodes")
KEYS = ("GET", "session/list")
WRITE = ("PUT", "kv/x")
INTEND = ("POST", "connect/intentions")
LEAF = ("GET", "agent/connect/ca/leaf/web")


async def test_a_certificate_decides_what_may_be_done(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours, theirs = FleetCa(tmp_path / "ours", CLUSTER), FleetCa(tmp_path / "theirs", CLUSTER)
    server = ours.issue_server(["127.0.0.1"])
    catalog = catalog_in(tmp_path, ssl_context(server, server=True))
    await catalog.start()
    try:
        base = f"https://127.0.0.1:{catalog.port}"
        async with by(ours.issue_operator("ada")) as ada:
            assert await statuses(ada, base) == {READ: 200, KEYS: 200, WRITE: 403, INTEND: 200, LEAF: 200}
        async with by(ours.issue_reader("prometheus")) as reader:
            assert await statuses(reader, base) == {READ: 200, KEYS: 403, WRITE: 403, INTEND: 403, LEAF: 403}
        async with by(server) as controller:
            assert (await request(controller, base, *WRITE, b"x"))[0] == 200
            assert (await request(controller, base, *LEAF))[0] == 403
        async with by(theirs.issue_operator("eve"), trusts=server) as eve:
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await request(eve, base, *READ)
    finally:
        await catalog.stop()


@contextlib.asynccontextmanager
async def by(files: TlsFiles, *, trusts: TlsFiles | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    context = ssl_context(files, server=False)
    if trusts is not None:
        context.load_verify_locations(trusts.ca)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        yield session


async def statuses(session: aiohttp.ClientSession, base: str) -> dict[tuple[str, str], int]:
    bodies = {WRITE: b"x", INTEND: {"SourceName": "a", "DestinationName": "b", "Action": "deny"}}
    return {
        what: (await request(session, base, *what, bodies.get(what)))[0] for what in (READ, KEYS, WRITE, INTEND, LEAF)
    }
