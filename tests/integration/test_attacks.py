"""What somebody with bad intentions tries at a real controller's doors: each is refused, told in the log and counted.

What the TLS library and gRPC refuse before there is a call (no certificate, an old protocol, an oversized message) is
no call: there is nothing to count, and the log has the handshake alone.
"""

import asyncio
import io
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote

import aiohttp
import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec

from agent.leaves import signing_request
from controller.ca import FleetCa
from outrider import codec
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.mesh import spiffe_id
from outrider.tls import TlsFiles, channel, ssl_context
from outrider.v1 import access_pb2, access_pb2_grpc, fleet_pb2, fleet_pb2_grpc, job_pb2, operator_pb2, stores_pb2
from outrider.v1.operator_pb2_grpc import OperatorServiceStub
from outrider.v1.stores_pb2_grpc import StoreServiceStub
from tests.integration.controllers import CALL_S, CLUSTER, Agent, Controller, submit, web_job
from tests.integration.processes import free_port, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
N1, N2 = NodeId("n1"), NodeId("n2")
# What would leave a directory, a key's prefix or a line of a log, were it taken as it is.
HOSTILE = ("../../etc/cron.d/x", "..", "/etc/passwd", "a/b", "a\x00b", "a\nb", "n1%2f..", "$(id)", "x" * 300)


class Doors:
    """One controller with two nodes that joined; the job `shop` is on the first."""

    def __init__(self, controller: Controller, files: dict[NodeId, TlsFiles]) -> None:
        self.controller, self.files = controller, files

    async def counted(self, code: str) -> float:
        """Refused calls of that code so far."""
        listen = self.controller.at["metrics_listen"]
        async with aiohttp.ClientSession() as session, session.get(f"http://{listen}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        found = [line for line in lines if line.startswith(f'outrider_controller_refused_calls_total{{code="{code}"')]
        return float(found[0].split()[1]) if found else 0.0

    def told(self, code: str) -> int:
        return sum(line.get("code") == code for line in self.controller.events("call refused"))

    async def refuses(self, call: Callable[[], Awaitable[object]], code: str) -> str:
        """What the caller is told."""
        before, lines = await self.counted(code), self.told(code)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert dict(caught.value.trailing_metadata() or ()).get("outrider-code") == code, caught.value
        assert await self.counted(code) == before + 1, "it is counted"
        await until(lambda: self.told(code) == lines + 1, "it is in the log")
        return str(caught.value.details())


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    catalog = {"listen": f"127.0.0.1:{free_port()}"}
    controller = Controller(tmp_path_factory.mktemp("attacks"), catalog=catalog)
    try:
        await controller.start()
        files = {node: await controller.join(node) for node in (N1, N2)}
        agent = Agent(controller, N1, files[N1])
        async with agent.session(), controller.operator() as operator:
            await submit(operator, web_job())
            await until(lambda: bool(agent.reports), "the job is on n1")
            yield Doors(controller, files)
    finally:
        await controller.kill()


async def the_allocation(doors: Doors) -> AllocId:
    async with doors.controller.operator() as operator:
        found = await operator.ListAllocations(operator_pb2.ListAllocationsRequest(), timeout=CALL_S)
    return AllocId(found.allocations[0].id)


async def test_another_nodes_secrets_and_identities_are_not_told(doors: Doors) -> None:
    alloc = await the_allocation(doors)
    csr = signing_request(ec.generate_private_key(ec.SECP256R1()), "spiffe://x/ns/default/dc/dc1/svc/web")
    async with channel(doors.controller.at["listen"], doors.files[N2]) as connection:
        stub = fleet_pb2_grpc.FleetServiceStub(connection)
        for call in (
            partial(stub.GetSecrets, fleet_pb2.GetSecretsRequest(alloc=alloc)),
            partial(stub.GetSecrets, fleet_pb2.GetSecretsRequest(alloc="")),
            partial(stub.IssueLeaf, fleet_pb2.IssueLeafRequest(service="web", csr_pem=csr)),
            partial(stub.IssueLeaf, fleet_pb2.IssueLeafRequest(service="*", csr_pem=csr)),
        ):
            await doors.refuses(partial(call, timeout=CALL_S), "denied")


async def test_a_forged_identity_is_not_signed(doors: Doors) -> None:
    """On the node's own service's name. (What a forged leaf meets at a sidecar: test_sidecar_tcp.)"""
    async with doors.controller.operator() as operator:
        fleet = await operator.GetFleet(operator_pb2.GetFleetRequest(), timeout=CALL_S)
    for forged in (
        spiffe_id(fleet.trust_domain, "dc1", ServiceName("payments")),
        "spiffe://another.consul/ns/default/dc/dc1/svc/web",
        f"outrider://{CLUSTER}/controller",
    ):
        csr = signing_request(ec.generate_private_key(ec.SECP256R1()), forged)
        wanted = fleet_pb2.IssueLeafRequest(service="web", csr_pem=csr)
        async with channel(doors.controller.at["listen"], doors.files[N1]) as connection:
            stub = fleet_pb2_grpc.FleetServiceStub(connection)
            told = await doors.refuses(partial(stub.IssueLeaf, wanted, timeout=CALL_S), "bad-input")
            assert forged in told


async def test_a_join_token_is_not_taken_twice_and_none_is_guessed(doors: Doors) -> None:
    async with grpc.aio.insecure_channel(f"unix:{doors.controller.socket}") as connection:
        wanted = access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_JOIN, uses=1, valid_s=60)
        token = (await access_pb2_grpc.AccessServiceStub(connection).CreateToken(wanted, timeout=CALL_S)).secret
    await doors.controller.join(NodeId("n3"), token)
    for shown in (token, token[:-6] + "aaaaaa", "", "outrider-join." + "0" * 64 + ".guess"):
        await doors.refuses(partial(doors.controller.join, NodeId("n4"), shown), "bad-token")


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_name_leads_out_of_where_it_belongs(doors: Doors, name: str) -> None:
    address = f"unix:{doors.controller.socket}"
    job = codec.to_wire(web_job(), job_pb2.Job)
    job.name = name
    task = codec.to_wire(web_job(), job_pb2.Job)
    task.groups[0].tasks[0].name = name
    file = codec.to_wire(web_job(), job_pb2.Job)
    file.groups[0].tasks[0].files.add(path="../" + name, content=b"x")
    async with grpc.aio.insecure_channel(address) as connection:
        operator, stores = OperatorServiceStub(connection), StoreServiceStub(connection)
        access = access_pb2_grpc.AccessServiceStub(connection)
        await doors.refuses(partial(doors.controller.join, NodeId(name)), "bad-input")
        for wrong in (job, task, file):
            await doors.refuses(partial(operator.SubmitJob, operator_pb2.SubmitJobRequest(job=wrong)), "bad-input")
        for call in (
            partial(stores.PutSecret, stores_pb2.PutSecretRequest(name=name, value=b"x")),
            partial(access.SetUser, access_pb2.SetUserRequest(user=access_pb2.User(name=name))),
            partial(access.SetRole, access_pb2.SetRoleRequest(role=access_pb2.Role(name=name))),
            partial(access.SetNamespace, access_pb2.SetNamespaceRequest(namespace=access_pb2.NamespaceSpec(name=name))),
        ):
            await doors.refuses(partial(call, timeout=CALL_S), "bad-input")


async def test_calls_without_a_certificate_or_a_token_get_nowhere(doors: Doors) -> None:
    controller = doors.controller
    anonymous = grpc.ssl_channel_credentials(controller.ca.read_bytes())
    options = (("grpc.ssl_target_name_override", "controller.outrider"),)
    async with grpc.aio.secure_channel(controller.at["join_listen"], anonymous, options=options) as connection:
        listing = partial(OperatorServiceStub(connection).ListJobs, operator_pb2.ListJobsRequest(), timeout=CALL_S)
        await doors.refuses(listing, "unauthenticated")
    for credentials in (anonymous, None):
        at = controller.at["listen"]
        if credentials is None:
            connection = grpc.aio.insecure_channel(at)
        else:
            connection = grpc.aio.secure_channel(at, credentials, options=options)
        async with connection:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await OperatorServiceStub(connection).ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_fleet_of_the_same_name_opens_no_door(doors: Doors, tmp_path: Path) -> None:
    stranger = FleetCa(tmp_path / "ca", CLUSTER).issue_operator("cli")
    files = TlsFiles(ca=doors.controller.ca, certificate=stranger.certificate, key=stranger.key)
    async with channel(doors.controller.at["listen"], files) as connection:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await OperatorServiceStub(connection).ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_catalog_answers_only_whom_it_knows(doors: Doors) -> None:
    configured = doors.controller.configuration["catalog"]
    assert isinstance(configured, dict)
    base = f"https://{configured['listen']}"
    stranger = ssl.create_default_context(cafile=str(doors.controller.ca))
    stranger.check_hostname = False
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=stranger)) as session:
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await session.get(f"{base}/v1/catalog/nodes")
    node = ssl_context(doors.files[N1], server=False)
    node.check_hostname = False
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=node)) as session:
        for method, path in (
            ("GET", "/v1/catalog/nodes"),
            ("GET", "/v1/kv/?recurse"),
            ("PUT", "/v1/kv/x"),
            ("GET", "/v1/agent/connect/ca/leaf/web"),
            ("GET", f"/v1/kv/{quote('../../etc/passwd', safe='')}"),
        ):
            async with session.request(method, base + path) as answer:
                assert answer.status == 403, path
    operator = ssl_context(doors.controller.operator_files, server=False)
    operator.check_hostname = False
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=operator)) as session,
        session.post(f"{base}/v1/connect/intentions", data=io.BytesIO(bytes(2 * 1024 * 1024))) as answer,
    ):
        assert answer.status == 413
    await until(lambda: refused_by_catalog(doors), "they are counted")


async def refused_by_catalog(doors: Doors) -> bool:
    listen = doors.controller.at["metrics_listen"]
    async with aiohttp.ClientSession() as session, session.get(f"http://{listen}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = [line for line in lines if line.startswith("outrider_controller_catalog_requests_total")]
    return {status for line in found for status in ("403", "413") if f'status="{status}"' in line} == {"403", "413"}


async def test_an_oversized_message_and_oversized_metadata_are_not_taken(doors: Doors) -> None:
    async with doors.controller.operator() as operator:
        huge = codec.to_wire(web_job(), job_pb2.Job)
        huge.groups[0].tasks[0].files.add(path="x", content=bytes(17 * 1024 * 1024))
        for call in (
            operator.SubmitJob(operator_pb2.SubmitJobRequest(job=huge), timeout=CALL_S),
            operator.ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S, metadata=(("x", "y" * 40_000),)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await operator.ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S)).jobs, "others are served on"


@pytest.mark.parametrize("door", ["listen", "join_listen", "catalog"])
async def test_an_old_protocol_is_no_way_in(doors: Doors, door: str) -> None:
    at = doors.controller.at.get(door) or doors.controller.configuration["catalog"]["listen"]  # type: ignore[index]
    host, port = str(at).split(":")

    def shake(version: ssl.TLSVersion) -> str | None:
        context = ssl_context(doors.files[N1], server=False)
        context.check_hostname = False
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with socket.create_connection((host, int(port)), timeout=CALL_S) as plain, context.wrap_socket(plain) as secure:
            return secure.version()

    for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.warns(DeprecationWarning, match="TLSVersion"), pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(shake, old)
    assert await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
