"""A real controller's doors: users, roles, namespaces, tokens, the audit log, and who is kept out."""

import asyncio
import contextlib
import datetime as dt
import json
import sys
import tarfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.leaves import signing_request
from outrider import codec
from outrider.ids import Namespace, NodeId
from outrider.model.job import Job
from outrider.pinned import pinned_ca
from outrider.tls import CONTROLLER_NAME, TlsFiles, channel
from outrider.tokens import parse_token
from outrider.v1 import (
    access_pb2,
    access_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    job_pb2,
    operator_pb2,
    operator_pb2_grpc,
    stores_pb2,
    stores_pb2_grpc,
)
from tests.integration.controllers import CALL_S, Agent, Controller, healthy, submit, web_job
from tests.integration.processes import until

N1 = NodeId("n1")


class People:
    """Both services for people, over one channel."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self.operator = operator_pb2_grpc.OperatorServiceStub(connection)
        self.access = access_pb2_grpc.AccessServiceStub(connection)


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    controller = Controller(tmp_path, rate_limit={"per_s": 50, "burst": 60})
    try:
        await controller.start()
        yield controller
    finally:
        await controller.kill()


@pytest.fixture
async def root(controller: Controller) -> AsyncIterator[People]:
    async with grpc.aio.insecure_channel(f"unix:{controller.socket}") as connection:
        yield People(connection)


@contextlib.asynccontextmanager
async def with_token(controller: Controller, token: str) -> AsyncIterator[People]:
    address = controller.at["join_listen"]
    authority = await asyncio.to_thread(pinned_ca, address, parse_token(token).ca_sha256)
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority.encode()), grpc.access_token_call_credentials(token)
    )
    options = (("grpc.ssl_target_name_override", CONTROLLER_NAME),)
    async with grpc.aio.secure_channel(address, credentials, options=options) as connection:
        yield People(connection)


async def user(root: People, name: str, *allow: str) -> str:
    """A user with a role of their own, and a token. `allow` is NAMESPACE:CAPABILITY."""
    grants = [
        access_pb2.Grant(
            namespaces=[namespace], capabilities=[access_pb2.Capability.Value(f"CAPABILITY_{capability.upper()}")]
        )
        for namespace, capability in (text.split(":") for text in allow)
    ]
    await root.access.SetRole(access_pb2.SetRoleRequest(role=access_pb2.Role(name=name, grants=grants)))
    await root.access.SetUser(access_pb2.SetUserRequest(user=access_pb2.User(name=name, roles=[name])))
    request = access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_USER, user=name, valid_s=600)
    return str((await root.access.CreateToken(request)).secret)


async def namespace(root: People, name: str) -> None:
    await root.access.SetNamespace(
        access_pb2.SetNamespaceRequest(namespace=access_pb2.NamespaceSpec(name=name, quota=access_pb2.Quota()))
    )


async def code(call: Awaitable[object]) -> str:
    """Outrider's own code of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return str(dict(caught.value.trailing_metadata() or ()).get("outrider-code", str(caught.value)))


def a_job(name: str, space: str) -> Job:
    plain = web_job()
    group = msgspec.structs.replace(plain.groups[0], services=())
    return msgspec.structs.replace(plain, name=name, namespace=Namespace(space), groups=(group,))


def submission(job: Job) -> operator_pb2.SubmitJobRequest:
    return operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))


async def test_a_user_may_what_a_role_says_and_nothing_else(controller: Controller, root: People) -> None:
    for name in ("team-a", "team-b"):
        await namespace(root, name)
    token = await user(root, "alice", "team-a:submit")
    for job in (a_job("mine", "team-a"), a_job("theirs", "team-b")):
        await submit(root.operator, job)
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session(), with_token(controller, token) as alice:
        whoami = await alice.access.WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)
        assert (whoami.caller, whoami.by.split()[0], list(whoami.roles)) == ("alice", "token", ["alice"])
        assert (await alice.operator.SubmitJob(submission(a_job("more", "team-a")))).changed
        listed = (await alice.operator.ListJobs(operator_pb2.ListJobsRequest())).jobs
        assert [job.name for job in listed] == ["mine", "more"]
        listed = (await alice.operator.ListAllocations(operator_pb2.ListAllocationsRequest())).allocations
        assert {each.job for each in listed} <= {"mine", "more"}
        placed = (await alice.operator.GetNode(operator_pb2.GetNodeRequest(node=N1))).allocations
        assert "theirs" not in {each.job for each in placed}
        events = [each async for each in alice.operator.WatchEvents(operator_pb2.WatchEventsRequest())]
        assert "theirs" not in {each.job for each in events}
        everything = await root.operator.ListAllocations(operator_pb2.ListAllocationsRequest())
        (other,) = (each.id for each in everything.allocations if each.job == "theirs")
        logs = alice.operator.Logs(fleet_pb2.LogsRequest(alloc=other))
        run = alice.operator.Exec()
        await run.write(operator_pb2.ExecFrame(start=fleet_pb2.ExecRequest(alloc=other, command=["true"])))
        for call in (
            alice.operator.SubmitJob(submission(a_job("x", "team-b"))),
            alice.operator.SubmitJob(submission(a_job("theirs", "team-b"))),
            alice.operator.StopJob(operator_pb2.StopJobRequest(job="theirs")),
            alice.operator.StopJob(operator_pb2.StopJobRequest(job="no-such-job")),
            alice.operator.GetJob(operator_pb2.GetJobRequest(job="theirs")),
            alice.operator.GetAllocation(operator_pb2.GetAllocationRequest(alloc=other)),
            logs.read(),
            run.read(),
            alice.operator.CreateIntention(
                operator_pb2.CreateIntentionRequest(intention={"source": "*", "destination": "web", "action": 1})
            ),
            alice.access.SetUser(access_pb2.SetUserRequest(user=access_pb2.User(name="alice", roles=["admin"]))),
            alice.access.SetRole(access_pb2.SetRoleRequest(role=access_pb2.Role(name="alice"))),
            alice.access.CreateToken(
                access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_JOIN, uses=1, valid_s=60)
            ),
            alice.access.RevokeNode(access_pb2.RevokeNodeRequest(node=N1)),
            alice.access.ReadAudit(access_pb2.ReadAuditRequest()).read(),
        ):
            assert await code(call) == "denied"


async def test_refusals_tell_a_stranger_nothing_of_what_is_there(controller: Controller, root: People) -> None:
    await namespace(root, "team-a")
    await submit(root.operator, a_job("secret-project", "default"))
    async with with_token(controller, await user(root, "eve", "team-a:read")) as eve:
        texts = set()
        for name in ("secret-project", "nothing-at-all"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await eve.operator.GetJob(operator_pb2.GetJobRequest(job=name))
            texts.add(str(caught.value.details()).replace(name, "NAME"))
        assert len(texts) == 1


async def test_no_token_a_wrong_one_and_an_ended_one_are_nobody(controller: Controller, root: People) -> None:
    token = await user(root, "alice", "default:read")
    wrong = token[:-4] + ("aaaa" if token[-4:] != "aaaa" else "bbbb")
    authority = controller.ca.read_bytes()
    options = (("grpc.ssl_target_name_override", CONTROLLER_NAME),)
    plain = grpc.ssl_channel_credentials(authority)
    async with grpc.aio.secure_channel(controller.at["join_listen"], plain, options=options) as connection:
        assert await code(People(connection).operator.ListJobs(operator_pb2.ListJobsRequest())) == "unauthenticated"
    for shown in (wrong, controller.token):  # a join token lets no user in
        async with with_token(controller, shown) as nobody:
            assert await code(nobody.access.WhoAmI(access_pb2.WhoAmIRequest())) == "unauthenticated"
    async with with_token(controller, token) as alice:
        whoami = await alice.access.WhoAmI(access_pb2.WhoAmIRequest())
        await root.access.RevokeToken(access_pb2.RevokeTokenRequest(id=whoami.by.split()[1]))
        assert await code(alice.access.WhoAmI(access_pb2.WhoAmIRequest())) == "unauthenticated"


async def test_a_users_certificate_is_as_good_as_a_token_until_the_user_goes(
    controller: Controller, root: People, tmp_path: Path
) -> None:
    await user(root, "bob", "default:read")
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM).decode()
    issued = await root.access.IssueCertificate(access_pb2.IssueCertificateRequest(user="bob", csr_pem=pem))
    files = TlsFiles(ca=tmp_path / "u.ca", certificate=tmp_path / "u.crt", key=tmp_path / "u.key")
    files.ca.write_text(issued.ca_pem)
    files.certificate.write_text(issued.certificate_pem)
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    async with channel(controller.at["listen"], files) as connection:
        bob = People(connection)
        whoami = await bob.access.WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)
        assert (whoami.caller, whoami.by) == ("bob", "certificate")
        assert await code(bob.operator.SubmitJob(submission(a_job("x", "default")))) == "denied"
        await root.access.DeleteUser(access_pb2.DeleteUserRequest(name="bob"))
        assert await code(bob.access.WhoAmI(access_pb2.WhoAmIRequest())) == "unauthenticated"


async def test_a_node_is_no_user_and_a_user_no_node(controller: Controller) -> None:
    async with channel(controller.at["listen"], await controller.join(N1)) as connection:
        people = People(connection)
        for call in (
            people.operator.ListJobs(operator_pb2.ListJobsRequest()),
            people.access.CreateToken(
                access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_JOIN, uses=1, valid_s=60)
            ),
        ):
            assert await code(call) == "denied"


async def test_every_change_is_in_the_audit_log_with_what_it_changed(controller: Controller, root: People) -> None:
    token = await user(root, "alice", "default:submit")
    async with with_token(controller, token) as alice:
        for count in (1, 3):
            job = a_job("shop", "default")
            group = msgspec.structs.replace(job.groups[0], count=count)
            await alice.operator.SubmitJob(submission(msgspec.structs.replace(job, groups=(group,))))
        assert await code(alice.access.DeleteUser(access_pb2.DeleteUserRequest(name="alice"))) == "denied"
        await alice.operator.ListJobs(operator_pb2.ListJobsRequest())
    entries = [entry async for entry in root.access.ReadAudit(access_pb2.ReadAuditRequest())]
    told = [(entry.caller, entry.call, entry.subject, entry.outcome) for entry in entries]
    assert told[-3:] == [
        ("alice", "SubmitJob", "shop", "done"),
        ("alice", "SubmitJob", "shop", "done"),
        ("alice", "DeleteUser", "alice", "denied"),
    ]
    assert list(entries[-2].changes) == ["version 2", "~ groups.web.count: 1 -> 3"]
    assert ("root", "CreateToken") in {(entry.caller, entry.call) for entry in entries}
    assert entries[-1].by.startswith("token ")
    assert entries[-1].peer.startswith("ipv4:127.0.0.1")
    written = [json.loads(line) for line in (controller.data / "audit.jsonl").read_text().splitlines()]
    assert len(written) == len(entries)
    for path in (controller.data / "audit.jsonl", controller.log):
        assert token.rpartition(".")[2] not in path.read_text()


async def test_a_caller_who_asks_too_often_is_told_to_wait_and_nobody_else_is(
    controller: Controller, root: People
) -> None:
    token = await user(root, "alice", "default:read")
    async with with_token(controller, token) as alice:
        calls = [alice.operator.ListJobs(operator_pb2.ListJobsRequest()) for _ in range(150)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert refused
        assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert await root.operator.ListJobs(operator_pb2.ListJobsRequest()) is not None


async def test_a_revoked_node_is_out_at_once_and_back_by_a_token_that_names_it(
    controller: Controller, root: People
) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    with contextlib.suppress(ExceptionGroup):
        async with agent.session():
            assert (await root.access.RevokeNode(access_pb2.RevokeNodeRequest(node=N1))).changed
            await until(lambda: agent.ended is not None, "the session ends")
    assert agent.ended is not None
    assert "revoked" in str(agent.ended.details())
    with pytest.raises((AssertionError, grpc.aio.AioRpcError, ExceptionGroup)):
        async with agent.session():
            pass
    with pytest.raises(grpc.aio.AioRpcError, match="joined before with another key"):
        await controller.join(N1)
    request = access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_JOIN, uses=1, valid_s=60, nodes=[N1])
    again = Agent(controller, N1, await controller.join(N1, (await root.access.CreateToken(request)).secret))
    async with again.session():
        nodes = (await root.operator.ListNodes(operator_pb2.ListNodesRequest())).nodes
        assert len(nodes) == 1


async def test_rights_survive_a_restart(controller: Controller, root: People) -> None:
    token = await user(root, "alice", "default:read")
    await controller.kill()
    await controller.start()
    async with with_token(controller, token) as alice:
        assert (await alice.access.WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)).caller == "alice"


async def test_a_node_renews_its_certificate_for_its_own_key_and_no_other(controller: Controller) -> None:
    files = await controller.join(N1)
    known = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    assert isinstance(known, ec.EllipticCurvePrivateKey)
    async with channel(controller.at["listen"], files) as connection:
        stub = fleet_pb2_grpc.FleetServiceStub(connection)
        csr = signing_request(known, "outrider://elsewhere/operator/root")
        answer = await stub.RenewCertificate(fleet_pb2.RenewCertificateRequest(csr_pem=csr), timeout=CALL_S)
        certificate = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["outrider://edge-test/node/n1"]
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < dt.timedelta(days=8)
        other = signing_request(ec.generate_private_key(ec.SECP256R1()), "outrider://edge-test/node/n1")
        assert await code(stub.RenewCertificate(fleet_pb2.RenewCertificateRequest(csr_pem=other))) == "denied"


async def test_log_levels_change_while_it_runs(controller: Controller, root: People) -> None:
    quiet = operator_pb2.SetLogLevelRequest(level="error")
    await root.operator.SetLogLevel(quiet)
    assert await code(root.operator.SetLogLevel(operator_pb2.SetLogLevelRequest(level="loud"))) == "bad-input"
    refused = len(controller.events("call refused"))
    assert await code(root.operator.GetJob(operator_pb2.GetJobRequest(job="none"))) == "not-found"
    assert len(controller.events("call refused")) == refused
    await root.operator.SetLogLevel(operator_pb2.SetLogLevelRequest(level="info"))
    assert await code(root.operator.GetJob(operator_pb2.GetJobRequest(job="none"))) == "not-found"
    assert len(controller.events("call refused")) == refused + 1
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session():
        await root.operator.SetLogLevel(operator_pb2.SetLogLevelRequest(level="debug", node=N1))
        await until(lambda: agent.log_levels == ["debug"], "the agent is told")
    assert (
        await code(root.operator.SetLogLevel(operator_pb2.SetLogLevelRequest(level="debug", node="n7")))
        == "unavailable"
    )


async def debug_archive(controller: Controller) -> dict[str, str]:
    """What `outrider operator debug` packs."""
    file = controller.directory / "debug.tar.gz"
    words = ("-m", "outrider", "--address", f"unix:{controller.socket}", "operator", "debug", str(file))
    process = await asyncio.create_subprocess_exec(sys.executable, *words)
    assert await process.wait() == 0
    with tarfile.open(file) as tar:
        return {
            name: opened.read().decode() for name in tar.getnames() if (opened := tar.extractfile(name)) is not None
        }


async def test_planted_secrets_are_nowhere_but_where_they_belong(controller: Controller, root: People) -> None:
    """Canaries: a user's token, a join token, a secret, a variable of a job's environment, a workload's last words."""
    canary = "canary-7f3a9c51e2"
    token = await user(root, "alice", "default:submit")
    async with grpc.aio.insecure_channel(f"unix:{controller.socket}") as connection:
        stores = stores_pb2_grpc.StoreServiceStub(connection)
        await stores.PutSecret(stores_pb2.PutSecretRequest(name="password", value=canary.encode()), timeout=CALL_S)
    job = a_job("shop", "default")
    task = msgspec.structs.replace(job.groups[0].tasks[0], env={"PASSWORD": "plain"})
    async with with_token(controller, token) as alice:
        for value in ("first", canary):
            task = msgspec.structs.replace(task, env={"PASSWORD": value})
            group = msgspec.structs.replace(job.groups[0], tasks=(task,))
            await alice.operator.SubmitJob(submission(msgspec.structs.replace(job, groups=(group,))))
    agent = Agent(controller, N1, await controller.join(N1))
    agent.tells = lambda told: msgspec.structs.replace(healthy(told), log_tail=f"I was told {canary}")
    async with agent.session():
        await until(lambda: bool(agent.reports), "the agent told what the workload printed last")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.join(NodeId("n5"), controller.token[:-6] + "aaaaaa")
    events = [event async for event in root.operator.WatchEvents(operator_pb2.WatchEventsRequest())]
    audit = [entry async for entry in root.access.ReadAudit(access_pb2.ReadAuditRequest())]
    tokens = await root.access.ListTokens(access_pb2.ListTokensRequest())
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{controller.at['metrics_listen']}/metrics") as answer,
    ):
        metrics = await answer.text()
    places = {
        "log": controller.log.read_text(),
        "audit file": (controller.data / "audit.jsonl").read_text(),
        "error": str(caught.value.details()),
        "events": str(events),
        "audit": str(audit),
        "tokens": str(tokens),
        "metrics": metrics,
        **{f"debug: {name}": text for name, text in (await debug_archive(controller)).items()},
    }
    assert "debug: outrider-debug/allocations.json" in places
    journal = b"".join(path.read_bytes() for path in controller.data.glob("journal.db*"))
    for secret in (token.rpartition(".")[2], controller.token.rpartition(".")[2], canary):
        assert not {name for name, text in places.items() if secret in text}
        if secret != canary:  # a job's environment is part of the job
            assert secret.encode() not in journal
