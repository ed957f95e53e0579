"""The mesh against the embedded catalog and against a real Consul: what is wanted comes to stand there, and stays."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controller.catalog.catalog import Catalog
from controller.core.mesh_intent import Interests, NodeRegistration, OwnedIntention, ServiceRegistration
from controller.entries import TRAFFIC_KINDS
from controller.mesh.consul_adapter import ConsulAdapter, Dialect
from controller.mesh.issuer import ConsulIssuer, EmbeddedIssuer, Issuer
from controller.mesh.leader import Leadership
from controller.mesh.mesh import Mesh
from controller.mesh.shapes import CatalogNode, ConsulService, Txn, TxnNode, TxnService
from controller.mesh.watcher import WATCHES_MAX
from outrider.errors import InputError, RefusedError
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.log import Log
from outrider.model.job import Protocol
from outrider.model.mesh import Action, Endpoint, MeshService, MeshUpdate, spiffe_id
from tests.integration.consul import RealConsul
from tests.integration.processes import until

WEB, API, DB = ServiceName("web"), ServiceName("api"), ServiceName("db")
SERVICES = {WEB: (0, Protocol.HTTP), API: (1, Protocol.HTTP), DB: (2, Protocol.TCP)}
CLUSTER = "test"


class EmbeddedRecord:
    """The catalog in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.url = f"unix:{directory}/catalog.sock"

    async def start(self) -> None:
        self.catalog = Catalog(
            database=self._directory / "catalog.db",
            socket=self._directory / "catalog.sock",
            cluster=CLUSTER,
            log=Log("catalog"),
        )
        await self.catalog.start()

    async def stop(self) -> None:
        await self.catalog.stop()

    def issuer(self, _consul: ConsulAdapter) -> Issuer:
        return EmbeddedIssuer(self.catalog.ca, "dc1")


class RealRecord:
    """A Consul process of this test's own: it forgets everything when it is restarted."""

    def __init__(self, directory: Path) -> None:
        self._consul = RealConsul(directory)
        self.url = self._consul.url

    async def start(self) -> None:
        await asyncio.to_thread(self._consul.start)

    async def stop(self) -> None:
        await asyncio.to_thread(self._consul.stop)

    def issuer(self, consul: ConsulAdapter) -> Issuer:
        return ConsulIssuer(consul)


Record = EmbeddedRecord | RealRecord


@pytest.fixture(params=["embedded", pytest.param("consul", marks=pytest.mark.host)])
async def record(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Record]:
    made: Record = EmbeddedRecord(tmp_path) if request.param == "embedded" else RealRecord(tmp_path)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


class Running:
    """A mesh that runs, and what it has delivered, put together as an agent would."""

    def __init__(self, mesh: Mesh, consul: ConsulAdapter) -> None:
        self.mesh, self.consul = mesh, consul
        self.updates: list[tuple[NodeId, MeshUpdate]] = []
        self.withdrawn: list[AllocId] = []
        self._services: dict[tuple[NodeId, ServiceName], MeshService] = {}
        mesh.deliver = self.take
        mesh.withdrawn = self.withdrawn.extend

    def take(self, node: NodeId, update: MeshUpdate) -> None:
        assert not self.updates or update.version > self.updates[-1][1].version, "versions only grow"
        self.updates.append((node, update))
        for service in update.services:
            self._services[node, service.name] = service
        for name in update.services_removed:
            del self._services[node, name]

    def connect(self, node: NodeId) -> None:
        self.take(node, self.mesh.full(node))

    def endpoints(self, node: NodeId, service: ServiceName) -> tuple[Endpoint, ...]:
        found = self._services.get((node, service))
        return found.endpoints if found is not None else ()

    def healthy(self, node: NodeId, service: ServiceName) -> set[str]:
        return {endpoint.id for endpoint in self.endpoints(node, service) if endpoint.healthy}

    def was_missing(self, endpoint: str, since: int) -> bool:
        """In an update after the first `since`: a repair may be quicker than a look."""
        services = [service for _, update in self.updates[since:] for service in update.services]
        return any(endpoint not in {found.id for found in service.endpoints} for service in services)

    async def registered(self, node: str) -> set[str]:
        services, _ = await self.consul.node(node)
        return set(services.services or {}) if services is not None else set()


@contextlib.asynccontextmanager
async def running(
    record: Record, prepare: Callable[[Mesh], None] = lambda _mesh: None, *, adopt: bool = True
) -> AsyncIterator[Running]:
    consul = ConsulAdapter(record.url)
    mesh = Mesh(consul=consul, issuer=record.issuer(consul), cluster=CLUSTER, adopt_intentions=adopt, log=Log("mesh"))
    mesh.set_services(SERVICES)
    prepare(mesh)
    one = Running(mesh, consul)
    task = asyncio.create_task(mesh.run(), name="mesh")
    try:
        yield one
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await consul.close()


def instance(alloc: str, service: ServiceName = API, *, passing: bool = True, **more: Any) -> ServiceRegistration:
    values: dict[str, Any] = {"port": 2000, "local_address": "10.9.0.1", "local_port": 15100, "upstreams": (DB,)}
    return ServiceRegistration(
        alloc=AllocId(alloc),
        service=service,
        protocol=Protocol.HTTP,
        job=JobName("shop"),
        passing=passing,
        **{**values, **more},
    )


def node(name: str, *services: ServiceRegistration, passing: bool = True) -> NodeRegistration:
    return NodeRegistration(node=NodeId(name), address="10.0.0.1", passing=passing, output="", services=services)


N1, N2 = NodeId("n1"), NodeId("n2")


def calls_api(mesh: Mesh) -> None:
    mesh.set_interests(N2, Interests(called=frozenset({API}), placed=frozenset({WEB})))


async def test_health_and_node_loss_reach_the_callers(record: Record) -> None:
    async with running(record, calls_api) as one:
        one.connect(N2)
        one.mesh.set_node(node("n1", instance("a1"), instance("a2", passing=False)))
        await until(lambda: len(one.endpoints(N2, API)) == 2 and one.healthy(N2, API) == {"a1-api"}, "a1 is healthy")
        found = {endpoint.id: endpoint for endpoint in one.endpoints(N2, API)}
        assert found["a1-api"] == Endpoint(
            id="a1-api",
            node="test-n1",
            address="10.0.0.1",
            port=2000,
            local_address="10.9.0.1",
            local_port=15100,
            alloc=AllocId("a1"),
            outrider=True,
        )
        assert not found["a2-api"].healthy

        one.mesh.set_node(node("n1", instance("a1"), instance("a2")))
        await until(lambda: one.healthy(N2, API) == {"a1-api", "a2-api"}, "both are healthy")
        one.mesh.set_node(node("n1", instance("a1"), instance("a2"), passing=False))
        await until(lambda: one.healthy(N2, API) == set(), "the node is lost")
        assert len(one.endpoints(N2, API)) == 2
        one.mesh.remove_node(N1)
        await until(lambda: one.endpoints(N2, API) == (), "the node is removed")
        await until(lambda: one.mesh.roots().trust_domain != "", "the roots are known")
        assert one.mesh.roots().datacenter == "dc1"
        assert one.mesh.reachable
        assert one.mesh.leading


async def test_a_service_that_only_calls_is_visible_and_no_endpoint(record: Record) -> None:
    async with running(record, calls_api) as one:
        one.connect(N2)
        one.mesh.set_node(node("n1", instance("a1"), instance("c1", port=0)))
        await until(lambda: one.healthy(N2, API) == {"a1-api"}, "a1 is healthy")
        assert await one.registered("test-n1") == {"a1-api", "a1-api-proxy", "c1-api"}
        assert len(one.endpoints(N2, API)) == 1


async def test_what_others_change_is_repaired(record: Record) -> None:
    async with running(record, calls_api) as one:
        one.connect(N2)
        one.mesh.set_node(node("n1", instance("a1")))
        one.mesh.set_node(node("n3", instance("a3")))
        await until(lambda: one.healthy(N2, API) == {"a1-api", "a3-api"}, "both are healthy")

        mark = len(one.updates)
        await meddle(one, "delete", "test-n1", ConsulService(id="a1-api-proxy", service="api-sidecar-proxy"))
        await until(lambda: one.was_missing("a1-api", mark), "the catalog shows the meddling")
        await until(lambda: one.healthy(N2, API) == {"a1-api", "a3-api"}, "it is repaired")

        mark = len(one.updates)
        gone = Txn(node=TxnNode(verb="delete", node=CatalogNode(node="test-n3", address="10.0.0.1")))
        assert not (await one.consul.transact([gone])).errors
        await until(lambda: one.was_missing("a3-api", mark), "the catalog shows the meddling")
        await until(lambda: one.healthy(N2, API) == {"a1-api", "a3-api"}, "it is repaired")


async def meddle(one: Running, verb: str, name: str, service: ConsulService) -> None:
    answer = await one.consul.transact([Txn(service=TxnService(verb=verb, node=name, service=service))])
    assert not answer.errors


async def test_a_controller_started_again_removes_ghosts_and_nothing_else(record: Record) -> None:
    def both(mesh: Mesh) -> None:
        mesh.set_node(node("n1", instance("a1"), instance("a2")))
        mesh.set_node(node("n3", instance("a3")))

    async with running(record, both) as one:
        await until(lambda: registered(one, "test-n3", 2), "all is registered")
        foreign = Txn(node=TxnNode(verb="set", node=CatalogNode(node="database", address="10.0.0.9")))
        assert not (await one.consul.transact([foreign])).errors

    async with running(record, lambda mesh: mesh.set_node(node("n1", instance("a1")))) as again:
        await until(lambda: registered(again, "test-n1", 2), "the ghost service is gone")
        await until(lambda: registered(again, "test-n3", 0), "the ghost node is gone")
        assert (await again.consul.node("database"))[0] is not None


async def registered(one: Running, name: str, count: int) -> bool:
    return len(await one.registered(name)) == count


async def test_consul_restarted_under_it(record: Record) -> None:
    async with running(record, calls_api) as one:
        one.connect(N2)
        one.mesh.set_node(node("n1", instance("a1")))
        one.mesh.set_intentions((OwnedIntention(source=WEB, destination=API, job=JobName("shop")),))
        await until(lambda: one.healthy(N2, API) == {"a1-api"}, "a1 is healthy")

        await record.stop()
        await until(lambda: not one.mesh.reachable, "it is away")
        assert one.healthy(N2, API) == {"a1-api"}, "callers keep what they were told"
        one.mesh.set_node(node("n1", instance("a1"), instance("a4")))
        await record.start()

        await until(lambda: one.healthy(N2, API) == {"a1-api", "a4-api"}, "what was wanted meanwhile is there")
        await until(lambda: owned_by_shop(one), "the intention is there")


async def owned_by_shop(one: Running) -> bool:
    return any(found.owner == "shop" for found in await one.mesh.intentions())


async def test_an_endpoint_is_withdrawn_once_every_connected_caller_knows(record: Record) -> None:
    def interests(mesh: Mesh) -> None:
        for name in ("n2", "n4", "n5"):
            mesh.set_interests(NodeId(name), Interests(called=frozenset({API}), placed=frozenset()))

    async with running(record, interests) as one:
        one.connect(N2)
        one.connect(NodeId("n4"))
        one.mesh.set_node(node("n1", instance("a1"), instance("a2")))
        await until(lambda: one.healthy(N2, API) == {"a1-api", "a2-api"}, "both are healthy")

        one.mesh.set_node(node("n1", instance("a2")))
        one.mesh.withdraw((AllocId("a1"),), (API,))
        await until(lambda: one.healthy(NodeId("n4"), API) == {"a2-api"}, "the catalog has it no more")
        assert one.withdrawn == []
        one.mesh.acknowledged(N2, one.updates[-1][1].version)
        assert one.withdrawn == []
        one.mesh.disconnected(NodeId("n4"))
        await until(lambda: one.withdrawn == ["a1"], "all callers know")


async def test_intentions_follow_jobs_and_hands(record: Record) -> None:
    line = OwnedIntention(source=WEB, destination=API, job=JobName("shop"))
    async with running(record, lambda mesh: mesh.set_interests(N2, Interests(placed=frozenset({API})))) as one:
        one.connect(N2)
        one.mesh.set_intentions((line,))
        await until(lambda: owned_by_shop(one), "the job's line is an intention")
        assert (await one.mesh.check(WEB, API))[0]
        allowed, decided_by = await one.mesh.check(DB, API)
        assert not allowed
        assert isinstance(decided_by, object)

        with pytest.raises(RefusedError, match="belongs to job shop"):
            await one.mesh.delete_intention("web", "api")
        made = await one.mesh.create_intention("web", "api", Action.DENY, "an incident")
        assert (made.action, made.owner, made.precedence) == (Action.DENY, "", 9)
        one.mesh.set_intentions((line, OwnedIntention(source=WEB, destination=DB, job=JobName("shop"))))
        await until(lambda: allows(one, WEB, DB), "the other line is there")
        assert await one.mesh.check(WEB, API) == (False, made), "by hand wins"
        await until(lambda: told(one, "web", Action.DENY), "the node's sidecars are told")

        assert await one.mesh.delete_intention("web", "api")
        await until(lambda: allows(one, WEB, API), "the job's line is back")
        one.mesh.set_intentions(())
        await until(lambda: denies(one, WEB, API), "it went with its job")
        assert not await one.mesh.delete_intention("web", "api")
        with pytest.raises(InputError, match="is not the name of a service"):
            await one.mesh.create_intention("Web Shop", "api", Action.ALLOW)


async def allows(one: Running, source: ServiceName, destination: ServiceName) -> bool:
    return (await one.mesh.check(source, destination))[0]


async def denies(one: Running, source: ServiceName, destination: ServiceName) -> bool:
    return not await allows(one, source, destination)


def told(one: Running, source: str, action: Action) -> bool:
    newest = [rules for _, update in one.updates for rules in update.intentions if rules.service == API][-1]
    return any(found.source == source and found.action is action for found in newest.intentions)


async def test_leaves_name_their_service_and_come_from_the_roots(record: Record) -> None:
    async with running(record) as one:
        await until(lambda: one.mesh.roots().trust_domain != "", "the roots are known")
        roots = one.mesh.roots()
        key = ec.generate_private_key(ec.SECP256R1())
        wanted = spiffe_id(roots.trust_domain, "dc1", API)
        leaf = await one.mesh.issue(API, request_for(key, wanted))

    certificate = x509.load_pem_x509_certificate(leaf.certificate_pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [wanted]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(roots.certificates_pem[0].encode()))
    assert leaf.expires_at_s == certificate.not_valid_after_utc.timestamp()
    held = serialization.load_pem_private_key(leaf.key_pem.encode(), None) if leaf.key_pem else key
    assert held.public_key() == certificate.public_key()
    assert (leaf.key_pem == "") == isinstance(record, EmbeddedRecord)


def request_for(key: ec.EllipticCurvePrivateKey, uri: str) -> str:
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.host
async def test_a_consul_that_allows_by_default_is_not_taken_charge_of(tmp_path: Path) -> None:
    record = RealRecord(tmp_path)
    await record.start()
    try:
        consul = ConsulAdapter(record.url)
        mesh = Mesh(
            consul=consul, issuer=ConsulIssuer(consul), cluster=CLUSTER, adopt_intentions=False, log=Log("mesh")
        )
        mesh.set_node(node("n1", instance("a1")))
        with pytest.raises(RefusedError, match="--adopt-intentions"):
            await asyncio.wait_for(mesh.run(), 10)
        assert (await consul.node("test-n1"))[0] is None, "nothing was written"
        assert await mesh.intentions() == ()
        await consul.close()

        async with running(record, adopt=True) as one:
            await until(lambda: one.mesh.leading, "it leads")
            (adopted,) = await one.mesh.intentions()
            assert (adopted.source, adopted.destination, adopted.action) == ("*", "*", Action.DENY)
            assert await one.mesh.check(WEB, API) == (False, adopted)
    finally:
        await record.stop()


async def test_a_second_controller_waits_for_the_first(record: Record) -> None:
    async with running(record) as first:
        await until(lambda: first.mesh.leading, "the first leads")
        async with running(record) as second:
            second.mesh.set_node(node("n1", instance("a1")))
            await until(lambda: second.mesh.reachable, "the second sees Consul")
            assert not second.mesh.leading
            assert await first.registered("test-n1") == set()
            first.mesh.set_node(node("n9", instance("a9")))
            await until(lambda: registered(first, "test-n9", 2), "the first still writes")


_LEADS_AND_HANGS = """
import asyncio, sys
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.leader import Leadership
from outrider.log import Log

async def main():
    assert await Leadership(ConsulAdapter(sys.argv[1]), "test", Log("mesh")).take()
    print("leads", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_killed_controller_is_followed_at_once(record: Record) -> None:
    command = [sys.executable, "-c", _LEADS_AND_HANGS, record.url]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": "."})
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 10) == b"leads\n"
        async with running(record) as one:
            await until(lambda: one.mesh.reachable, "it sees Consul")
            assert not one.mesh.leading
            process.kill()
            await process.wait()
            await until(lambda: one.mesh.leading, "it leads, without waiting for the dead one's session", timeout_s=5)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_more_services_than_may_be_watched_are_polled(tmp_path: Path) -> None:
    names = [ServiceName(f"s{number:03}") for number in range(WATCHES_MAX + 5)]
    record = EmbeddedRecord(tmp_path)
    await record.start()
    try:
        async with running(record) as one:
            one.mesh.set_services({name: (number, Protocol.TCP) for number, name in enumerate(names)})
            one.mesh.set_interests(N2, Interests(called=frozenset(names), placed=frozenset()))
            one.connect(N2)
            one.mesh.set_node(node("n1", *(instance("a1", name) for name in names)))
            await until(lambda: all(one.healthy(N2, name) for name in names), "all are known")
            assert record.catalog.waiting <= WATCHES_MAX + 2 + len(TRAFFIC_KINDS)
    finally:
        await record.stop()


async def test_one_registration_that_consul_refuses_holds_up_no_other(record: Record) -> None:
    async with running(record) as one:
        one.mesh.set_node(node("n1", instance("a1")))
        one.mesh.set_node(msgspec.structs.replace(node("n3", instance("a3")), address=""))
        await until(lambda: registered(one, "test-n1", 2), "the good one is there")
        one.mesh.set_node(node("n4", instance("a4")))
        await until(lambda: registered(one, "test-n4", 2), "later ones too")
        one.mesh.set_node(node("n3", instance("a3")))
        await until(lambda: registered(one, "test-n3", 2), "and it, once it makes sense")


async def test_many_registrations_go_in_several_transactions(record: Record) -> None:
    async with running(record, calls_api) as one:
        one.connect(N2)
        for number in range(5):
            services = [instance(f"a{number}x{index}", port=2000 + index) for index in range(30)]
            one.mesh.set_node(node(f"n{10 + number}", *services))
        await until(lambda: len(one.healthy(N2, API)) == 150, "all are healthy")


async def test_the_dialect_of_later_consuls(tmp_path: Path) -> None:
    record = EmbeddedRecord(tmp_path)
    await record.start()
    consul = ConsulAdapter(record.url)
    try:
        await consul.probe()
        consul.dialect = Dialect.EXACT
        lock = Leadership(consul, CLUSTER, Log("mesh"))
        assert await lock.take()
        mesh = Mesh(
            consul=consul,
            issuer=record.issuer(consul),
            cluster=CLUSTER,
            adopt_intentions=False,
            log=Log("mesh"),
            lock=lock,
        )
        made = await mesh.create_intention("web", "api", Action.ALLOW, "by hand")
        assert await mesh.check(WEB, API) == (True, made)
        changed = await mesh.create_intention("web", "api", Action.DENY, "by hand")
        assert await mesh.check(WEB, API) == (False, changed)
        assert await mesh.delete_intention("web", "api")
        assert await mesh.intentions() == ()
    finally:
        await consul.close()
        await record.stop()
