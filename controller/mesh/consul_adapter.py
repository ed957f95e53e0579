"""The one place that speaks to Consul, or to the embedded catalog: requests and their typed answers.

py-consul gives the client and its transport. Its typed calls lack what is needed here (indexes on roots and intentions,
1.8's intentions by id, a token on transactions, unix sockets), so the calls stand here, over its `http` transport.
Owns the connections; makes no decision, keeps no state but Consul's version. Raises PeerError where Consul is away or
speaks nonsense, RefusedError where it says no.
"""

import ssl
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
import consul.aio
import consul.base
import msgspec

from controller.entries import Entry
from controller.mesh.shapes import (
    CatalogNode,
    CatalogNodeServices,
    ConsulCheck,
    ConsulIntention,
    ConsulLeaf,
    ConsulRoots,
    ConsulSession,
    HealthRow,
    KvPair,
    Registration,
    Self,
    Txn,
    TxnAnswer,
    TxnError,
    Written,
)
from outrider.errors import ConfigError, PeerError, RefusedError
from outrider.model.job import Value

T = TypeVar("T")

REQUEST_TIMEOUT_S = 10.0
WATCH_WAIT_S = 60
# Consul waits up to a sixteenth longer than asked.
_WATCH_TIMEOUT_S = WATCH_WAIT_S * 17 / 16 + REQUEST_TIMEOUT_S
_INTENTIONS = "/v1/connect/intentions"
_EMBEDDED = "outrider"  # the revision that the embedded catalog says it is


class Dialect(StrEnum):
    """How intentions are written. Lists and decisions are read alike in both."""

    BY_ID = "by-id"  # Consul 1.8 and before
    EXACT = "exact"  # 1.9 and later: kept as service-intentions entries, written by the pair


def intention_dialect(version: str) -> Dialect:
    """`version`: as agent/self has it, "1.8.7" or "1.15.0+ent"."""
    parts = version.split(".")
    try:
        number = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError) as error:
        raise PeerError(f"Consul says its version is {version!r}: expected a form like 1.8.7") from error
    return Dialect.EXACT if number >= (1, 9) else Dialect.BY_ID


class Indexed(Value, frozen=True, kw_only=True):
    """An answer and the index to ask the next blocking query with."""

    index: int
    body: bytes


class ConsulAdapter:
    """`url`: http(s)://HOST:PORT, or unix:PATH for the embedded catalog. Make it inside a running event loop."""

    def __init__(self, url: str, *, token: str = "", tls: ssl.SSLContext | None = None) -> None:
        """Raises ConfigError where `url` is no address of a Consul."""
        self.url = url
        self._transport = _transport(url, token, tls)
        self.version = ""
        self.datacenter = ""
        self.dialect = Dialect.BY_ID
        self.embedded = False

    async def close(self) -> None:
        await self._transport.close()

    async def probe(self) -> None:
        """Learns version and datacenter, and with them the dialect. Call it first, and after Consul was away."""
        found = _decode(await self._get("/v1/agent/self"), Self)
        self.version, self.datacenter = found.config.version, found.config.datacenter
        self.embedded = found.config.revision == _EMBEDDED
        self.dialect = Dialect.EXACT if self.embedded else intention_dialect(self.version)

    async def nodes(self, meta: tuple[str, str]) -> list[CatalogNode]:
        """The nodes whose meta has this key with this value."""
        return _decode(await self._get("/v1/catalog/nodes", {"node-meta": ":".join(meta)}), list[CatalogNode])

    async def service_names(self, meta: tuple[str, str]) -> list[str]:
        """Of all that is registered on such nodes."""
        body = await self._get("/v1/catalog/services", {"node-meta": ":".join(meta)})
        return list(_decode(body, dict[str, list[str] | None]))

    async def instances(self, service: str, meta: tuple[str, str]) -> list[HealthRow]:
        """Of the service, on such nodes."""
        body = await self._get(f"/v1/health/service/{quote(service)}", {"node-meta": ":".join(meta)})
        return _decode(body, list[HealthRow])

    async def checks(self, meta: tuple[str, str]) -> list[ConsulCheck]:
        """All of such nodes."""
        return _decode(await self._get("/v1/health/state/any", {"node-meta": ":".join(meta)}), list[ConsulCheck])

    async def node(self, name: str) -> tuple[CatalogNodeServices | None, list[ConsulCheck]]:
        """What Consul has of one node; None where it has no such node."""
        body = await self._get(f"/v1/catalog/node/{quote(name)}")
        if body.strip() == b"null":
            return None, []
        services = _decode(body, CatalogNodeServices)
        return services, _decode(await self._get(f"/v1/health/node/{quote(name)}"), list[ConsulCheck])

    async def transact(self, operations: list[Txn]) -> TxnAnswer:
        """All or none. An answer with errors is a value: the caller knows what each operation was."""
        answer = await self._call("PUT", "/v1/txn", {}, msgspec.json.encode(operations))
        if answer.code in (400, 413):
            return TxnAnswer(errors=(TxnError(op_index=-1, what=answer.body.strip()[:500]),))
        if answer.code not in (200, 409):
            raise _refusal("PUT /v1/txn", answer)
        return _decode(answer.body.encode(), TxnAnswer)

    async def register(self, registration: Registration) -> str:
        """ "" or why Consul refused it."""
        answer = await self._call("PUT", "/v1/catalog/register", {}, msgspec.json.encode(registration))
        if answer.code == 403:
            raise _refusal("PUT /v1/catalog/register", answer)
        return "" if answer.code == 200 else f"status {answer.code}: {answer.body.strip()[:500]}"

    async def watch_connect(self, service: str, index: int) -> tuple[int, list[HealthRow]]:
        """The instances that callers of `service` dial, healthy or not, once something changed since `index`."""
        found = await self._watch(f"/v1/health/connect/{quote(service)}", index)
        return found.index, _decode(found.body, list[HealthRow])

    async def watch_intentions(self, index: int) -> tuple[int, list[ConsulIntention]]:
        found = await self._watch(_INTENTIONS, index)
        return found.index, _decode(found.body, list[ConsulIntention])

    async def watch_roots(self, index: int) -> tuple[int, ConsulRoots]:
        found = await self._watch("/v1/connect/ca/roots", index)
        return found.index, _decode(found.body, ConsulRoots)

    async def watch_entries(self, kind: str, index: int) -> tuple[int, list[Entry]]:
        found = await self._watch(f"/v1/config/{kind}", index)
        return found.index, _decode(found.body, list[Entry])

    async def entries(self, kind: str) -> list[tuple[Entry, int]]:
        """Each with the index at which it was written last."""
        body = await self._get(f"/v1/config/{kind}")
        written = _decode(body, list[Written])
        return list(zip(_decode(body, list[Entry]), (one.modify_index for one in written), strict=True))

    async def put_entry(self, entry: Entry, as_read: int | None = None) -> None:
        """Where it is as it was at the index `as_read` (0: where there is none). Raises RefusedError with Consul's own
        words where it takes no such entry, or is too old for it; PeerError where somebody else was quicker.
        """
        query = {"cas": str(as_read)} if as_read is not None else {}
        answer = await self._call("PUT", "/v1/config", query, msgspec.json.encode(entry))
        if answer.code != 200:
            what = " ".join(answer.body.split())[:300]
            raise RefusedError("refused", f"Consul {self.version} refuses {entry.kind} {entry.name}: {what}")
        if not _decode(bytes(answer.body.encode()), bool):
            raise PeerError(f"{entry.kind} {entry.name} was changed by somebody else meanwhile")

    async def delete_entry(self, kind: str, name: str) -> None:
        answer = await self._call("DELETE", f"/v1/config/{kind}/{quote(name)}")
        if answer.code not in (200, 404):
            raise _refusal(f"DELETE /v1/config/{kind}/{name}", answer)

    async def create_intention(self, intention: ConsulIntention) -> None:
        """Raises RefusedError where the pair has one and the dialect knows no replacing."""
        body = msgspec.json.encode(intention)
        if self.dialect is Dialect.EXACT:
            await self._put(f"{_INTENTIONS}/exact", _pair(intention), body)
            return
        answer = await self._call("POST", _INTENTIONS, {}, body)
        if answer.code != 200:
            raise _refusal(f"POST {_INTENTIONS}", answer)

    async def update_intention(self, intention: ConsulIntention) -> None:
        """Writes over the one there is; in the 1.8 dialect that is the one with its id."""
        body = msgspec.json.encode(intention)
        if self.dialect is Dialect.EXACT:
            await self._put(f"{_INTENTIONS}/exact", _pair(intention), body)
        else:
            await self._put(f"{_INTENTIONS}/{quote(intention.id)}", {}, body)

    async def delete_intention(self, intention: ConsulIntention) -> None:
        exact = self.dialect is Dialect.EXACT
        path = f"{_INTENTIONS}/exact" if exact else f"{_INTENTIONS}/{quote(intention.id)}"
        answer = await self._call("DELETE", path, _pair(intention) if exact else {})
        # Somebody else may have been quicker; 1.8 says so with status 500.
        if answer.code not in (200, 404) and "non-existent" not in answer.body:
            raise _refusal(f"DELETE {path}", answer)

    async def allowed(self, source: str, destination: str) -> bool:
        """Consul's own verdict."""
        body = await self._get(f"{_INTENTIONS}/check", {"source": source, "destination": destination})
        return bool(_decode(body, dict[str, bool])["Allowed"])

    async def leaf(self, service: str, *, index: int = 0, wait_s: int = 0) -> ConsulLeaf:
        """As Consul's agent has it. With the `index` of one: what follows that one, or it again after `wait_s`."""
        query = {"index": str(index), "wait": f"{wait_s}s"} if index else {}
        return _decode(await self._get(f"/v1/agent/connect/ca/leaf/{quote(service)}", query), ConsulLeaf)

    async def create_session(self, name: str, ttl_s: int) -> str:
        body = {"Name": name, "TTL": f"{ttl_s}s", "LockDelay": "0s", "Behavior": "release"}
        return _decode(await self._put("/v1/session/create", {}, msgspec.json.encode(body)), ConsulSession).id

    async def create_checked_session(self, name: str, check_id: str) -> str:
        """Ends as soon as the service check `check_id` of this Consul agent fails, or the agent itself does."""
        body = {
            "Name": name,
            "LockDelay": "0s",
            "Behavior": "release",
            "NodeChecks": ["serfHealth"],
            "ServiceChecks": [{"ID": check_id}],
        }
        return _decode(await self._put("/v1/session/create", {}, msgspec.json.encode(body)), ConsulSession).id

    async def sessions(self, name: str) -> list[str]:
        found = _decode(await self._get("/v1/session/list"), list[ConsulSession])
        return [session.id for session in found if session.name == name]

    async def session_exists(self, session: str) -> bool:
        return bool(_decode(await self._get(f"/v1/session/info/{quote(session)}"), list[ConsulSession]))

    async def register_service(
        self,
        *,
        name: str,
        id: str,  # noqa: A002 - Consul's word
        address: str,
        port: int,
        tags: tuple[str, ...],
        check_id: str,
        check_url: str,
        check_interval_s: int,
    ) -> None:
        """With this Consul agent, which asks `check_url`; the service passes until the first answer says otherwise."""
        check = {
            "CheckID": check_id,
            "Name": f"{name} gets on",
            "HTTP": check_url,
            "Interval": f"{check_interval_s}s",
            "Timeout": f"{check_interval_s}s",
            "Status": "passing",
            "DeregisterCriticalServiceAfter": "24h",
        }
        body = {"Name": name, "ID": id, "Address": address, "Port": port, "Tags": tags, "Check": check}
        await self._put("/v1/agent/service/register", {}, msgspec.json.encode(body))

    async def deregister_service(self, id: str) -> None:  # noqa: A002 - Consul's word
        await self._put(f"/v1/agent/service/deregister/{quote(id)}", {}, b"")

    async def renew_session(self, session: str) -> bool:
        """False: it has ended."""
        answer = await self._call("PUT", f"/v1/session/renew/{quote(session)}")
        if answer.code not in (200, 404):
            raise _refusal("PUT /v1/session/renew", answer)
        return bool(answer.code == 200)

    async def destroy_session(self, session: str) -> None:
        await self._put(f"/v1/session/destroy/{quote(session)}", {}, b"")

    async def acquire(self, key: str, value: bytes, session: str) -> bool:
        body = await self._put(f"/v1/kv/{quote(key)}", {"acquire": session}, value)
        return _decode(body, bool)

    async def holds(self, key: str, session: str) -> bool:
        """Whether `session` has the lock, as a majority of Consul's servers knows it now."""
        answer = await self._call("GET", f"/v1/kv/{quote(key)}", {"consistent": "1"})
        if answer.code == 404:
            return False
        return _decode(_checked(f"GET /v1/kv/{key}", answer), list[KvPair])[0].session == session

    async def watch_key(self, key: str, index: int) -> tuple[int, KvPair | None]:
        """The key once it changed since `index`; None where there is none."""
        query = {"index": str(index), "wait": f"{WATCH_WAIT_S}s"} if index else {}
        answer = await self._call("GET", f"/v1/kv/{quote(key)}", query, timeout_s=_WATCH_TIMEOUT_S)
        try:
            found = max(1, int(answer.headers["X-Consul-Index"]))
        except (KeyError, ValueError) as error:
            raise _refusal(f"GET /v1/kv/{key}", answer) from error
        index = found if found >= index else 0
        if answer.code == 404:
            return index, None
        return index, _decode(_checked(f"GET /v1/kv/{key}", answer), list[KvPair])[0]

    async def key(self, key: str) -> KvPair | None:
        answer = await self._call("GET", f"/v1/kv/{quote(key)}")
        if answer.code == 404:
            return None
        return _decode(_checked(f"GET /v1/kv/{key}", answer), list[KvPair])[0]

    async def _get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        return _checked(f"GET {path}", await self._call("GET", path, query))

    async def _put(self, path: str, query: Mapping[str, str], body: bytes) -> bytes:
        return _checked(f"PUT {path}", await self._call("PUT", path, query, body))

    async def _watch(self, path: str, index: int) -> Indexed:
        # The first answer is asked of a majority: a server that has just come to lead knows nothing for a moment, and
        # would say so. Later ones wait for what is newer than that.
        query = {"index": str(index), "wait": f"{WATCH_WAIT_S}s"} if index else {"consistent": "1"}
        answer = await self._call("GET", path, query, timeout_s=_WATCH_TIMEOUT_S)
        body = _checked(f"GET {path}", answer)
        try:
            found = max(1, int(answer.headers["X-Consul-Index"]))
        except (KeyError, ValueError) as error:
            raise PeerError(f"Consul at {self.url}: GET {path} came without a usable X-Consul-Index") from error
        # Consul's rule: after an index that went back, begin anew; never ask with 0, which would not block.
        return Indexed(index=found if found >= index else 0, body=body)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> consul.base.Response:
        uri = f"{path}?{urlencode(query)}" if query else path
        try:
            return await self._transport.send(method, uri, body, timeout_s)
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PeerError(f"Consul at {self.url} does not answer {method} {path}: {reason}") from error


class _Transport(consul.aio.HTTPClient):  # type: ignore[misc]  # py-consul ships no types
    """py-consul's asyncio transport, over TCP or a unix socket; its own constructor knows TCP alone."""

    def __init__(self, base_uri: str, connector: aiohttp.BaseConnector, token: str) -> None:
        self.base_uri = base_uri
        self._headers = {"X-Consul-Token": token} if token else {}
        self._session = aiohttp.ClientSession(connector=connector)

    async def send(self, method: str, uri: str, body: bytes, timeout_s: float) -> consul.base.Response:
        """`timeout_s` overrides aiohttp's 300 s, which would cut blocking queries."""
        return await self._request(
            _same, method, self.base_uri + uri, self._headers, data=body or None, connections_timeout=timeout_s
        )


def _transport(url: str, token: str, tls: ssl.SSLContext | None) -> _Transport:
    if url.startswith("unix:"):
        return _Transport("http://catalog", aiohttp.UnixConnector(url.removeprefix("unix:"), limit=0), token)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"consul: {url!r}: must be http://HOST:PORT, https://HOST:PORT or unix:PATH")
    # Each watched service holds a connection: the bound is the mesh's, not the connector's.
    connector = aiohttp.TCPConnector(limit=0, ssl=tls if tls is not None else True)
    return _Transport(url.rstrip("/"), connector, token)


def _same(response: consul.base.Response) -> consul.base.Response:
    return response


def _checked(what: str, answer: consul.base.Response) -> bytes:
    if answer.code != 200:
        raise _refusal(what, answer)
    return bytes(answer.body.encode())


def _refusal(what: str, answer: consul.base.Response) -> PeerError | RefusedError:
    text = f"{what}: status {answer.code}: {answer.body.strip()[:500]}"
    if answer.code == 403:
        return RefusedError("forbidden", f"Consul refuses {text} (does the token have the rights?)")
    # 5xx without a reason of ours is Consul in trouble (no leader): to be tried again.
    return (
        PeerError(f"Consul fails {text}") if answer.code >= 500 else RefusedError("refused", f"Consul refuses {text}")
    )


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise PeerError(f"Consul's answer is not what its API promises: {error}") from error


def _pair(intention: ConsulIntention) -> dict[str, str]:
    return {"source": intention.source_name, "destination": intention.destination_name}
