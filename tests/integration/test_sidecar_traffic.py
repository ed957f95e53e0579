"""Traffic rules carried out by real Envoys: permissions, splits, routes, limits, trouble made on purpose."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
from aiohttp import web

from outrider.errors import RefusedError
from outrider.ids import AllocId, ServiceName
from outrider.model.insight import TappedCall
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Intention, MeshService
from outrider.model.traffic import (
    Balancing,
    Failover,
    HttpFault,
    HttpMatch,
    Leg,
    Limits,
    Mirror,
    Permission,
    Policy,
    RateLimit,
    Retries,
    Route,
    ServiceTraffic,
    Sticky,
    TextMatch,
    Verdict,
)
from sidecar.core.resources import Kind
from tests.integration.sidecar_mesh import Mesh, calling, endpoint, get, served, until

pytestmark = pytest.mark.host

OLD, NEW, CALLER = AllocId("00000000a1"), AllocId("00000000a2"), AllocId("00000000b1")


class Version:
    """A workload that says which one it is, after a while and with a status of the caller's choice."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.paths: list[str] = []
        self._app = web.Application()
        self._app.router.add_route("*", "/socket", self._socket)
        self._app.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(self._app)

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        await asyncio.sleep(float(request.query.get("wait", "0")))
        return web.Response(text=self.name, status=int(request.query.get("status", "200")))

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(f"{self.name} {message.data}")
        return socket


class Shop:
    """web calls api, of which there are two versions, each with its sidecar."""

    def __init__(self, mesh: Mesh, old: Version, new: Version) -> None:
        self.mesh, self.old, self.new = mesh, old, new
        self.url = ""

    async def start(self) -> None:
        specs = [
            self.mesh.spec(alloc, served("api", version.port, Protocol.HTTP))
            for alloc, version in ((OLD, self.old), (NEW, self.new))
        ]
        subsets = (("v1",), ("v2",))
        self._endpoints = tuple(
            msgspec.structs.replace(endpoint(spec), subsets=names) for spec, names in zip(specs, subsets, strict=True)
        )
        self.allow(Intention(source="web", destination="api", action=Action.ALLOW, id="1"))
        self.set()
        service = self.mesh.services[ServiceName("api")]
        await self.mesh.start(*specs, self.mesh.spec(CALLER, calling("web", ("api", None))))
        self.url = f"http://{service.virtual_address}:15001"

    def allow(self, *intentions: Intention) -> None:
        self.mesh.intentions[ServiceName("api")] = intentions

    def set(self, traffic: ServiceTraffic | None = None) -> None:
        service = self.mesh.service("api", Protocol.HTTP, *self._endpoints)
        self.mesh.services[service.name] = MeshService(
            name=service.name,
            virtual_address=service.virtual_address,
            protocol=service.protocol,
            endpoints=service.endpoints,
            traffic=traffic or ServiceTraffic(),
        )
        self.mesh.publish()

    async def settled(self) -> None:
        assert await self.mesh.sidecars.acknowledged(10) == ()
        assert not any(self.mesh.sidecars.rejected(alloc) for alloc in (OLD, NEW, CALLER))

    def listeners(self) -> dict[AllocId, dict[str, str]]:
        """Their versions, as last sent."""
        return {alloc: dict(one.versions[Kind.LISTENER]) for alloc, one in self.mesh.sidecars._sidecars.items()}

    async def answers(self, count: int, path: str = "/") -> Counter[str]:
        found: Counter[str] = Counter()
        async with aiohttp.ClientSession() as session:
            for _ in range(count):
                async with session.get(self.url + path) as response:
                    found[await response.text()] += 1
        return found


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    old, new = Version("old"), Version("new")
    await old.start()
    await new.start()
    async with Mesh() as mesh:
        shop = Shop(mesh, old, new)
        await shop.start()
        yield shop
    await old.stop()
    await new.stop()


async def test_permissions_decide_by_path_method_and_header_and_the_refusal_names_the_intention(shop: Shop) -> None:
    def allow(**match: object) -> Permission:
        return Permission(action=Verdict.ALLOW, match=HttpMatch(**match))  # type: ignore[arg-type]

    token = TextMatch(name="x-token", exact="7")
    shop.allow(
        Intention(
            source="web",
            destination="api",
            action=Action.DENY,
            id="42",
            permissions=(
                Permission(action=Verdict.DENY, match=HttpMatch(path_prefix="/public/secret")),
                allow(path_prefix="/public", methods=("GET",)),
                allow(path_exact="/exact"),
                allow(path_regex="/item/[0-9]+", headers=(token,)),
            ),
        )
    )
    shop.set()
    await shop.settled()
    granted = ("/public/a?b=//c", "/exact?q=1", "/public/../exact")
    refused = (
        "/",
        "/public/secret",
        "/public//secret",
        "/public/%2e%2e/other",
        "/public%2fx",
        "/exact/more",
        "/item/7",
    )
    for path in granted:
        assert (await _raw(shop.url, path))[0] == 200, path
    for path in refused:
        status, text = await _raw(shop.url, path)
        assert status == 403, path
        assert "svc/web may not call service api" in text
        assert "http:web->api:42" in text
    assert (await get(f"{shop.url}/public/a", method="POST"))[0] == 403
    assert (await get(f"{shop.url}/item/7", headers={"x-token": "7"}))[0] == 200
    assert (await get(f"{shop.url}/item/x", headers={"x-token": "7"}))[0] == 403
    refusal = await asyncio.wait_for(shop.mesh.sidecars.refusals.get(), 5)
    assert refusal.rule.startswith("http:web->api:42")


async def test_a_grant_disturbs_no_websocket_and_a_revocation_ends_it(shop: Shop) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{shop.url}/socket") as socket:
        await socket.send_str("a")
        await socket.receive_str()
        listeners = shop.listeners()
        shop.allow(
            Intention(source="cart", destination="api", action=Action.ALLOW, id="2"),
            Intention(source="web", destination="api", action=Action.ALLOW, id="1"),
        )
        shop.set(ServiceTraffic(policy=Policy(), routes=(Route(timeout_s=0.0, legs=(Leg(service="api"),)),)))
        await shop.settled()
        assert shop.listeners() == listeners, "only a listener that is sent anew takes its connections along"
        await socket.send_str("b")
        assert (await socket.receive_str()).endswith(" b")
        shop.allow(Intention(source="cart", destination="api", action=Action.ALLOW, id="2"))
        shop.set()
        message = await asyncio.wait_for(socket.receive(), 10)
        assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)


async def test_weights_split_and_routes_choose_by_path_and_header(shop: Shop) -> None:
    v1, v2 = Leg(service="api", subset="v1"), Leg(service="api", subset="v2")
    split = (Leg(service="api", subset="v1", weight=9000), Leg(service="api", subset="v2", weight=1000))
    canary = HttpMatch(headers=(TextMatch(name="x-canary", present=True),))
    shop.set(
        ServiceTraffic(
            routes=(
                Route(match=HttpMatch(path_prefix="/v2/"), legs=(v2,), prefix_rewrite="/"),
                Route(match=canary, legs=(v2,)),
                Route(match=HttpMatch(path_exact="/old"), legs=(v1,)),
                Route(legs=split),
            )
        )
    )
    await shop.settled()
    assert await shop.answers(20, "/v2/x") == {"new": 20}
    assert shop.new.paths[-1] == "/x"
    assert await shop.answers(20, "/old") == {"old": 20}
    assert (await get(shop.url, headers={"x-canary": "1"}))[1] == "new"
    found = await shop.answers(300)
    assert 5 <= found["new"] <= 70, "by chance, of 300 at a tenth"


async def test_calls_fail_over_to_another_subset_and_back(shop: Shop) -> None:
    v1, v2 = Leg(service="api", subset="v1"), Leg(service="api", subset="v2")
    traffic = ServiceTraffic(target=v1, failovers=(Failover(subset="v1", to=(v2,)),))
    shop.set(traffic)
    await shop.settled()
    assert await shop.answers(20) == {"old": 20}
    everyone, shop._endpoints = shop._endpoints, shop._endpoints[1:]
    shop.set(traffic)
    await shop.settled()
    assert await shop.answers(20) == {"new": 20}
    shop._endpoints = everyone
    shop.set(traffic)
    await shop.settled()
    assert await shop.answers(20) == {"old": 20}


async def test_a_cookie_or_a_header_meets_the_same_instance_again(shop: Shop) -> None:
    shop.set(ServiceTraffic(policy=Policy(balance=Balancing.RING_HASH, sticky=Sticky(header="x-user"))))
    await shop.settled()
    users = {user: {(await get(shop.url, headers={"x-user": str(user)}))[1] for _ in range(5)} for user in range(20)}
    assert all(len(names) == 1 for names in users.values())
    assert set().union(*users.values()) == {"old", "new"}
    shop.set(ServiceTraffic(policy=Policy(balance=Balancing.RING_HASH, sticky=Sticky(cookie="cart", ttl_s=60))))
    await shop.settled()
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(cookie_jar=jar) as session:
        names = set()
        for _ in range(10):
            async with session.get(shop.url) as response:
                names.add(await response.text())
    assert len(names) == 1


async def test_mirrors_copy_timeouts_end_faults_abort_and_limits_refuse(shop: Shop) -> None:
    v1, v2 = Leg(service="api", subset="v1"), Leg(service="api", subset="v2")
    shop.set(
        ServiceTraffic(
            target=v1,
            mirror=Mirror(to=v2),
            routes=(Route(match=HttpMatch(path_prefix="/slow"), legs=(v1,), timeout_s=0.1), Route(legs=(v1,))),
        )
    )
    await shop.settled()
    assert (await get(f"{shop.url}/copied"))[1] == "old"
    await until(lambda: "/copied" in shop.new.paths)
    status, text = await get(f"{shop.url}/slow?wait=5")
    assert (status, text) == (504, "outrider: service api took longer than its `timeout` allows\n")
    shop.set(ServiceTraffic(fault=HttpFault(abort=418, header="x-chaos")))
    await shop.settled()
    assert (await get(shop.url))[0] == 200
    status, text = await get(shop.url, headers={"x-chaos": "1"})
    assert (status, text) == (418, "outrider: a `fault` made on purpose for calls of service api\n")
    shop.set(ServiceTraffic(policy=Policy(limits=Limits(requests=1))))
    await shop.settled()
    found = await asyncio.gather(*(get(f"{shop.url}/?wait=0.5") for _ in range(5)))
    assert Counter(status for status, _ in found)[503] >= 1
    assert any("as its `limits` allow" in text for _, text in found)


async def test_statuses_are_retried_where_asked_and_the_rate_is_kept(shop: Shop) -> None:
    shop.set(ServiceTraffic(routes=(Route(legs=(Leg(service="api"),), retries=Retries(attempts=2, statuses=(500,))),)))
    await shop.settled()
    assert (await get(f"{shop.url}/?status=500"))[0] == 500
    assert len(shop.old.paths) + len(shop.new.paths) == 3
    shop.mesh.rates[ServiceName("api")] = RateLimit(requests=1, burst=2)
    shop.set()
    await shop.settled()
    found = [await get(shop.url) for _ in range(12)]
    assert Counter(status for status, _ in found)[429] >= 4
    assert "takes no more requests a second" in next(text for status, text in found if status == 429)


async def test_a_tap_shows_requests_without_their_secrets_and_one_at_a_time_is_enough(shop: Shop) -> None:
    listeners = shop.listeners()

    async def tapped(*, headers: bool) -> TappedCall:
        """The first request that is told of; asked again until one is."""
        calls = shop.mesh.sidecars.tap(CALLER, ServiceName("web"), ServiceName("api"), headers=headers)
        async with contextlib.aclosing(calls), asyncio.TaskGroup() as group:
            first = group.create_task(anext(calls), name="first")
            while not first.done():
                await get(f"{shop.url}/cart?card=4711", headers={"authorization": "secret"})
            return first.result()

    call = await tapped(headers=False)
    assert (call.method, call.path, call.status, call.alloc) == ("GET", "/cart", 200, CALLER)
    assert call.duration_ms > 0
    shown = {header.name: header for header in (*call.request, *call.response)}
    assert (shown["authorization"].redacted, shown["authorization"].value) == (True, "")
    assert shown["content-type"].value.startswith("text/plain")
    whole = await tapped(headers=True)
    assert whole.path == "/cart?card=4711"
    assert ("authorization", "secret") in {(header.name, header.value) for header in whole.request}
    assert shop.listeners() == listeners, "nobody's connection is the price of a look"
    assert not shop.mesh.sidecars._sidecars[CALLER].tapped
    with pytest.raises(RefusedError, match="has no sidecar here"):
        await anext(shop.mesh.sidecars.tap(AllocId("0"), ServiceName("web"), ServiceName("api"), headers=False))
    with pytest.raises(RefusedError, match="speaks tcp"):
        await anext(shop.mesh.sidecars.tap(CALLER, ServiceName("web"), ServiceName("db"), headers=False))


async def _raw(url: str, path: str) -> tuple[int, str]:
    """As written: clients' libraries tidy paths up."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: api\r\nconnection: close\r\n\r\n".encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    return int(answer.split(" ", 2)[1]), answer
