"""What the agent asks of its sidecars: restarts, drains, bad configuration, who may enter what."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pytest
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from outrider.errors import PeerError
from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Leaf
from sidecar.core.intent import SidecarSpec
from tests.integration.sidecar_mesh import Mesh, calling, endpoint, free_port, served, until

pytestmark = pytest.mark.host

DB, WEB = AllocId("00000000f1"), AllocId("00000000f2")


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh:
        yield mesh


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def _pair(mesh: Mesh, port: int) -> tuple[SidecarSpec, SidecarSpec, int]:
    db = mesh.spec(DB, served("db", port))
    local = free_port()
    web = mesh.spec(WEB, calling("web", ("db", local)))
    mesh.service("db", Protocol.TCP, endpoint(db))
    mesh.intend("db", ("web", Action.ALLOW))
    mesh.publish()
    await mesh.start(db, web)
    return db, web, local


async def _echoes(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"ping\n")
        answer = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        return False
    return answer == b"ping\n"


async def test_a_restarted_agent_sends_nothing_again_and_then_only_what_changed(mesh: Mesh, echo_port: int) -> None:
    db, web, local = await _pair(mesh, echo_port)
    reader, writer = await asyncio.open_connection("127.0.0.1", local)
    leaves = {name: mesh.authority.leaf(name) for name in ("db", "web")}
    for leaf in leaves.values():
        mesh.sidecars.set_leaf(leaf)
    assert await mesh.sidecars.acknowledged(5) == ()
    await mesh.restart_agent(db, web)
    for leaf in leaves.values():
        mesh.sidecars.set_leaf(leaf)
    mesh.publish()
    for alloc in (DB, WEB):
        await mesh.sidecars.ready(alloc, 10)
    assert mesh.sidecars.resources_sent == 0
    mesh.intend("db", ("*", Action.DENY))
    mesh.publish()
    assert await mesh.sidecars.acknowledged(5) == ()
    assert mesh.sidecars.resources_sent == 2, "the rules, and the listener whose connections the revocation cuts"
    assert await asyncio.wait_for(reader.read(1), 5) == b""
    writer.close()


async def test_a_wrong_token_is_refused_and_counted_and_names_nobody(mesh: Mesh, echo_port: int) -> None:
    await _pair(mesh, echo_port)
    async with grpc.aio.insecure_channel(f"unix:{mesh.directory}/run/ads/ads.sock") as channel:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url="type.googleapis.com/envoy.config.listener.v3.Listener")
        request.node.id = DB
        request.node.metadata["token"] = "guess"
        call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
        await call.write(request)
        with pytest.raises(grpc.aio.AioRpcError, match="names no sidecar of this node"):
            await call.read()
    assert mesh.sidecars.tokens_refused == 1


async def test_only_the_sidecars_own_user_may_enter_its_directory(mesh: Mesh, echo_port: int) -> None:
    db, web, _ = await _pair(mesh, echo_port)
    for spec in (db, web):
        directory = mesh.directory / "run" / "sidecars" / spec.alloc
        assert (directory.stat().st_uid, directory.stat().st_mode & 0o777) == (spec.uid, 0o700)
    state = mesh.directory / "run" / "state"
    assert (state.stat().st_uid, state.stat().st_mode & 0o777) == (0, 0o700)
    tokens = {json.loads(path.read_bytes())["token"] for path in state.iterdir()}
    assert len(tokens) == 2


async def test_what_envoy_refuses_leaves_the_last_good_and_is_not_sent_for_ever(mesh: Mesh, echo_port: int) -> None:
    _, _, local = await _pair(mesh, echo_port)
    good = mesh.authority.leaf("db")
    mesh.sidecars.set_leaf(Leaf(service=good.service, certificate_pem="not a certificate", key_pem=good.key_pem))
    assert await mesh.sidecars.acknowledged(5) == ()
    sent = mesh.sidecars.resources_sent
    assert await _echoes(local)
    assert "leaf/db" in mesh.sidecars.rejected(DB)
    mesh.sidecars.set_leaf(good)
    assert await mesh.sidecars.acknowledged(5) == ()
    assert mesh.sidecars.resources_sent == sent + 1
    assert mesh.sidecars.rejected(DB) == ""
    assert await _echoes(local)


async def test_ready_names_what_is_missing(mesh: Mesh) -> None:
    mesh.publish()
    await mesh.launch(mesh.spec(WEB, calling("web", ("db", None))))
    with pytest.raises(PeerError, match="the virtual address of upstream db"):
        await mesh.sidecars.ready(WEB, 0.5)


async def test_a_drained_sidecar_takes_no_new_connection_while_outbound_stays(mesh: Mesh, echo_port: int) -> None:
    db, _, local = await _pair(mesh, echo_port)
    reader, writer = await asyncio.open_connection("127.0.0.1", local)
    await mesh.sidecars.drain(DB)
    public = db.services[0].public_port

    async def refused() -> bool:
        try:
            _, closing = await asyncio.open_connection(db.local_address, public)
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            return False  # it was still in the queue of the listener that closes
        closing.close()
        with suppress(ConnectionResetError):
            await closing.wait_closed()
        return False

    assert await until(refused)
    await mesh.sidecars.drain(WEB)
    writer.write(b"still here\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"still here\n"
    writer.close()


async def test_a_removed_sidecar_leaves_nothing_behind(mesh: Mesh, echo_port: int) -> None:
    await _pair(mesh, echo_port)
    await mesh.stop_envoy(DB)
    await mesh.sidecars.remove(DB)
    names = {path.name for kind in ("sidecars", "state") for path in (mesh.directory / "run" / kind).iterdir()}
    assert names == {WEB, f"{WEB}.json"}


async def test_an_envoy_that_died_starts_again_with_the_same_identity(mesh: Mesh, echo_port: int) -> None:
    db = mesh.spec(DB, served("db", echo_port))
    mesh.service("db", Protocol.TCP, endpoint(db))
    mesh.publish()
    files = await mesh.launch(db)
    await mesh.sidecars.ready(DB, 10)
    sent = mesh.sidecars.resources_sent
    await mesh.stop_envoy(DB)
    await mesh.run_envoy(db, files)
    await until(lambda: mesh.sidecars.resources_sent == 2 * sent)
    await mesh.sidecars.ready(DB, 10)
