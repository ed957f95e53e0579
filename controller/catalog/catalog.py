"""The embedded catalog's server: a part of Consul's HTTP API on a unix socket, and by mTLS on a port where asked.

Tasks: `catalog-writer` brings commits to disk in batches, `catalog-expiry` ends sessions in time. Queue: commits on
their way to disk, bounded; when it is full, writes are refused with 503. A change is visible to watchers at once, and
acknowledged to its author when it is on disk. Never decides what stands in the catalog: the mesh and operators do.
"""

import asyncio
import os
import random
import socket as sockets
import ssl
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from aiohttp import web

from controller.catalog import catalog_routes, config_routes, connect_routes, kv_routes, registry, sessions
from controller.catalog.api import Access, Answer, Call, Route, Scope
from controller.catalog.ca import ConnectCa, make_root, with_next_root, with_next_root_signing
from controller.catalog.database import COMMITS_QUEUED_MAX, Database
from controller.catalog.durations import parse_duration_s
from controller.catalog.rows import CaRow, CheckRow, NodeRow, Row, SessionRow
from controller.catalog.store import Commit, Store, Table
from controller.catalog.txn import BODY_BYTES_MAX, FailedTransactionError
from controller.catalog.waiting import Waiters
from outrider.errors import ConfigError, InputError, JournalError, RefusedError
from outrider.log import Log
from outrider.tls import IdentityKind, certificate_identity

# The dialect spoken (docs of Consul 1.8); clients choose by it.
_VERSION = "1.8.7"
# No node of the fleet can be called so: their names have no dot.
_OWN_NODE = "catalog.outrider"
_WAIT_DEFAULT_S, _WAIT_MAX_S = 300.0, 600.0
_BLOCKED_MAX = 4096
_ROUTES = (*catalog_routes.ROUTES, *kv_routes.ROUTES, *connect_routes.ROUTES, *config_routes.ROUTES)
_ALLOWED = {
    IdentityKind.CONTROLLER: frozenset({Access.READ, Access.PRIVATE, Access.INTENTIONS, Access.WRITE}),
    IdentityKind.OPERATOR: frozenset({Access.READ, Access.PRIVATE, Access.INTENTIONS, Access.LEAF}),
    IdentityKind.READER: frozenset({Access.READ}),
    IdentityKind.NODE: frozenset[Access](),
    IdentityKind.USER: frozenset[Access](),  # OperatorService knows their roles, the catalog does not
}
_STATUS = {"forbidden": 403, "not_found": 404, "conflict": 409, "too_large": 413, "busy": 429, "unavailable": 503}


class Catalog:
    """`EmbeddedIssuer(catalog.ca)` issues with its Connect CA, after `start`."""

    ca: ConnectCa

    def __init__(
        self,
        *,
        database: Path,
        socket: Path,
        listen: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
        cluster: str,
        datacenter: str = "dc1",
        log: Log,
    ) -> None:
        """`listen`: host and port for mTLS, where `tls` must ask for clients' certificates. The socket is the
        controller's own, mode 0600. Raises ConfigError."""
        if listen is not None and (tls is None or tls.verify_mode != ssl.CERT_REQUIRED):
            raise ConfigError("catalog.listen: needs TLS that asks for clients' certificates")
        self._database_path, self._socket, self._listen, self._tls = database, socket, listen, tls
        self._cluster, self._datacenter, self._log = cluster, datacenter, log
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status) -> answered, for metrics
        self.port = 0  # where it listens, once started; 0: on the socket alone
        self._waiters = Waiters(_BLOCKED_MAX)
        self._queue: asyncio.Queue[tuple[Commit, asyncio.Future[None]]] = asyncio.Queue(COMMITS_QUEUED_MAX)
        self._deadlines: dict[str, float] = {}  # session -> when it ends, monotonic
        self._deadline_changed = asyncio.Event()

    async def start(self) -> None:
        """Answers requests when it returns. Raises JournalError, ConfigError."""
        self._database = Database(self._database_path)
        index, rows = self._database.load()
        self._store = Store(self._datacenter, index)
        self._store.load(rows)
        self._found()
        self._follow_sessions(self._store.sessions.values())
        self._task = asyncio.create_task(self._run(), name="catalog")
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await self._runner.setup()
        try:
            await self._bind()
        except OSError as error:
            await self.stop()
            raise ConfigError(f"catalog: cannot listen: {error}") from error
        self._log.info("catalog_started", socket=self._socket, port=self.port, index=self._store.index)

    @property
    def waiting(self) -> int:
        """Blocking queries that wait now."""
        return self._waiters.waiting

    async def failed(self) -> None:
        """Waits for ever; raises JournalError once the database can no longer be written."""
        await asyncio.shield(self._task)

    async def offer_root(self) -> str:
        """The next root, from now on trusted beside the one that signs; the same again until it signs itself."""
        row = await self._change_ca(with_next_root)
        return row.next_certificate_pem

    async def sign_with_next_root(self) -> None:
        """Leaves are made by the root that was offered. Everybody must trust it by now."""
        self.ca.use(await self._change_ca(with_next_root_signing))

    async def _change_ca(self, change: Callable[[CaRow, datetime], CaRow]) -> CaRow:
        assert self._store.ca is not None, "every catalog has its CA"
        row = change(self._store.ca, datetime.now(UTC))
        with self._store.transaction():
            self._store.set_ca(row)
        if self._store.last_commit.changes:
            await self._publish()
        return row

    async def stop(self) -> None:
        """Answers who waits, writes what is queued, and closes."""
        self._waiters.close()
        await self._runner.cleanup()
        if not self._task.done():
            await self._queue.join()
            self._task.cancel()
        with suppress(asyncio.CancelledError, JournalError):
            await self._task
        self._database.close()
        self._socket.unlink(missing_ok=True)

    def _found(self) -> None:
        """What every catalog has: its CA, and a node of its own that sessions can belong to."""
        store = self._store
        with store.transaction():
            if store.ca is None:
                store.set_ca(make_root(datetime.now(UTC)))
            registry.set_node(store, NodeRow(node=_OWN_NODE, address="127.0.0.1"))
            health = CheckRow(node=_OWN_NODE, check_id="serfHealth", name="Serf Health Status", status="passing")
            registry.set_check(store, health, time.monotonic())
        if store.last_commit.changes:
            self._database.write([store.last_commit])
        assert store.ca is not None
        self.ca = ConnectCa(store.ca, self._datacenter)
        self._scope = Scope(
            store=store,
            ca=self.ca,
            own_node=_OWN_NODE,
            address=f"{self._listen[0]}:{self._listen[1]}" if self._listen else "127.0.0.1:0",
            version=_VERSION,
        )

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        for route in _ROUTES:
            application.router.add_route(route.method, f"/v1{route.path}", self._handler(route))
        application.router.add_route("*", "/{path:.*}", self._unknown)
        return application

    async def _bind(self) -> None:
        self._socket.unlink(missing_ok=True)
        listener = sockets.socket(sockets.AF_UNIX)
        mask = os.umask(0o177)  # so that there is no moment in which others may connect
        try:
            listener.bind(str(self._socket))
        finally:
            os.umask(mask)
        await web.SockSite(self._runner, listener).start()
        if self._listen is not None:
            host, port = self._listen
            await web.TCPSite(self._runner, host, port, ssl_context=self._tls).start()
            self.port = next(address[1] for address in self._runner.addresses if isinstance(address, tuple))

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.Response]]:
        name = f"{route.method} {route.path}"

        async def handle(request: web.Request) -> web.Response:
            try:
                response = _respond(await self._answer(route, request))
            except FailedTransactionError as error:
                body = msgspec.json.encode({"Results": None, "Errors": error.errors})
                response = web.Response(status=409, body=body, content_type="application/json")
            except InputError as error:
                response = web.Response(status=400, text=f"{error}\n")
            except RefusedError as error:
                response = web.Response(status=_STATUS[error.code], text=f"{error}\n")
            except JournalError as error:
                response = web.Response(status=500, text=f"not done: {error}\n")
            except web.HTTPRequestEntityTooLarge:
                response = web.Response(status=413, text=f"Request body too large, max size: {BODY_BYTES_MAX} bytes\n")
            self.requests[name, response.status] += 1
            if response.status in (400, 403, 413):
                self._log.warning("catalog_refused", route=name, status=response.status, why=response.text)
            return response

        return handle

    async def _unknown(self, request: web.Request) -> web.Response:
        self.requests["unknown", 404] += 1
        text = f"{request.method} {request.path}: the embedded catalog has no such endpoint; run a Consul for it\n"
        return web.Response(status=404, text=text)

    async def _answer(self, route: Route, request: web.Request) -> Answer:
        self._authorize(route, request)
        if request.query.get("dc", self._datacenter) != self._datacenter:
            raise InputError("No path to datacenter")
        if "filter" in request.query:
            raise InputError("?filter: not understood by the embedded catalog; filter the answer, or run a Consul")
        call = Call(
            path=request.match_info,
            query=dict(request.query),
            body=await request.read(),
            monotonic_s=time.monotonic(),
            at=datetime.now(UTC),
            new_id=str(uuid.uuid4()),
        )
        return await self._read(route, call) if route.method == "GET" else await self._write(route, call)

    def _authorize(self, route: Route, request: web.Request) -> None:
        transport = request.transport
        assert transport is not None, "a request in hand has a connection"
        if transport.get_extra_info("socket").family == sockets.AF_UNIX:
            kind, who = IdentityKind.CONTROLLER, "the controller"
        else:
            identity = certificate_identity(transport.get_extra_info("peercert"))
            if identity is None or identity.cluster != self._cluster:
                raise RefusedError("forbidden", f"Permission denied: no certificate of cluster {self._cluster}")
            kind, who = identity.kind, identity.uri
        if route.access not in _ALLOWED[kind]:
            raise RefusedError("forbidden", f"Permission denied: {who} may not {route.method} {route.path}")

    async def _read(self, route: Route, call: Call) -> Answer:
        known = call.number("index")
        until_s = time.monotonic() + _wait_s(call) if known else 0.0
        while True:
            answer = route.handler(self._scope, call)
            left_s = until_s - time.monotonic()
            if answer.index is None or not known or answer.index > known or left_s <= 0 or self._waiters.closed:
                return answer
            if self._waiters.full:
                raise RefusedError("busy", f"{_BLOCKED_MAX} blocking queries are waiting: try again later")
            await self._waiters.wait(answer.topics, left_s)

    async def _write(self, route: Route, call: Call) -> Answer:
        if self._queue.full():
            raise RefusedError("unavailable", "the disk is too slow: too many writes are waiting, try again later")
        with self._store.transaction():
            answer = route.handler(self._scope, call)
        if (row := self._store.sessions.get(answer.renewed)) is not None:
            self._follow_sessions([row])
        if self._store.last_commit.changes:
            await self._publish()
        return answer

    async def _publish(self) -> None:
        """Wakes who watches the last commit; returns when it is on disk."""
        commit, done = self._store.last_commit, asyncio.get_running_loop().create_future()
        self._waiters.wake(commit.topics)
        self._follow_sessions(
            change.row for change in commit.changes if change.table is Table.SESSION and change.row is not None
        )
        await self._queue.put((commit, done))
        await done

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._bring_to_disk(), name="catalog-writer")
                group.create_task(self._end_sessions(), name="catalog-expiry")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _bring_to_disk(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await asyncio.to_thread(self._database.write, [commit for commit, _ in batch])
            except JournalError as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                raise
            for _, done in batch:
                if not done.done():
                    done.set_result(None)
                self._queue.task_done()

    async def _end_sessions(self) -> None:
        while True:
            self._deadline_changed.clear()
            next_s = min(self._deadlines.values(), default=None)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if next_s is None else max(0.0, next_s - time.monotonic())):
                    await self._deadline_changed.wait()
            now_s = time.monotonic()
            ended = [session for session, deadline_s in self._deadlines.items() if deadline_s <= now_s]
            for session in ended:
                del self._deadlines[session]
            with self._store.transaction():
                for session in ended:
                    sessions.invalidate(self._store, session, now_s)
            if self._store.last_commit.changes:
                await self._publish()

    def _follow_sessions(self, rows: Iterable[Row]) -> None:
        """Their time begins now: at creation, at renewal, and when the catalog starts again."""
        for row in rows:
            assert isinstance(row, SessionRow)
            if row.ttl:
                self._deadlines[row.id] = time.monotonic() + parse_duration_s(row.ttl)
                self._deadline_changed.set()


def _respond(answer: Answer) -> web.Response:
    raw = isinstance(answer.body, bytes)
    body = answer.body if raw else msgspec.json.encode(answer.body)
    response = web.Response(status=answer.status, body=body, content_type="text/plain" if raw else "application/json")
    if answer.index is not None:
        response.headers["X-Consul-Index"] = str(answer.index)
        response.headers["X-Consul-KnownLeader"] = "true"
        response.headers["X-Consul-LastContact"] = "0"
    return response


def _wait_s(call: Call) -> float:
    """Consul's rule: at most ten minutes, and up to a sixteenth more, so that waiters do not return all at once."""
    text = call.query.get("wait", "")
    wait_s = min(parse_duration_s(text) if text else _WAIT_DEFAULT_S, _WAIT_MAX_S)
    return wait_s + random.uniform(0.0, wait_s / 16)  # noqa: S311 -- spreads load, guards nothing
