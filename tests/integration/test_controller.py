"""A real controller on loopback: joining, sessions, operators, restarts, and what it refuses."""

import asyncio
import json
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import aiomqtt
import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.leaves import signing_request
from outrider import codec
from outrider.broker import mosquitto_acl, mosquitto_conf, node_status_topic
from outrider.ids import NodeId, ServiceName
from outrider.model.mesh import spiffe_id
from outrider.tls import TlsFiles, channel, joining_channel, ssl_context
from outrider.v1 import fleet_pb2, fleet_pb2_grpc, job_pb2, mesh_pb2, operator_pb2, operator_pb2_grpc
from tests.integration.controllers import CALL_S, CLUSTER, Agent, Controller, controller, submit, web_job
from tests.integration.processes import free_port, program, until

__all__ = ["controller"]
N1, N2 = NodeId("n1"), NodeId("n2")
JOB = operator_pb2.GetJobRequest(job="shop")


async def _healthy(controller: Controller) -> operator_pb2.JobStatus:
    """Watches the job until its rollout succeeded."""
    async with controller.operator() as operator:
        async for status in operator.WatchJob(JOB, timeout=CALL_S):
            if status.rollout == operator_pb2.ROLLOUT_STATE_SUCCESSFUL:
                return status
    raise AssertionError("the watch ended")


async def _code(call: "grpc.aio.Call | AsyncIterator[object]") -> tuple[grpc.StatusCode, str]:
    """How a call that must fail fails: the status, and Outrider's own code."""
    try:
        if hasattr(call, "__await__"):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code(), str(dict(error.trailing_metadata() or ()).get("outrider-code", ""))
    raise AssertionError("the call was answered")


async def _metrics(controller: Controller, path: str = "/metrics") -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{controller.at['metrics_listen']}{path}", timeout=aiohttp.ClientTimeout(CALL_S)) as answer,
    ):
        assert answer.status == 200
        return await answer.text()


async def test_a_node_joins_with_the_token_alone(controller: Controller) -> None:
    files = await controller.join(N1)
    assert "BEGIN CERTIFICATE" in files.certificate.read_text()
    for token in ("", "wrong", controller.token[:-1]):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.join(N2, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert len(controller.events("wrong join token")) == 3
    with pytest.raises(grpc.aio.AioRpcError, match="joined before with another key"):
        await controller.join(N1)
    with pytest.raises(grpc.aio.AioRpcError, match="cannot name a node"):
        await controller.join(NodeId("@controller"))
    assert 'outrider_controller_refused_calls_total{code="bad-token"} 3.0' in await _metrics(controller)


async def test_an_address_that_tries_tokens_is_stopped(controller: Controller) -> None:
    codes = []
    for _ in range(11):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.join(N1, "wrong")
        codes.append(caught.value.code())
    assert codes[9] is grpc.StatusCode.UNAUTHENTICATED
    assert codes[10] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_job_becomes_healthy_and_everybody_is_told(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session(), controller.operator() as operator:
        answer = await submit(operator, web_job())
        assert (answer.version, answer.changed) == (1, True)
        assert not (await submit(operator, web_job())).changed
        status = await _healthy(controller)
        (allocation,) = status.allocations
        assert allocation.node == N1
        assert allocation.healthy
        assert agent.mesh[0].full
        await until(lambda: any(update.intentions for update in agent.mesh), "the mesh tells who may call web")
        await until(lambda: agent.echoed > 0, "heartbeats come back")
        by_prefix = await operator.GetAllocation(operator_pb2.GetAllocationRequest(alloc=allocation.id[:6]))
        assert by_prefix.id == allocation.id
        kept = [event async for event in operator.WatchEvents(operator_pb2.WatchEventsRequest(), timeout=CALL_S)]
        assert {"node.joined", "job.submitted", "alloc.healthy"} <= {event.kind for event in kept}
        assert [event.sequence for event in kept] == sorted({event.sequence for event in kept})
        groups = json.loads(await _metrics(controller, "/v1/discovery/prometheus"))
        labels = {"cluster": CLUSTER, "component": "agent", "node": "n1"}
        assert {"targets": ["127.0.0.1:9"], "labels": labels} in groups
        text = await _metrics(controller)
        assert 'outrider_controller_nodes{status="ready"} 1.0' in text
        assert "outrider_controller_sessions 1.0" in text
        await operator.StopJob(operator_pb2.StopJobRequest(job="shop"), timeout=CALL_S)

        async def stopped() -> bool:
            return not (
                await operator.ListAllocations(operator_pb2.ListAllocationsRequest(), timeout=CALL_S)
            ).allocations

        await until(stopped, "the allocation has ended")


async def test_what_was_acknowledged_survives_a_kill(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session(), controller.operator() as operator:
        await submit(operator, web_job(2))
        before = await _healthy(controller)
        assignments = dict(agent.assignments)
        await controller.kill()
    await controller.start()
    async with controller.operator() as operator:
        job = await operator.GetJob(JOB, timeout=CALL_S)
        assert job.job == before.job
        assert {each.id for each in job.allocations} == {each.id for each in before.allocations}
        async with agent.session():
            await until(lambda: agent.assignments == assignments, "the agent is told of the same allocations")
            after = await _healthy(controller)
            assert {each.id for each in after.allocations} == {each.id for each in before.allocations}
        fleet = await operator.GetFleet(operator_pb2.GetFleetRequest(), timeout=CALL_S)
        assert fleet.generation.epoch == 2


async def test_an_agent_that_leaves_is_gone_at_once_and_nothing_moves(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    async with controller.operator() as operator:
        async with agent.session():
            await submit(operator, web_job())
            await _healthy(controller)
        events = operator.WatchEvents(operator_pb2.WatchEventsRequest(follow=True), timeout=CALL_S)
        async for event in events:
            if event.kind == "node.gone":
                break
        status = await operator.GetJob(JOB, timeout=CALL_S)
        assert [each.node for each in status.allocations] == [N1]


async def test_who_may_call_what(controller: Controller) -> None:
    files = await controller.join(N1)
    listen = controller.at["listen"]
    fleet_request = operator_pb2.GetFleetRequest()
    denied = (grpc.StatusCode.PERMISSION_DENIED, "denied")
    assert stat.S_IMODE(controller.socket.stat().st_mode) == 0o600
    async with joining_channel(listen, controller.ca) as anonymous:
        call = operator_pb2_grpc.OperatorServiceStub(anonymous).GetFleet(fleet_request, timeout=CALL_S)
        assert (await _code(call))[0] is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(listen) as plain:
        call = operator_pb2_grpc.OperatorServiceStub(plain).GetFleet(fleet_request, timeout=CALL_S)
        assert (await _code(call))[0] is grpc.StatusCode.UNAVAILABLE
    async with channel(listen, files) as node:
        assert (
            await _code(operator_pb2_grpc.OperatorServiceStub(node).GetFleet(fleet_request, timeout=CALL_S)) == denied
        )
        watch = operator_pb2_grpc.OperatorServiceStub(node).WatchEvents(
            operator_pb2.WatchEventsRequest(), timeout=CALL_S
        )
        assert await _code(watch) == denied
    async with channel(listen, controller.operator_files) as operator:
        fleet = await operator_pb2_grpc.OperatorServiceStub(operator).GetFleet(fleet_request, timeout=CALL_S)
        assert fleet.cluster == CLUSTER
        leaf = fleet_pb2.IssueLeafRequest(service="web")
        assert await _code(fleet_pb2_grpc.FleetServiceStub(operator).IssueLeaf(leaf, timeout=CALL_S)) == denied


async def test_a_node_speaks_for_itself_alone(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    other = Agent(controller, N2, agent.files)
    hello = fleet_pb2.AgentMessage(hello=other.hello())
    newer = fleet_pb2.AgentMessage(hello=agent.hello())
    newer.hello.protocol = 9
    async with channel(controller.at["listen"], agent.files) as connection:
        stub = fleet_pb2_grpc.FleetServiceStub(connection)
        for first, expected in (
            (hello, (grpc.StatusCode.PERMISSION_DENIED, "denied")),
            (newer, (grpc.StatusCode.FAILED_PRECONDITION, "protocol")),
            (fleet_pb2.AgentMessage(), (grpc.StatusCode.INVALID_ARGUMENT, "bad-input")),
        ):
            assert await _code(stub.Session(iter([first]), timeout=CALL_S)) == expected
    async with controller.operator() as operator:
        assert not (await operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=CALL_S)).nodes


async def test_a_leaf_is_for_what_is_placed_on_the_node(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    bystander = await controller.join(N2)
    denied = (grpc.StatusCode.PERMISSION_DENIED, "denied")
    async with agent.session() as stub, controller.operator() as operator:
        fleet = await operator.GetFleet(operator_pb2.GetFleetRequest(), timeout=CALL_S)
        uri = spiffe_id(fleet.trust_domain, "dc1", ServiceName("web"))
        csr = signing_request(ec.generate_private_key(ec.SECP256R1()), uri)
        wanted = fleet_pb2.IssueLeafRequest(service="web", csr_pem=csr)
        assert await _code(stub.IssueLeaf(wanted, timeout=CALL_S)) == denied
        await submit(operator, web_job())
        await _healthy(controller)
        leaf = (await stub.IssueLeaf(wanted, timeout=CALL_S)).leaf
        certificate = x509.load_pem_x509_certificates(leaf.certificate_pem.encode())[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]
        assert leaf.key_pem == ""
        async with channel(controller.at["listen"], bystander) as connection:
            assert await _code(fleet_pb2_grpc.FleetServiceStub(connection).IssueLeaf(wanted, timeout=CALL_S)) == denied
        bad = fleet_pb2.IssueLeafRequest(service="web", csr_pem="garbage")
        assert (await _code(stub.IssueLeaf(bad, timeout=CALL_S)))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_logs_and_exec_pass_through_a_tunnel(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    bystander = await controller.join(N2)
    async with agent.session() as stub, controller.operator() as operator:
        await submit(operator, web_job())
        (allocation,) = (await _healthy(controller)).allocations
        logs = operator.Logs(fleet_pb2.LogsRequest(alloc=allocation.id[:5]), timeout=CALL_S)
        await until(lambda: len(agent.tunnels) == 1, "the agent is asked")
        assert agent.tunnels[0].logs.alloc == allocation.id
        hello = fleet_pb2.TunnelFrame(tunnel=agent.tunnels[0].tunnel)
        async with channel(controller.at["listen"], bystander) as connection:
            stolen = fleet_pb2_grpc.FleetServiceStub(connection).Tunnel(iter([hello]), timeout=CALL_S)
            assert (await _code(stolen))[0] is grpc.StatusCode.NOT_FOUND
        frames = [hello, *(fleet_pb2.TunnelFrame(stdout=b"x" * 1000) for _ in range(500))]
        answer = stub.Tunnel(iter([*frames, fleet_pb2.TunnelFrame(end=fleet_pb2.TunnelEnd())]), timeout=CALL_S)
        got = [frame async for frame in logs]
        assert sum(len(frame.stdout) for frame in got) == 500_000
        assert got[-1].HasField("end")
        assert [frame async for frame in answer] == []

        start = fleet_pb2.ExecRequest(alloc=allocation.id, command=["cat"])
        shell = operator.Exec(timeout=CALL_S)
        await shell.write(operator_pb2.ExecFrame(start=start))
        await until(lambda: len(agent.tunnels) == 2, "the agent is asked")
        tunnel = stub.Tunnel(timeout=CALL_S)
        await tunnel.write(fleet_pb2.TunnelFrame(tunnel=agent.tunnels[1].tunnel))
        await shell.write(operator_pb2.ExecFrame(stdin=b"hello"))
        typed = await tunnel.read()
        await tunnel.write(fleet_pb2.TunnelFrame(stdout=typed.stdin))
        assert (await shell.read()).stdout == b"hello"
        tunnel.cancel()  # the node breaks off
        with pytest.raises(grpc.aio.AioRpcError, match="node n1 broke off"):
            await shell.read()


async def test_intentions_are_made_checked_and_deleted(controller: Controller) -> None:
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session(), controller.operator() as operator:
        await submit(operator, web_job())
        (allocation,) = (await _healthy(controller)).allocations
        check = operator_pb2.CheckIntentionRequest(source="client", destination="web")

        async def leads() -> bool:
            return "outrider_controller_mesh_leading 1.0" in await _metrics(controller)

        await until(leads, "the mesh is led")
        fleet = await operator.GetFleet(operator_pb2.GetFleetRequest(), timeout=CALL_S)
        spiffe = f"spiffe://{fleet.trust_domain}/ns/default/dc/dc1/svc/client"
        refusal = mesh_pb2.ObservedRefusal(at_s=1.0, node="forged", alloc=allocation.id, source_spiffe=spiffe)
        await agent.write(fleet_pb2.AgentMessage(refusals=fleet_pb2.Refusals(refusals=[refusal])))

        async def refused() -> bool:
            answer = await operator.CheckIntention(check, timeout=CALL_S)
            assert not answer.allowed
            return [each.node for each in answer.refusals] == [N1]

        await until(refused, "the refusal is shown, with the node that really said so")
        wanted = mesh_pb2.Intention(source="client", destination="web", action=mesh_pb2.ACTION_ALLOW)
        made = await operator.CreateIntention(operator_pb2.CreateIntentionRequest(intention=wanted), timeout=CALL_S)
        answer = await operator.CheckIntention(check, timeout=CALL_S)
        assert answer.allowed
        assert answer.decided_by.id == made.id
        delete = operator_pb2.DeleteIntentionRequest(source="client", destination="web")
        await operator.DeleteIntention(delete, timeout=CALL_S)
        assert (await _code(operator.DeleteIntention(delete, timeout=CALL_S)))[1] == "not-found"
        wanted.source = "no name"
        bad = operator.CreateIntention(operator_pb2.CreateIntentionRequest(intention=wanted), timeout=CALL_S)
        assert (await _code(bad))[1] == "bad-input"


async def test_garbage_is_refused_and_disturbs_nothing(controller: Controller) -> None:
    host, port = controller.at["listen"].split(":")
    for listener in (port, controller.at["join_listen"].split(":")[1]):
        reader, writer = await asyncio.open_connection(host, int(listener))
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
        async with asyncio.timeout(CALL_S):
            await reader.read()
        writer.close()
    async with controller.operator() as operator:
        bad = codec.to_wire(web_job(), job_pb2.Job)
        bad.groups[0].services[0].port = "nope"
        submitted = operator.SubmitJob(operator_pb2.SubmitJobRequest(job=bad), timeout=CALL_S)
        assert await _code(submitted) == (grpc.StatusCode.INVALID_ARGUMENT, "bad-input")
        huge = codec.to_wire(web_job(), job_pb2.Job)
        huge.groups[0].tasks[0].files.add(path="x", content=bytes(17 * 1024 * 1024))
        submitted = operator.SubmitJob(operator_pb2.SubmitJobRequest(job=huge), timeout=CALL_S)
        assert (await _code(submitted))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        not_found = (grpc.StatusCode.NOT_FOUND, "not-found")
        assert await _code(operator.GetJob(JOB, timeout=CALL_S)) == not_found
        assert await _code(operator.WatchJob(JOB, timeout=CALL_S)) == not_found
        assert await _code(operator.Logs(fleet_pb2.LogsRequest(alloc="zz"), timeout=CALL_S)) == not_found
        assert await _code(operator.GetNode(operator_pb2.GetNodeRequest(node="n9"), timeout=CALL_S)) == not_found
        await submit(operator, web_job())
    agent = Agent(controller, N1, await controller.join(N1))
    async with channel(controller.at["listen"], agent.files) as connection:
        stream = fleet_pb2_grpc.FleetServiceStub(connection).Session(timeout=CALL_S)
        await stream.write(fleet_pb2.AgentMessage(hello=agent.hello()))
        await stream.write(fleet_pb2.AgentMessage())
        # Nothing is written after it: a write that meets the end of the call would hide how it ended.
        assert await _code(stream) == (grpc.StatusCode.INVALID_ARGUMENT, "bad-input")
    async with agent.session():
        await _healthy(controller)


async def test_how_it_ends(controller: Controller, tmp_path: Path) -> None:
    async def run(config: Path) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "controller", "--config", config, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(CALL_S):
            _, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, errors.decode()

    code, errors = await run(tmp_path / "controller.yaml")
    assert code == 74, errors  # the journal is another's
    bad = tmp_path / "bad.yaml"
    bad.write_text("cluster: X\n")
    code, errors = await run(bad)
    assert code == 64
    assert str(bad) in errors
    agent = Agent(controller, N1, await controller.join(N1))
    async with agent.session():
        assert await controller.stop() == 0
    assert not controller.socket.exists()
    assert controller.events("stopping")


async def test_a_last_will_makes_the_controller_look_at_once(tmp_path: Path) -> None:
    port = free_port()
    controller = Controller(tmp_path, mqtt={"host": "127.0.0.1", "port": port})
    try:
        await controller.start()  # without a broker: nothing waits for it
        ca = controller.data / "ca"
        acl, conf = tmp_path / "acl", tmp_path / "mosquitto.conf"
        acl.write_text(mosquitto_acl(CLUSTER))
        files = TlsFiles(ca=ca / "broker.ca", certificate=ca / "broker.crt", key=ca / "broker.key")
        conf.write_text(mosquitto_conf(host="127.0.0.1", port=port, files=files, acl=acl, user="root"))
        agent = Agent(controller, N1, await controller.join(N1))
        async with program("mosquitto", "-c", conf, log=tmp_path / "mosquitto.log"), agent.session():
            await until(lambda: bool(controller.events("broker connected")), "the broker is connected")
            tls = ssl_context(agent.files, server=False)
            async with aiomqtt.Client("127.0.0.1", port, tls_context=tls, timeout=5.0) as client:
                await client.publish(node_status_topic(CLUSTER, N1), b'{"status":"gone","at_s":1.0}', qos=1)
            await until(lambda: agent.probes > 0, "the agent is asked for a sign of life")
        async with controller.operator() as operator:
            (node,) = (await operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=CALL_S)).nodes
            assert node.node.id == N1
    finally:
        await controller.kill()
