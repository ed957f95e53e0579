"""Three controllers on three Consul servers: who dies, stops or comes back, nothing that was acknowledged is lost."""

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import msgspec
import pytest
import pytest_asyncio

from outrider import codec
from outrider.ids import JobName, NodeId, ServiceName
from outrider.model.job import Job
from outrider.tls import TlsFiles, channel
from outrider.v1 import access_pb2, access_pb2_grpc, fleet_pb2_grpc, job_pb2, operator_pb2
from tests.faults.consul_cluster import ConsulCluster, consul_cluster
from tests.integration.controllers import Controller, web_job
from tests.integration.processes import free_port, until

pytestmark = [pytest.mark.host, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
CALL_S = 20.0
WAIT_S = 30.0


class Fleet:
    """Three controllers of one fleet. A call goes to any of them that answers."""

    def __init__(self, directory: Path, consul: ConsulCluster) -> None:
        self.consul = consul
        self._key_file = directory / "secrets.key"
        self._key_file.write_text(f"{secrets.token_hex(32)}\n")
        self.controllers = [self.controller(directory / f"c{n}", f"c{n}", n - 1) for n in (1, 2, 3)]

    def controller(self, directory: Path, name: str, at: int) -> Controller:
        directory.mkdir(parents=True)
        return Controller(
            directory,
            name=name,
            listen=f"127.0.0.1:{free_port()}",
            join_listen=f"127.0.0.1:{free_port()}",
            consul={"url": self.consul.servers[at].url},
            journal="consul",
            secrets={"key_file": str(self._key_file)},
        )

    def leader(self) -> Controller | None:
        """The one whose newest word is that it is ready to lead."""
        for controller in self.controllers:
            if controller.process is not None and controller.process.returncode is None and controller.leads():
                return controller
        return None

    async def led(self) -> Controller:
        await until(lambda: self.leader() is not None, "a controller leads", WAIT_S)
        found = self.leader()
        assert found is not None
        return found

    async def settled(self) -> None:
        """Consul is whole, and every controller leads or follows."""
        await until(self.consul.ready, "Consul is whole again", WAIT_S)
        for controller in self.controllers:
            await until(functools.partial(self.knows, controller, set()), "each controller answers", WAIT_S)

    async def submit(self, job: Job) -> bool:
        """Whether some controller acknowledged it; each is asked in turn until one does, or none does in time."""
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while asyncio.get_running_loop().time() < deadline_s:
            for controller in self.controllers:
                if controller.process is None or controller.process.returncode is not None:
                    continue
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with controller.operator() as stub:
                        await stub.SubmitJob(request, timeout=2)
                        return True
        return False

    async def knows(self, controller: Controller, names: set[str]) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return names <= await self.jobs(controller)
        return False

    async def jobs(self, controller: Controller) -> set[str]:
        async with controller.operator() as stub:
            found = await stub.ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S)
        return {job.name for job in found.jobs}


@contextlib.asynccontextmanager
async def fleet_in(directory: Path) -> AsyncIterator[Fleet]:
    async with consul_cluster(directory) as consul:
        fleet = Fleet(directory, consul)
        try:
            for controller in fleet.controllers:
                await controller.launch()
            await fleet.led()
            yield fleet
        finally:
            for controller in fleet.controllers:
                await controller.kill()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with fleet_in(tmp_path_factory.mktemp("faults")) as made:
        yield made


def named(name: str) -> Job:
    """A job with a service of its own, so that two of them are never in conflict."""
    found = web_job(1)
    service = msgspec.structs.replace(found.groups[0].services[0], name=ServiceName(name))
    group = msgspec.structs.replace(found.groups[0], services=(service,))
    return msgspec.structs.replace(found, name=JobName(name), groups=(group,))


async def submitted(fleet: Fleet, count: int) -> set[str]:
    """Names that the fleet has acknowledged."""
    names = {f"job-{secrets.token_hex(4)}" for _ in range(count)}
    for name in names:
        assert await fleet.submit(named(name))
    return names


async def test_every_controller_answers_and_only_one_leads(fleet: Fleet) -> None:
    names = await submitted(fleet, 3)
    for controller in fleet.controllers:
        await until(controller.serves, "it leads or follows", WAIT_S)
        assert names <= await fleet.jobs(controller)
    assert sum(controller.leads() for controller in fleet.controllers) == 1


async def test_a_follower_tells_an_agent_who_leads(fleet: Fleet) -> None:
    leader = await fleet.led()
    follower = next(one for one in fleet.controllers if one is not leader)
    await until(follower.serves, "it follows", WAIT_S)
    files = await follower.join(NodeId("n1"), token=leader.token)  # passed on to the leader, whose answer it is
    address = follower.configuration["listen"]
    async with channel(str(address), files) as connection:
        stream = fleet_pb2_grpc.FleetServiceStub(connection).Session()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    told = dict(caught.value.trailing_metadata())  # type: ignore[call-overload,var-annotated]  # pairs, at run time
    assert told["outrider-leader"] == leader.configuration["listen"]
    assert told["outrider-code"] == "not-leader"


async def test_a_killed_leader_loses_nothing(fleet: Fleet) -> None:
    for _ in range(3):
        names = await submitted(fleet, 5)
        victim = await fleet.led()
        await victim.kill()
        names |= await submitted(fleet, 1)
        assert names <= await fleet.jobs(await fleet.led())
        await victim.launch()


async def test_the_command_line_finds_the_leader_by_a_list(fleet: Fleet) -> None:
    """Of which the first is dead, and no other leads yet; a watcher goes on where it broke off."""
    names = await submitted(fleet, 1)
    victim = await fleet.led()
    others = [one for one in fleet.controllers if one is not victim]
    files = victim.operator_files
    environment = {
        **os.environ,
        "OUTRIDER_ADDRESS": ",".join(str(one.configuration["listen"]) for one in (victim, *others)),
        "OUTRIDER_CA": str(files.ca),
        "OUTRIDER_CERT": str(files.certificate),
        "OUTRIDER_KEY": str(files.key),
    }
    (name,) = names

    async def outrider(*words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outrider", *words, env=environment, stdout=asyncio.subprocess.PIPE
        )

    watching = await outrider("logs", "--follow", name)
    try:
        await victim.kill()
        listing, _ = await asyncio.wait_for((await outrider("job", "ls", "--json")).communicate(), WAIT_S)
        assert names <= {job["name"] for job in json.loads(listing)}
        stopping = await outrider("job", "stop", name, "--detach")
        assert await asyncio.wait_for(stopping.wait(), WAIT_S) == 0
        assert watching.returncode is None
    finally:
        watching.kill()
        await watching.communicate()
        await victim.launch()


async def test_a_leader_that_was_stopped_answers_nothing_old_when_it_goes_on(fleet: Fleet) -> None:
    victim = await fleet.led()
    assert victim.process is not None
    victim.process.send_signal(signal.SIGSTOP)
    try:
        names = await submitted(fleet, 1)
    finally:
        victim.process.send_signal(signal.SIGCONT)
    # It says that it does not lead any more, or passes the call on: never what was true before it was stopped.
    with contextlib.suppress(grpc.aio.AioRpcError):
        assert names <= await fleet.jobs(victim)
    await until(lambda: fleet.knows(victim, names), "it follows", WAIT_S)


async def test_the_loss_of_any_consul_server_loses_nothing(fleet: Fleet) -> None:
    for server in (fleet.consul.leader(), *fleet.consul.servers[:1]):
        names = await submitted(fleet, 3)
        server.kill()
        try:
            names |= await submitted(fleet, 1)
        finally:
            fleet.consul.start_server(server)
        await until(fleet.consul.ready, "Consul is whole again", WAIT_S)
        for controller in fleet.controllers:
            knows = functools.partial(fleet.knows, controller, names)
            await until(knows, "each controller knows all of it", WAIT_S)


async def test_all_controllers_change_the_fleets_ca_together(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.settled()
    leader = await fleet.led()
    follower = next(one for one in fleet.controllers if one is not leader)
    old = TlsFiles(ca=tmp_path / "ca", certificate=tmp_path / "crt", key=tmp_path / "key")
    for mine, kept in zip(follower.operator_files.__struct_fields__, old.__struct_fields__, strict=True):
        shutil.copy(getattr(follower.operator_files, mine), getattr(old, kept))

    async def has(controller: Controller, sha256: str) -> bool:
        return await asyncio.to_thread(lambda: ca_sha256(controller) == sha256)

    async with access(follower) as through:  # passed on to the leader
        state = await through.RotateCa(access_pb2.RotateCaRequest(), timeout=CALL_S)
    for controller in fleet.controllers:
        await until(functools.partial(has, controller, state.sha256), "each controller has the new CA", WAIT_S)
        assert await lets_in(controller, old), "the old one is trusted beside it"
    await leader.kill()
    await fleet.led()
    await leader.launch()
    await fleet.settled()
    async with access(await fleet.led()) as at:
        assert (await at.GetCa(access_pb2.GetCaRequest(), timeout=CALL_S)).sha256 == state.sha256
        await at.RetireCa(access_pb2.RetireCaRequest(force=True), timeout=CALL_S)
    for controller in fleet.controllers:
        new = controller.operator_files

        async def refuses(controller: Controller = controller) -> bool:
            return not await lets_in(controller, old)

        await until(refuses, "no controller trusts the old CA", WAIT_S)
        await until(functools.partial(lets_in, controller, new), "each trusts the new one, and passes calls on", WAIT_S)


def ca_sha256(controller: Controller) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(controller.ca.read_text())).hexdigest()


@contextlib.asynccontextmanager
async def access(controller: Controller) -> AsyncIterator["access_pb2_grpc.AccessServiceAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{controller.socket}") as connection:
        yield access_pb2_grpc.AccessServiceStub(connection)


async def lets_in(controller: Controller, files: TlsFiles) -> bool:
    """Whether an operator's certificate opens the members' door, and the call gets to whoever leads."""
    async with channel(str(controller.configuration["listen"]), files) as connection:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await access_pb2_grpc.AccessServiceStub(connection).WhoAmI(access_pb2.WhoAmIRequest(), timeout=CALL_S)
            return True
    return False


async def test_a_controller_with_another_key_of_secrets_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.led()
    (tmp_path / "secrets.key").write_text(f"{secrets.token_hex(32)}\n")
    stranger = fleet.controller(tmp_path / "c4", "c4", 0)
    stranger.configuration["secrets"] = {"key_file": str(tmp_path / "secrets.key")}
    await stranger.launch()
    assert stranger.process is not None
    assert await asyncio.wait_for(stranger.process.wait(), WAIT_S) == 64
    told = stranger.log.read_text()
    assert f"secrets.key_file: {tmp_path}/secrets.key has key" in told
    assert "give all controllers the same" in told


async def test_what_a_dead_fleet_acknowledged_is_there_when_it_starts_again(fleet: Fleet) -> None:
    names = await submitted(fleet, 2)
    await asyncio.gather(*(controller.kill() for controller in fleet.controllers))
    for controller in fleet.controllers:
        await controller.launch()
    assert names <= await fleet.jobs(await fleet.led())
