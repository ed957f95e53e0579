"""The controller's only wiring: configuration -> parts -> run until SIGTERM -> stop.

Tasks: `engine`, `mesh`, `catalog`, `mqtt`, `targets`, `confirm`, in one TaskGroup: when one fails, the controller ends
with its error. With the journal in Consul, `candidate` goes round instead: follow, win, lead for a term, follow again.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine

import grpc.aio
import msgspec

from controller.access import AccessService
from controller.archive import ArchiveService
from controller.audit import AuditLog
from controller.ca import FleetCa
from controller.callers import Callers
from controller.candidate import candidate
from controller.catalog.catalog import Catalog
from controller.config import WILDCARDS, Config, JournalKind
from controller.consul_access import client_tls, token
from controller.core import views
from controller.core.events import EndpointsWithdrawn
from controller.core.policy import Policy
from controller.discovery import TargetGroup, keep_targets, target_groups
from controller.engine import Engine, RestoredError
from controller.event_log import EventLog
from controller.events import Broker
from controller.fleet import FleetService
from controller.insight import InsightService
from controller.join import JoinService, admission
from controller.join_token import keep_join_token
from controller.journal.sqlite import SqliteJournal
from controller.keyring import Keyring
from controller.listeners import socket_listener, tls_listener
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.issuer import ConsulIssuer, EmbeddedIssuer, Issuer
from controller.mesh.mesh import Mesh
from controller.metrics import ControllerCollector, exposition, http_listener
from controller.operator import OperatorService
from controller.parts import Parts
from controller.rotation import Rotation
from controller.stores import StoreService
from controller.term import Term
from outrider.apart import apart
from outrider.config import host_port
from outrider.errors import ConfigError
from outrider.log import Log
from outrider.tls import TlsFiles, server_credentials, ssl_context
from outrider.v1 import (
    access_pb2_grpc,
    archive_pb2_grpc,
    fleet_pb2_grpc,
    insight_pb2_grpc,
    operator_pb2_grpc,
    stores_pb2_grpc,
)

_DATACENTER = "dc1"


async def run(config: Config) -> None:
    """Until SIGTERM or SIGINT. Raises OutriderError, alone or in a group: the process ends with its exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if config.journal is JournalKind.CONSUL:
        await candidate(config, stop, lead=lead, issue=issue)
        return
    while not stop.is_set():
        try:
            term = Term(journal=SqliteJournal(config.data / "journal.db"))
            await apart(lead(config, term, stop), name="term")
        except* RestoredError as restored:
            Log("controller").warning("begins anew", reason=str(restored.exceptions[0]))


async def lead(config: Config, term: Term, stop: asyncio.Event) -> None:
    """Until `stop` is set. Raises OutriderError, LeadershipLostError among them, alone or in a group."""
    async with contextlib.AsyncExitStack() as stack:
        controller = Controller(config, term)
        await controller.start(stack)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(task, name=name) for name, task in controller.tasks().items()]
            await controller.begin()
            controller.log.info("ready", **controller.listening)
            await stop.wait()
            controller.log.info("stopping")
            for task in tasks:
                task.cancel()


class Controller:
    """The parts, each made once."""

    def __init__(self, config: Config, term: Term) -> None:
        """Reads and makes files below `data`; binds nothing. Raises HostError."""
        self._term = term
        self.log = Log("controller")
        self.listening: dict[str, str] = {}
        self._config = config
        self._ca = FleetCa(config.data / "ca", config.cluster, node_valid_s=config.node_certificate_valid_s)
        self._files = issue(self._ca, config)
        self._keyring = Keyring(config.secrets_key_file, os.environ)
        self._agree = term.agree or (lambda _: None)
        self._audit = AuditLog(config.data)
        self._events = EventLog()
        self._policy = Policy(placement=config.placement, preempts=config.preemption)
        self._engine = Engine(
            journal=term.journal,
            events=self._events,
            log=Log("engine"),
            standing=term.standing,
            policy=self._policy,
        )
        self._broker = self._make_broker()
        self._catalog: Catalog | None = None
        self._consul_url = "embedded"
        self._parts: Parts

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Journal, catalog, mesh, then the listeners. `stack` undoes it all in the reverse order."""
        await self._engine.open()
        stack.push_async_callback(self._engine.close)
        try:
            await asyncio.to_thread(self._agree, self._keyring)
        except ConfigError as error:  # all else needs no secrets, and nobody else may be there
            self.log.warning("another key of secrets", reason=str(error))
        consul, issuer = await self._start_catalog(stack)
        stack.push_async_callback(consul.close)
        mesh = Mesh(
            consul=consul,
            issuer=issuer,
            cluster=self._config.cluster,
            adopt_intentions=self._config.adopt_intentions,
            log=Log("mesh"),
            lock=self._term.lock,
        )
        parts = Parts(
            cluster=self._config.cluster,
            engine=self._engine,
            mesh=mesh,
            events=self._events,
            keyring=self._keyring,
            agree=self._agree,
        )
        mesh.deliver = parts.sessions.deliver
        mesh.withdrawn = lambda allocs: self._engine.post(EndpointsWithdrawn(allocs=allocs))
        self._engine.sync_all(mesh)
        self._parts = parts
        await self._listen(stack)

    def tasks(self) -> dict[str, Coroutine[object, object, None]]:
        tasks = {
            "engine": self._engine.run(sessions=self._parts.sessions, mesh=self._parts.mesh),
            "mesh": self._parts.mesh.run(),
        }
        if self._term.confirm is not None:
            tasks["confirm"] = self._term.confirm()
        if self._catalog is not None:
            tasks["catalog"] = self._catalog.failed()
        if self._config.targets_file is not None:
            tasks["targets"] = keep_targets(self._config.targets_file, self._targets, self.log)
        if self._broker is not None:
            tasks["mqtt"] = self._broker.run()
        return tasks

    async def begin(self) -> None:
        """Once the tasks run, and when the CA changes: what needs the journal."""
        if self._config.join_token_file is not None:
            await keep_join_token(self._config.join_token_file, self._engine, self._ca)

    def _make_broker(self) -> Broker | None:
        if self._config.mqtt is None:
            return None
        broker = Broker(
            config=self._config.mqtt,
            cluster=self._config.cluster,
            tls=lambda: ssl_context(self._files, server=False),
            seen=self._engine.post,
            log=Log("mqtt"),
        )
        self._events.forward = broker.put
        return broker

    async def _start_catalog(self, stack: contextlib.AsyncExitStack) -> tuple[ConsulAdapter, Issuer]:
        config = self._config
        if self._term.lock is not None or config.consul is not None:
            access = config.consul_or_local
            self._consul_url = access.url
            consul = ConsulAdapter(access.url, token=token(access), tls=client_tls(access))
            return consul, ConsulIssuer(consul)
        config.catalog_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        listen = config.catalog.listen
        self._catalog = Catalog(
            database=config.data / "catalog.db",
            socket=config.catalog_socket,
            listen=host_port(listen) if listen else None,
            tls=ssl_context(self._files, server=True) if listen else None,
            cluster=config.cluster,
            datacenter=_DATACENTER,
            log=Log("catalog"),
        )
        await self._catalog.start()
        stack.push_async_callback(self._catalog.stop)
        self.listening["catalog_socket"] = str(config.catalog_socket)
        return ConsulAdapter(f"unix:{config.catalog_socket}"), EmbeddedIssuer(self._catalog.ca, _DATACENTER)

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        config, parts = self._config, self._parts
        limit = config.rate_limit
        callers = Callers(
            cluster=config.cluster, access=self._engine.state.access, per_s=limit.per_s, burst=limit.burst
        )
        operator = OperatorService(parts, consul=self._consul_url, callers=callers, audit=self._audit)
        stores = StoreService(parts, callers=callers, audit=self._audit)
        rotation = Rotation(
            ca=self._ca,
            sessions=parts.sessions,
            state=self._engine.state,
            share=self._term.share or (lambda: None),
            issue=lambda: issue(self._ca, config),
            changed=self.begin,
        )
        access = AccessService(parts, callers=callers, audit=self._audit, ca=self._ca, rotation=rotation)
        insight = InsightService(parts, callers=callers, audit=self._audit, catalog=self._catalog)
        collector = ControllerCollector(
            parts, catalog_requests=self._catalog.requests if self._catalog else {}, broker=self._broker
        )
        archive = ArchiveService(
            parts,
            callers=callers,
            audit=self._audit,
            metrics=lambda: exposition(collector),
            configuration=msgspec.to_builtins(config, enc_hook=str),
        )
        fleet = FleetService(parts, ca=self._ca, trust=rotation.trust)
        join = JoinService(cluster=config.cluster, ca=self._ca, admit=admission(self._engine), refused=parts.refused)

        def register_people(server: grpc.aio.Server) -> None:
            operator_pb2_grpc.add_OperatorServiceServicer_to_server(operator, server)
            stores_pb2_grpc.add_StoreServiceServicer_to_server(stores, server)
            access_pb2_grpc.add_AccessServiceServicer_to_server(access, server)
            archive_pb2_grpc.add_ArchiveServiceServicer_to_server(archive, server)
            insight_pb2_grpc.add_InsightServiceServicer_to_server(insight, server)

        def register_anybody(server: grpc.aio.Server) -> None:
            register_people(server)
            fleet_pb2_grpc.add_JoinServiceServicer_to_server(join, server)

        def register_members(server: grpc.aio.Server) -> None:
            register_people(server)
            fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)

        members, anybody = (server_credentials(self._files, client_certificate=each) for each in (True, False))
        for key, listener in (
            (
                "operator_socket",
                socket_listener(config.operator_socket, register_people),
            ),
            ("listen", tls_listener("listen", config.listen, members, register_members)),
            (
                "join_listen",
                tls_listener("join_listen", config.join_listen, anybody, register_anybody),
            ),
        ):
            self.listening[key] = await stack.enter_async_context(listener)
        if config.metrics_listen is not None:
            at = await stack.enter_async_context(http_listener(config.metrics_listen, collector, self._targets))
            self.listening["metrics_listen"] = at

    def _targets(self) -> tuple[TargetGroup, ...]:
        host, port = host_port(self.listening["metrics_listen"])
        if host in WILDCARDS and self._config.addresses:
            host = self._config.addresses[0]
        return target_groups(self._config.cluster, f"{host}:{port}", views.node_states(self._engine.state))


def issue(ca: FleetCa, config: Config) -> TlsFiles:
    """The controller's own certificate, and those that it makes for others on its host."""
    ca.issue_operator("cli")
    ca.issue_reader("prometheus")
    if config.mqtt is not None:
        ca.issue_broker([config.mqtt.host])
    listened = {host_port(text)[0] for text in (config.listen, config.join_listen)} - WILDCARDS
    return ca.issue_server([*config.addresses, *sorted(listened), "localhost", "127.0.0.1"])
