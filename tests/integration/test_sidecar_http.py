"""HTTP between real Envoys: identities, refusals that name their intention, retries, what callers are told."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action, spiffe_id
from tests.integration.sidecar_mesh import TRUST_DOMAIN, Mesh, calling, endpoint, free_port, get, served, until

pytestmark = pytest.mark.host

API, API_2, WEB = AllocId("00000000a1"), AllocId("00000000a2"), AllocId("00000000b1")
_WORKLOAD = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment per answer, or delayed acknowledgements set the pace
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh:
        yield mesh


class Echo:
    """A workload that answers with the headers it got, as the status it is asked for, and poses as a sidecar."""

    port = 0
    requests = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.requests += 1
        status = int(request.query.get("status", "200"))
        return web.json_response(dict(request.headers), status=status, headers={"x-outrider-origin": "unreached"})


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo, app = Echo(), web.Application()
    app.router.add_route("*", "/{tail:.*}", echo.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    echo.port = runner.addresses[0][1]
    yield echo
    await runner.cleanup()


async def _shop(mesh: Mesh, *ports: int, protocol: Protocol = Protocol.HTTP) -> str:
    """web and thief -> api, as many as `ports`; ready. Returns the address at which web's workload calls api."""
    apis = [mesh.spec(alloc, served("api", port, protocol)) for alloc, port in zip((API, API_2), ports, strict=False)]
    service = mesh.service("api", protocol, *(endpoint(api) for api in apis))
    mesh.intend("api", ("web", Action.ALLOW), ("*", Action.DENY))
    mesh.publish()
    mesh.thief_port = free_port()
    callers = mesh.spec(WEB, calling("web", ("api", None)), calling("thief", ("api", mesh.thief_port)))
    await mesh.start(*apis, callers)
    return f"http://{service.virtual_address}:15001"


async def test_both_access_logs_name_the_certificate_that_the_peer_proved(mesh: Mesh, echo: Echo) -> None:
    api, caller = (spiffe_id(TRUST_DOMAIN, "dc1", name) for name in ("api", "web"))
    url = await _shop(mesh, echo.port)
    async with aiohttp.ClientSession() as session, session.get(url + "/cart?token=1") as response:
        seen = await response.json()
        assert response.status == 200
        assert "x-outrider-origin" not in response.headers
    assert seen["x-forwarded-client-cert"].endswith(f"URI={caller}")
    inbound = (await until(lambda: mesh.log(API)))[0]
    outbound = (await until(lambda: mesh.log(WEB)))[0]
    assert (inbound["caller"], inbound["identity"], inbound["path"]) == (caller, api, "/cart")
    assert (outbound["callee"], outbound["identity"], outbound["code"]) == (api, caller, 200)
    assert inbound["request"] == outbound["request"]
    assert (outbound["protocol"], inbound["protocol"]) == ("HTTP/1.1", "HTTP/2")
    stats = (await mesh.sidecars.stats(WEB)).outbound[0]
    assert (stats.source, stats.destination, stats.requests, stats.latency_count) == ("web", "api", (("2xx", 1),), 1)
    assert stats.bytes_sent > 0
    assert stats.latency_ms[-1][1] == 1


async def test_a_refusal_names_its_intention_to_the_caller_the_log_and_the_agent(mesh: Mesh, echo: Echo) -> None:
    url = await _shop(mesh, echo.port)
    status, text = await get(f"http://127.0.0.1:{mesh.thief_port}/")
    assert status == 403
    assert "svc/thief may not call service api" in text
    assert "deny:*->api:id-any" in text
    refusal = await asyncio.wait_for(mesh.sidecars.refusals.get(), 5)
    assert refusal.source_spiffe == spiffe_id(TRUST_DOMAIN, "dc1", "thief")
    assert (refusal.alloc, refusal.rule, refusal.intention_id) == (API, "deny:*->api:id-any", "id-any")
    assert (await mesh.sidecars.stats(API)).inbound[0].refused == 1
    assert (await get(url))[0] == 200
    assert echo.requests == 1
    mesh.intend("api", ("web", Action.ALLOW), ("thief", Action.ALLOW), ("*", Action.DENY))
    mesh.publish()
    assert await mesh.sidecars.acknowledged(5) == ()
    assert (await get(f"http://127.0.0.1:{mesh.thief_port}/"))[0] == 200


async def test_an_upstream_that_nobody_provides_answers_503_and_says_so(mesh: Mesh) -> None:
    url = await _shop(mesh)
    assert await get(url) == (503, "outrider: service api has no healthy endpoint\n")


async def test_a_503_of_the_workload_itself_is_not_retried_whatever_its_headers_say(mesh: Mesh, echo: Echo) -> None:
    url = await _shop(mesh, echo.port)
    for method in ("GET", "POST"):
        echo.requests = 0
        assert (await get(url + "/?status=503", method=method))[0] == 503
        assert echo.requests == 1, method


async def test_a_request_that_may_have_reached_the_workload_is_tried_again_only_where_that_is_safe(mesh: Mesh) -> None:
    seen: Counter[str] = Counter()

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen[(await reader.readuntil(b"\r\n\r\n")).split()[0].decode()] += 1
        writer.close()

    server = await asyncio.start_server(break_off, "127.0.0.1", 0)
    url = await _shop(mesh, server.sockets[0].getsockname()[1])
    for method in ("GET", "POST"):
        status, text = await get(url, method=method)
        assert (status, text) == (503, "outrider: the workload of service api broke off the request\n")
    assert seen["POST"] == 1
    assert seen["GET"] > 1
    server.close()


async def test_a_drained_sidecar_costs_no_failed_request(mesh: Mesh, echo: Echo) -> None:
    url = await _shop(mesh, echo.port, echo.port)
    answers: Counter[int] = Counter()
    drained = asyncio.Event()

    async def load(session: aiohttp.ClientSession) -> None:
        while not drained.is_set():
            async with session.get(url) as response:
                answers[response.status] += 1

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        for serial in range(4):
            tasks.create_task(load(session), name=f"load-{serial}")
        await until(lambda: answers.total() > 100)
        await mesh.sidecars.drain(API)
        drained_from = len(mesh.log(API_2))
        await until(lambda: len(mesh.log(API_2)) > drained_from + 100)
        await mesh.stop_envoy(API)
        goal = answers.total() + 200
        await until(lambda: answers.total() > goal)
        drained.set()
    assert set(answers) == {200}


async def test_a_sidecar_that_freezes_costs_time_and_no_failed_request(mesh: Mesh, echo: Echo) -> None:
    """As when its host stops: nothing answers, nothing is refused. Keepalive tells within three seconds."""
    url = await _shop(mesh, echo.port, echo.port)
    answers: Counter[int] = Counter()
    done = asyncio.Event()

    async def load(session: aiohttp.ClientSession) -> None:
        while not done.is_set():
            async with session.get(url) as response:
                answers[response.status] += 1

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        for serial in range(4):
            tasks.create_task(load(session), name=f"load-{serial}")
        await until(lambda: answers.total() > 100)
        mesh.envoys[API].send_signal(signal.SIGSTOP)
        await until(lambda: [line for line in mesh.log(WEB) if line["attempts"] > 1])
        goal = answers.total() + 200
        await until(lambda: answers.total() > goal)
        done.set()
    assert set(answers) == {200}


async def test_a_web_socket_passes_both_sidecars(mesh: Mesh) -> None:
    async def chat(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(f"heard {message.data}")
        return socket

    app = web.Application()
    app.router.add_get("/", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = await _shop(mesh, runner.addresses[0][1])
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        await socket.send_str("hello")
        assert await socket.receive_str(timeout=5) == "heard hello"
    await runner.cleanup()


async def test_a_grpc_call_passes_both_sidecars_and_is_refused_as_one(mesh: Mesh) -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    url = await _shop(mesh, port, protocol=Protocol.GRPC)
    async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with grpc.aio.insecure_channel(f"127.0.0.1:{mesh.thief_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="svc/thief may not call service api") as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await server.stop(0)


async def test_a_workload_killed_under_load_costs_no_failed_request(mesh: Mesh) -> None:
    workloads = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKLOAD, stdout=asyncio.subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        ports = [int(await workload.stdout.readline()) for workload in workloads if workload.stdout is not None]
        url = await _shop(mesh, *ports)
        answers: Counter[str] = Counter()
        done = asyncio.Event()

        async def load(session: aiohttp.ClientSession) -> None:
            while not done.is_set():
                async with session.get(url) as response:
                    answers[f"{response.status} {await response.text()}"] += 1

        async with aiohttp.ClientSession() as session:
            async with asyncio.TaskGroup() as tasks:
                for serial in range(8):
                    tasks.create_task(load(session), name=f"load-{serial}")
                await until(lambda: answers.total() > 300)
                workloads[0].kill()
                await until(lambda: answers.total() > 1500)
                done.set()
            assert dict(answers) == {"200 ok": answers.total()}
            # It never reaches the dead one's workload: safe to try again even where the method is not.
            for _ in range(50):
                async with session.post(url, data=b"x") as response:
                    assert (response.status, await response.text()) == (200, "ok")
        dead = await until(lambda: [line for line in mesh.log(API) if line["code"] == 503])
        assert dead, "the dead workload's sidecar was asked, and said so"
    finally:
        for workload in workloads:
            if workload.returncode is None:
                workload.kill()
            await workload.wait()
