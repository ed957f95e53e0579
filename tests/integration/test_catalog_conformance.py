"""The embedded catalog and a real Consul 1.8.7: the same requests, the same observable answers.

Left out of the comparison: indexes' absolute values, ids and times, the wording of refusals and whether they are
4xx or 5xx, and whether an empty field is shown (Go clients and Outrider read both alike).
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controller.catalog.catalog import Catalog
from outrider.log import Log
from tests.integration.consul import real_consul

_VOLATILE = {"CreateIndex", "ModifyIndex", "ID", "CreatedAt", "UpdatedAt", "Hash"}


class Api:
    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session, self._base = session, base

    async def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        status, found, _ = await self.indexed(method, path, body)
        return status, found

    async def indexed(self, method: str, path: str, body: Any = None) -> tuple[int, Any, int]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with self._session.request(method, f"{self._base}/v1/{path}", data=data) as answer:
            text = await answer.text()
            is_json = "json" in answer.headers.get("Content-Type", "")
            index = int(answer.headers.get("X-Consul-Index", "0"))
            return answer.status, json.loads(text) if is_json else text, index


def plain(value: Any) -> Any:
    """Without what differs between two runs of one Consul, and without empty fields."""
    if isinstance(value, dict):
        shown = {key: plain(item) for key, item in value.items() if key not in _VOLATILE}
        return {key: item for key, item in shown.items() if item not in ("", None, [], {}, 0, False)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


@pytest.fixture(scope="module")
def consul_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_consul(tmp_path_factory.mktemp("consul")) as consul:
        yield consul.url


@pytest.fixture(params=["embedded", pytest.param("consul", marks=pytest.mark.host)])
async def api(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Api]:
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "embedded":
            socket = tmp_path / "catalog.sock"
            catalog = Catalog(database=tmp_path / "catalog.db", socket=socket, cluster="test", log=Log("catalog"))
            await catalog.start()
            stack.push_async_callback(catalog.stop)
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(str(socket))
            base = "http://catalog"
        else:
            connector, base = aiohttp.TCPConnector(), request.getfixturevalue("consul_url")
        yield Api(await stack.enter_async_context(aiohttp.ClientSession(connector=connector)), base)


@pytest.fixture
def name() -> str:
    return f"n{uuid.uuid4().hex[:8]}"


def registration(name: str, status: str = "passing", port: int = 2000) -> dict[str, Any]:
    return {
        "Node": name,
        "Address": "10.0.0.1",
        "NodeMeta": {"external-node": "true", "team": name},
        "Service": {
            "ID": f"{name}-proxy",
            "Service": f"{name}-sidecar-proxy",
            "Kind": "connect-proxy",
            "Port": port,
            "Meta": {"a": "b"},
            "TaggedAddresses": {"outrider-local": {"Address": "10.9.0.1", "Port": 15100}},
            "Proxy": {"DestinationServiceName": name, "DestinationServiceID": f"{name}-1"},
        },
        "Check": {"CheckID": f"{name}-check", "Name": "check", "Status": status, "ServiceID": f"{name}-proxy"},
    }


async def test_a_registered_proxy_is_found_by_its_destination(api: Api, name: str) -> None:
    assert await api("PUT", "catalog/register", registration(name)) == (200, True)

    status, rows = await api("GET", f"health/connect/{name}?passing")

    assert status == 200
    assert plain(rows) == [
        {
            "Node": {
                "Node": name,
                "Address": "10.0.0.1",
                "Datacenter": "dc1",
                "Meta": {"external-node": "true", "team": name},
            },
            "Service": {
                "Service": f"{name}-sidecar-proxy",
                "Kind": "connect-proxy",
                "Port": 2000,
                "Meta": {"a": "b"},
                "TaggedAddresses": {"outrider-local": {"Address": "10.9.0.1", "Port": 15100}},
                "Weights": {"Passing": 1, "Warning": 1},
                "Proxy": {"DestinationServiceName": name, "DestinationServiceID": f"{name}-1"},
            },
            "Checks": [
                {
                    "Node": name,
                    "CheckID": f"{name}-check",
                    "Name": "check",
                    "Status": "passing",
                    "ServiceID": f"{name}-proxy",
                    "ServiceName": f"{name}-sidecar-proxy",
                }
            ],
        }
    ]


async def test_the_catalogs_views_of_one_registration(api: Api, name: str) -> None:
    await api("PUT", "catalog/register", registration(name))
    proxy = f"{name}-sidecar-proxy"

    _, nodes = await api("GET", f"catalog/nodes?node-meta=team:{name}")
    _, services = await api("GET", f"catalog/services?node-meta=team:{name}")
    _, instances = await api("GET", f"catalog/service/{proxy}")
    _, fronting = await api("GET", f"catalog/connect/{name}")
    _, node = await api("GET", f"catalog/node/{name}")

    assert [row["Node"] for row in nodes] == [name]
    assert services == {proxy: []}
    assert plain(instances) == plain(fronting)
    assert plain(instances)[0]["ServiceProxy"]["DestinationServiceName"] == name
    assert (instances[0]["ServiceID"], instances[0]["ServicePort"]) == (f"{name}-proxy", 2000)
    assert list(node["Services"]) == [f"{name}-proxy"]
    assert plain(node["Node"])["Address"] == "10.0.0.1"
    assert await api("GET", "catalog/datacenters") == (200, ["dc1"])


async def test_what_is_not_there_is_empty_and_no_error(api: Api, name: str) -> None:
    assert await api("GET", f"catalog/node/{name}") == (200, None)
    for path in ("catalog/service", "catalog/connect", "health/service", "health/connect", "health/node"):
        assert await api("GET", f"{path}/{name}") == (200, []), path
    assert await api("PUT", "catalog/deregister", {"Node": name}) == (200, True)


async def test_a_critical_node_check_takes_its_services_out_of_passing(api: Api, name: str) -> None:
    await api("PUT", "catalog/register", registration(name))
    check = {"CheckID": "outrider-node", "Name": "node", "Status": "critical", "Output": "silent"}
    await api("PUT", "catalog/register", {"Node": name, "Address": "10.0.0.1", "SkipNodeUpdate": True, "Check": check})

    assert await api("GET", f"health/connect/{name}?passing") == (200, [])
    _, rows = await api("GET", f"health/connect/{name}")
    assert {check["CheckID"]: check["Status"] for check in rows[0]["Checks"]} == {
        "outrider-node": "critical",
        f"{name}-check": "passing",
    }
    _, checks = await api("GET", f"health/node/{name}")
    assert {check["Output"] for check in checks} == {"", "silent"}
    _, critical = await api("GET", "health/state/critical")
    assert name in {check["Node"] for check in critical}
    for meta, there in ((f"team:{name}", True), ("team:other", False)):
        _, of_nodes = await api("GET", f"health/state/any?node-meta={meta}")
        assert (name in {check["Node"] for check in of_nodes}) is there, meta
    _, of_service = await api("GET", f"health/checks/{name}-sidecar-proxy")
    assert [check["CheckID"] for check in of_service] == [f"{name}-check"]


async def test_deregistering_a_service_takes_its_checks_along(api: Api, name: str) -> None:
    await api("PUT", "catalog/register", registration(name))
    await api("PUT", "catalog/deregister", {"Node": name, "ServiceID": f"{name}-proxy"})
    assert await api("GET", f"health/connect/{name}") == (200, [])
    assert await api("GET", f"health/node/{name}") == (200, [])
    await api("PUT", "catalog/deregister", {"Node": name})
    assert await api("GET", f"catalog/node/{name}") == (200, None)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "catalog/register", {"Node": ""}),
        ("PUT", "catalog/register", {"Node": "x", "Address": "10.0.0.1", "Service": {"Kind": "connect-proxy"}}),
        ("PUT", "catalog/register", b"{nonsense"),
        ("PUT", "catalog/register", {"Node": 7}),
        ("PUT", "catalog/deregister", {}),
        ("POST", "catalog/deregister", {"Node": "x"}),
        ("PUT", "txn", b"{nonsense"),
        ("PUT", "txn", [{"KV": {"Verb": "set", "Key": "k", "Value": "aGk="}}] * 65),
        ("PUT", "txn", b"[" + b" " * 600_000 + b"]"),
        ("GET", "catalog/nodes?index=abc", None),
        ("GET", "catalog/nodes?index=1&wait=soon", None),
        ("GET", "catalog/nodes?dc=elsewhere", None),
        ("GET", "no/such/endpoint", None),
        ("PUT", "session/create", {"TTL": "1s"}),
        ("PUT", "session/create", {"Behavior": "explode"}),
        ("PUT", "session/create", {"Node": "nobody"}),
        ("PUT", f"session/renew/{uuid.UUID(int=0)}", None),
        ("PUT", "kv/k?cas=abc", b"v"),
        ("POST", "connect/intentions", {"SourceName": "a", "DestinationName": "b", "Action": "perhaps"}),
        ("POST", "connect/intentions", {"SourceName": "a*", "DestinationName": "b", "Action": "deny"}),
        ("GET", f"connect/intentions/{uuid.UUID(int=0)}", None),
        ("GET", "connect/intentions/match?by=colour&name=x", None),
        ("GET", "connect/intentions/check?source=a", None),
    ],
)
async def test_what_makes_no_sense_is_refused(api: Api, method: str, path: str, body: Any) -> None:
    status, _ = await api(method, path, body)
    assert status >= 400


async def test_a_blocking_query_returns_with_the_change_and_only_then(api: Api, name: str) -> None:
    await api("PUT", "catalog/register", registration(name))
    _, _, index = await api.indexed("GET", f"health/connect/{name}")

    waiting = asyncio.create_task(api.indexed("GET", f"health/connect/{name}?index={index}&wait=10s"))
    other = f"{name}-other"
    await api("PUT", "catalog/register", registration(other))
    _, unchanged, still = await api.indexed("GET", f"health/connect/{name}?index={index}&wait=20ms")
    assert len(unchanged) == 1
    assert still == index
    assert not waiting.done()

    await api("PUT", "catalog/register", registration(name, status="critical"))
    _, rows, later = await asyncio.wait_for(waiting, 5)
    assert rows[0]["Checks"][0]["Status"] == "critical"
    assert later > index


async def test_a_service_that_leaves_wakes_its_watchers(api: Api, name: str) -> None:
    await api("PUT", "catalog/register", registration(name))
    _, _, index = await api.indexed("GET", f"health/connect/{name}")
    waiting = asyncio.create_task(api.indexed("GET", f"health/connect/{name}?index={index}&wait=10s"))
    await api("PUT", "catalog/deregister", {"Node": name})
    _, rows, later = await asyncio.wait_for(waiting, 5)
    assert rows == []
    assert later > index


async def test_keys(api: Api, name: str) -> None:
    assert await api("PUT", f"kv/{name}/a/b?flags=7", b"hello") == (200, True)
    assert await api("PUT", f"kv/{name}/c", b"") == (200, True)

    status, found = await api("GET", f"kv/{name}/a/b")
    assert status == 200
    assert plain(found) == [{"Key": f"{name}/a/b", "Value": "aGVsbG8=", "Flags": 7}]
    assert "Session" not in found[0]
    assert await api("GET", f"kv/{name}/a/b?raw") == (200, "hello")
    assert await api("GET", f"kv/{name}?keys") == (200, [f"{name}/a/b", f"{name}/c"])
    assert await api("GET", f"kv/{name}/?keys&separator=/") == (200, [f"{name}/a/", f"{name}/c"])
    _, tree = await api("GET", f"kv/{name}?recurse")
    assert [row["Key"] for row in tree] == [f"{name}/a/b", f"{name}/c"]
    assert (await api("GET", f"kv/{name}/nothing"))[0] == 404
    index = found[0]["ModifyIndex"]
    assert await api("PUT", f"kv/{name}/a/b?cas={index + 1_000_000}", b"x") == (200, False)
    assert await api("PUT", f"kv/{name}/a/b?cas={index}", b"x") == (200, True)
    assert await api("PUT", f"kv/{name}/a/b?cas=0", b"x") == (200, False)
    assert await api("DELETE", f"kv/{name}/a/b?cas={index}") == (200, False)
    assert await api("DELETE", f"kv/{name}?recurse") == (200, True)
    assert (await api("GET", f"kv/{name}?recurse"))[0] == 404


async def test_a_lock_belongs_to_its_session(api: Api, name: str) -> None:
    _, made = await api("PUT", "session/create", {"Name": name, "TTL": "15s", "LockDelay": "0s"})
    _, other = await api("PUT", "session/create", {"LockDelay": "0s", "Behavior": "delete"})
    key = f"kv/{name}/lock"

    assert await api("PUT", f"{key}?acquire={made['ID']}", b"1") == (200, True)
    assert await api("PUT", f"{key}?acquire={made['ID']}", b"2") == (200, True)
    assert await api("PUT", f"{key}?acquire={other['ID']}", b"3") == (200, False)
    _, found = await api("GET", key)
    assert (found[0]["Session"], found[0]["LockIndex"], found[0]["Value"]) == (made["ID"], 1, "Mg==")
    assert await api("PUT", f"{key}?release={other['ID']}", b"") == (200, False)
    _, renewed = await api("PUT", f"session/renew/{made['ID']}")
    assert (renewed[0]["TTL"], renewed[0]["Behavior"], renewed[0]["Name"]) == ("15s", "release", name)

    assert await api("PUT", f"session/destroy/{made['ID']}") == (200, True)
    _, found = await api("GET", key)
    assert "Session" not in found[0]
    assert await api("GET", f"session/info/{made['ID']}") == (200, [])

    assert await api("PUT", f"{key}?acquire={other['ID']}", b"4") == (200, True)
    await api("PUT", f"session/destroy/{other['ID']}")
    assert (await api("GET", key))[0] == 404  # its behaviour is "delete"


async def test_a_session_ends_with_its_nodes_check(api: Api, name: str) -> None:
    check = {"CheckID": "alive", "Name": "alive", "Status": "passing"}
    node = {"Node": name, "Address": "10.0.0.1"}
    await api("PUT", "catalog/register", {**node, "Check": check})
    _, made = await api("PUT", "session/create", {"Node": name, "NodeChecks": ["alive"], "LockDelay": "0s"})
    assert len((await api("GET", f"session/node/{name}"))[1]) == 1

    await api("PUT", "catalog/register", {**node, "Check": {**check, "Status": "critical"}})

    assert await api("GET", f"session/info/{made['ID']}") == (200, [])


async def test_a_transaction_is_done_whole(api: Api, name: str) -> None:
    _, made = await api("PUT", "session/create", {"LockDelay": "0s"})
    await api("PUT", f"kv/{name}/lock?acquire={made['ID']}", b"")
    status, answer = await api(
        "PUT",
        "txn",
        [
            {"KV": {"Verb": "check-session", "Key": f"{name}/lock", "Session": made["ID"]}},
            {"KV": {"Verb": "set", "Key": f"{name}/x", "Value": "aGk="}},
            {"Node": {"Verb": "set", "Node": {"Node": name, "Address": "10.0.0.2"}}},
            {"Service": {"Verb": "set", "Node": name, "Service": {"ID": "s", "Service": name, "Port": 80}}},
            {"Check": {"Verb": "set", "Check": {"Node": name, "CheckID": "k", "Name": "k", "Status": "passing"}}},
            {"KV": {"Verb": "get", "Key": f"{name}/x"}},
        ],
    )
    assert status == 200
    assert [next(iter(result)) for result in answer["Results"]] == ["KV", "KV", "Node", "Service", "Check", "KV"]
    assert answer["Results"][1]["KV"]["Value"] is None
    assert answer["Results"][5]["KV"]["Value"] == "aGk="
    assert len((await api("GET", f"health/service/{name}?passing"))[1]) == 1


async def test_a_transaction_is_not_done_in_part(api: Api, name: str) -> None:
    status, answer = await api(
        "PUT",
        "txn",
        [
            {"KV": {"Verb": "set", "Key": f"{name}/x", "Value": "aGk="}},
            {"KV": {"Verb": "check-session", "Key": f"{name}/x", "Session": str(uuid.UUID(int=0))}},
            {"Service": {"Verb": "set", "Node": name, "Service": {"ID": "s", "Service": name}}},
        ],
    )
    assert status == 409
    assert [error["OpIndex"] for error in answer["Errors"]] == [1, 2]
    assert all(error["What"] for error in answer["Errors"])
    assert answer["Results"] is None
    assert (await api("GET", f"kv/{name}/x"))[0] == 404


@pytest.mark.parametrize(
    ("operation", "refused"),
    [
        ({"Verb": "cas", "Index": 1_000_000}, True),
        ({"Verb": "check-index", "Index": 1}, True),
        ({"Verb": "check-not-exists"}, True),
        ({"Verb": "delete-cas", "Index": 1}, True),
        ({"Verb": "unlock", "Session": str(uuid.UUID(int=0))}, True),
        ({"Verb": "wibble"}, True),
        ({"Verb": "get-tree"}, False),
        ({"Verb": "delete-tree"}, False),
        ({"Verb": "delete"}, False),
    ],
)
async def test_verbs_of_a_transaction(api: Api, name: str, operation: dict[str, Any], refused: bool) -> None:
    await api("PUT", f"kv/{name}", b"v")
    status, _ = await api("PUT", "txn", [{"KV": {"Key": name, "Value": "", **operation}}])
    assert (status != 200) == refused


async def test_intentions_are_kept_found_and_decide(api: Api, name: str) -> None:
    def wanted(source: str, destination: str, action: str) -> dict[str, Any]:
        return {"SourceName": source, "DestinationName": destination, "SourceType": "consul", "Action": action}

    _, any_caller = await api("POST", "connect/intentions", wanted("*", name, "deny"))
    status, made = await api(
        "POST", "connect/intentions", {**wanted("web", name, "allow"), "Description": "d", "Meta": {"x": "y"}}
    )
    assert status == 200
    assert (await api("POST", "connect/intentions", wanted("web", name, "deny")))[0] >= 400

    _, found = await api("GET", f"connect/intentions/{made['ID']}")
    assert plain(found) == {
        "SourceNS": "default",
        "SourceName": "web",
        "DestinationNS": "default",
        "DestinationName": name,
        "SourceType": "consul",
        "Action": "allow",
        "Description": "d",
        "Meta": {"x": "y"},
        "Precedence": 9,
    }
    _, matched = await api("GET", f"connect/intentions/match?by=destination&name={name}")
    assert [(row["SourceName"], row["Precedence"]) for row in matched[name]] == [("web", 9), ("*", 8)]
    assert await allowed(api, "web", name)
    assert not await allowed(api, "shop", name)

    await api("PUT", f"connect/intentions/{made['ID']}", wanted("web", name, "deny"))
    assert not await allowed(api, "web", name)
    for intention in (made, any_caller):
        assert await api("DELETE", f"connect/intentions/{intention['ID']}") == (200, True)
    assert (await api("GET", f"connect/intentions/{made['ID']}"))[0] == 404


async def allowed(api: Api, source: str, destination: str) -> bool:
    status, answer = await api("GET", f"connect/intentions/check?source={source}&destination={destination}")
    assert status == 200
    return bool(answer["Allowed"])


async def test_the_list_of_intentions_can_be_watched(api: Api, name: str) -> None:
    body = {"SourceName": "web", "DestinationName": name, "SourceType": "consul", "Action": "allow"}
    _, made = await api("POST", "connect/intentions", body)
    _, _, index = await api.indexed("GET", "connect/intentions")
    waiting = asyncio.create_task(api.indexed("GET", f"connect/intentions?index={index}&wait=10s"))
    await api("DELETE", f"connect/intentions/{made['ID']}")
    _, found, later = await asyncio.wait_for(waiting, 5)
    assert name not in {row["DestinationName"] for row in found}
    assert later > index


async def test_roots_and_who_answers(api: Api) -> None:
    _, roots, index = await api.indexed("GET", "connect/ca/roots")
    assert index > 0
    assert roots["TrustDomain"].endswith(".consul")
    active = next(root for root in roots["Roots"] if root["Active"])
    assert active["ID"] == roots["ActiveRootID"]
    assert active["RootCert"].startswith("-----BEGIN CERTIFICATE-----")
    assert (active["PrivateKeyType"], active["PrivateKeyBits"]) == ("ec", 256)
    _, itself = await api("GET", "agent/self")
    assert itself["Config"]["Datacenter"] == "dc1"
    assert itself["Config"]["Version"] == "1.8.7"
    _, leader = await api("GET", "status/leader")
    assert leader
    assert await api("GET", "status/peers") == (200, [leader])
