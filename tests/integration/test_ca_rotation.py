"""The fleet's CA changes while everything runs: at a controller's doors, and in a whole fleet."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from agent.leaves import signing_request
from bench.deploy import LOAD_JOB
from outrider.cli.dev import namespaces
from outrider.errors import RefusedError
from outrider.ids import NodeId
from outrider.pinned import pinned_ca
from outrider.tls import CONTROLLER_NAME, TlsFiles, channel
from outrider.tokens import parse_token
from outrider.v1 import access_pb2, access_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from tests.integration.controllers import CALL_S, CLUSTER, Agent, Controller, controller
from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["controller", "fleet"]
N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")


@contextlib.asynccontextmanager
async def root(controller: Controller) -> AsyncIterator["access_pb2_grpc.AccessServiceAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{controller.socket}") as connection:
        yield access_pb2_grpc.AccessServiceStub(connection)


async def is_let_in(controller: Controller, files: TlsFiles) -> bool:
    """An operator's certificate, on a connection of its own."""
    async with channel(controller.at["listen"], files) as connection:
        access = access_pb2_grpc.AccessServiceStub(connection)
        try:
            await access.WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


async def token_is_taken(controller: Controller, token: str) -> None:
    """Raises RefusedError where the token's CA is not the fleet's any more."""
    address = controller.at["join_listen"]
    authority = await asyncio.to_thread(pinned_ca, address, parse_token(token).ca_sha256)
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority.encode()), grpc.access_token_call_credentials(token)
    )
    options = (("grpc.ssl_target_name_override", CONTROLLER_NAME),)
    async with grpc.aio.secure_channel(address, credentials, options=options) as connection:
        await access_pb2_grpc.AccessServiceStub(connection).WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)


async def renewed(controller: Controller, node: NodeId, files: TlsFiles, directory: Path) -> TlsFiles:
    """The node's certificate anew, as its agent asks for it; what it trusts stays."""
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    csr = signing_request(key, f"outrider://{CLUSTER}/node/{node}")  # type: ignore[arg-type]  # an EC key, as made above
    async with channel(controller.at["listen"], files) as connection:
        request = fleet_pb2.RenewCertificateRequest(csr_pem=csr)
        answer = await fleet_pb2_grpc.FleetServiceStub(connection).RenewCertificate(request, timeout=CALL_S)
    new = TlsFiles(ca=files.ca, certificate=directory / f"{node}-renewed.crt", key=files.key)
    new.certificate.write_text(answer.certificate_pem)
    return new


async def test_both_cas_open_the_doors_until_the_old_one_is_retired(controller: Controller, tmp_path: Path) -> None:
    files = await controller.join(N1)
    kept = TlsFiles(ca=tmp_path / "op.ca", certificate=tmp_path / "op.crt", key=tmp_path / "op.key")
    for own, copy in zip(controller.operator_files.__struct_fields__, kept.__struct_fields__, strict=True):
        shutil.copy(getattr(controller.operator_files, own), getattr(kept, copy))
    async with root(controller) as access:
        await access.SetUser(access_pb2.SetUserRequest(user=access_pb2.User(name="ann")))
        wanted = access_pb2.CreateTokenRequest(kind=access_pb2.TOKEN_KIND_USER, user="ann", valid_s=600)
        token = (await access.CreateToken(wanted)).secret
        join_token = controller.token
        before = await access.GetCa(access_pb2.GetCaRequest())
        async with Agent(controller, N1, files).session():
            state = await access.RotateCa(access_pb2.RotateCaRequest())
            assert state.previous_sha256 == before.sha256 != state.sha256
            assert state.tokens_before >= 2
            (behind,) = state.behind
            assert (behind.node, behind.reason) == ("n1", "its agent is too old: upgrade it")
            with pytest.raises(grpc.aio.AioRpcError, match="1 nodes would be shut out: n1") as caught:
                await access.RetireCa(access_pb2.RetireCaRequest())
            assert dict(caught.value.trailing_metadata() or ()).get("outrider-code") == "behind"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outrider", "--address", f"unix:{controller.socket}",
            "operator", "ca", "rotate", "--patience", "0.2s", stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        told = (await process.communicate())[1].decode()
        assert process.returncode == 1, told
        assert "behind are n1 (it is not connected): each changes over by itself once it is back" in told
        # Who knows the old root alone is served; who comes now, too; and both kinds of tokens work.
        assert await is_let_in(controller, kept)
        assert await is_let_in(controller, controller.operator_files)
        await token_is_taken(controller, token)
        assert parse_token(controller.token).ca_sha256 == state.sha256
        await controller.join(N2, join_token)
        newcomer = await controller.join(N3)
        mine = await renewed(controller, N1, files, tmp_path)
        newer = (await access.CreateToken(wanted)).secret
        await controller.stop()
        await controller.start()  # in the middle of it: it goes on where it was
        assert await is_let_in(controller, kept)
    async with root(controller) as access:
        assert (await access.GetCa(access_pb2.GetCaRequest())).previous_sha256 == before.sha256
        now = await access.RetireCa(access_pb2.RetireCaRequest(force=True))
        assert (now.sha256, now.previous_sha256) == (state.sha256, "")
        assert not await is_let_in(controller, kept)
        assert await is_let_in(controller, controller.operator_files)
        with pytest.raises(RefusedError, match="its CA changed"):
            await token_is_taken(controller, token)
        await token_is_taken(controller, newer)
        async with Agent(controller, N3, newcomer).session():
            pass
        shutil.copy(newcomer.ca, mine.ca)  # as its agent was told
        async with Agent(controller, N1, mine).session():
            pass
        with pytest.raises(grpc.aio.AioRpcError, match="failed to connect"):
            async with Agent(controller, N1, files).session():
                pass


def client_log(fleet: DevFleet) -> str:
    (client,) = (each["id"] for each in fleet.json("alloc", "ls") if each["group"] == "client")
    return fleet.outrider("alloc", "logs", client).stdout


def requests(fleet: DevFleet) -> tuple[int, int]:
    """Answered, and failed, as the load's client counts them."""
    totals = re.findall(r"total (\d+) (\d+)", client_log(fleet))
    return (int(totals[-1][0]), int(totals[-1][1])) if totals else (0, 0)


def workloads(fleet: DevFleet) -> set[tuple[str, int]]:
    found = fleet.json("job", "status", "load")["allocations"]
    return {
        (one["id"], task["restarts"])
        for one in found
        if one["status"] == "running" and one["report"] is not None
        for task in one["report"]["tasks"]
    }


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_a_fleet_changes_its_ca_under_load_and_restarts_nothing(fleet: DevFleet, tmp_path: Path) -> None:
    (tmp_path / "load.yaml").write_text(yaml.safe_dump(LOAD_JOB))
    assert fleet.outrider("job", "run", str(tmp_path / "load.yaml")).returncode == 0
    eventually(lambda: requests(fleet)[0] >= 50, "requests go through the mesh")
    before, failed = workloads(fleet), requests(fleet)[1]
    old = fleet.json("operator", "ca", "status")["sha256"]

    rotated = fleet.outrider("operator", "ca", "rotate")
    assert rotated.returncode == 0, rotated.stderr
    assert "every node is ready for `outrider operator ca retire`" in rotated.stdout
    state = fleet.json("operator", "ca", "status")
    assert (state["previous_sha256"], state["behind"]) == (old, [])
    retired = fleet.outrider("operator", "ca", "retire")
    assert retired.returncode == 0, retired.stderr
    assert fleet.json("operator", "ca", "status")["previous_sha256"] == ""

    # New sessions are of the new CA alone, and so is what is asked for on them.
    (controller,) = (
        pid
        for pid in namespaces.processes(fleet.layout.control_namespace)
        if b"-m\0controller\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(controller, signal.SIGKILL)  # its supervisor starts it again, and all agents dial anew
    eventually(lambda: fleet.outrider("node", "ls").returncode == 0, "the controller is back")
    eventually(lambda: set(fleet.node_statuses().values()) == {"ready"}, "the agents are back")
    answered = requests(fleet)[0]
    eventually(lambda: requests(fleet)[0] >= answered + 100, "requests go on")
    assert requests(fleet)[1] == failed, client_log(fleet)
    assert workloads(fleet) == before
    assert {call["call"] for call in audited(fleet)} >= {"RotateCa", "RetireCa"}


def audited(fleet: DevFleet) -> list[dict[str, str]]:
    return [json.loads(line) for line in fleet.outrider("audit", "--json").stdout.splitlines()]
