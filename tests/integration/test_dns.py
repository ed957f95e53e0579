"""The DNS responder as it runs: a process of its own, asked by real resolvers inside real allocations."""

import asyncio
import os
import resource
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
from dnslib import RCODE, DNSRecord

from agent.network.dns.resolver import Resolver, open_dns_sockets, resolv_conf
from agent.network.dns.sandbox import RESPONDER_ID, responder_socket, responder_spec
from agent.network.namespaces import AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address
from agent.sandbox.cgroup import Cgroups
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER
from outrider.errors import InputError, PeerError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.job import MIB
from tests.integration.network_lab import NODE, Lab, inside, lab, node
from tests.integration.processes import until
from tests.integration.sandboxes import private_mounts

__all__ = ["node"]
pytestmark = pytest.mark.host

BLOCK = 8
A, B = AllocId("0a0a0a0a0a"), AllocId("0b0b0b0b0b")
WORKLOAD, RESPONDER_UID = 600_000, 70_000_000
DNS = ("198.18.0.1", 53)
ADDRESS = "198.18.1.7"
IDLE_FILES = 5  # of a responder: its standard streams, the listener and the selector


def spec(alloc: AllocId, address: str | None) -> NetworkSpec:
    assert address is not None
    return NetworkSpec(
        alloc=alloc,
        local_address=address,
        host_side_address=gateway_address(BLOCK),
        sidecar_uid=500_000,
        workload_uids=(WORKLOAD, 65_536),
        dns_uid=RESPONDER_UID + INNER_USER,
    )


def wait_until_listening(path: Path) -> None:
    deadline_s = time.monotonic() + 10
    while not listens(path):
        assert time.monotonic() < deadline_s, "the responder did not start"
        time.sleep(0.005)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as attempt:
        return attempt.connect_ex(str(path)) == 0


class Responder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it listens."""
        self.process = subprocess.Popen([sys.executable, "-m", "agent.network.dns", "--socket", str(self.path)])
        wait_until_listening(self.path)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def open_files(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
async def networks(node: Lab, tmp_path: Path) -> AsyncIterator[AllocationNetworks]:
    assert node.run("nft list ruleset") == ""
    made = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)
    first = next_address(BLOCK, ())
    await made.create(spec(A, first))
    await made.create(spec(B, next_address(BLOCK, (), first)))
    yield made
    await made.reap(())
    await made.close()


@pytest.fixture
def responder(tmp_path: Path) -> Iterator[Responder]:
    made = Responder(tmp_path / "dns.sock")
    made.start()
    yield made
    made.kill()


async def test_programs_inside_find_names_of_the_mesh_and_learn_at_once_what_does_not_exist(
    networks: AllocationNetworks, responder: Responder, tmp_path: Path
) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}, B: {}}, networks)

    began_s = time.monotonic()
    assert await getent(networks, A, tmp_path, "api.mesh") == {ADDRESS}
    assert await getent(networks, A, tmp_path, "db.mesh") == set()
    assert await getent(networks, A, tmp_path, "example.org") == set()
    assert await getent(networks, B, tmp_path, "api.mesh") == set()  # not one of its upstreams
    assert time.monotonic() - began_s < 10, "the resolver waits twice 5 s for each name that nobody answers"


async def test_tables_are_replaced_whole(networks: AllocationNetworks, responder: Responder) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}}, networks)
    await resolver.set_names(A, {"web.mesh": "198.18.1.8"})

    assert await ask(networks, A, "web.mesh") == "198.18.1.8"
    assert await ask(networks, A, "api.mesh") == "NXDOMAIN"


async def test_the_responder_outlives_agents_and_the_next_one_takes_it_over(
    networks: AllocationNetworks, responder: Responder
) -> None:
    await share(Resolver(socket=responder.path), {A: {"api": ADDRESS}, B: {}}, networks)
    assert await ask(networks, A, "api.mesh") == ADDRESS

    later = Resolver(socket=responder.path)
    assert await later.held() == {A, B}
    await share(later, {A: {"web": ADDRESS}}, networks)
    assert await later.held() == {A}
    assert await ask(networks, A, "web.mesh") == ADDRESS
    with pytest.raises(ConnectionRefusedError):
        await ask(networks, B, "web.mesh")


async def test_a_responder_that_starts_again_is_given_all_again(
    networks: AllocationNetworks, responder: Responder
) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}}, networks)
    assert await ask(networks, A, "api.mesh", tcp=True) == ADDRESS
    responder.kill()
    with pytest.raises(PeerError, match=r"dns\.sock"):
        await resolver.set_names(A, {})
    responder.start()
    with pytest.raises(PeerError, match="not attached"):
        await resolver.set_names(A, {})

    await share(resolver, {A: {"api": ADDRESS}}, networks)
    assert await ask(networks, A, "api.mesh") == ADDRESS
    assert await ask(networks, A, "api.mesh", tcp=True) == ADDRESS


async def test_a_detached_allocations_sockets_are_let_go(networks: AllocationNetworks, responder: Responder) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}}, networks)
    with stream(networks, A) as client:
        client.sendall(b"\0")  # a connection amid a question
        await resolver.detach(A)
        await resolver.detach(A)

    assert await resolver.held() == frozenset()
    # The agent's last connection is let go after its reply.
    await until(lambda: responder.open_files() == IDLE_FILES, "the responder holds nothing but its own")


async def test_noise_is_dropped_and_neither_it_nor_slow_clients_keep_others_waiting(
    networks: AllocationNetworks, responder: Responder
) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}}, networks)
    slow = [stream(networks, A) for _ in range(20)]  # more than it keeps for one allocation
    slow[0].sendall(b"\x10\x00")  # says 4,096 bytes, sends none
    with networks.open_socket(A, socket.SOCK_DGRAM) as noisy:
        for noise in (b"", b"\0", b"\xff" * 4000, b"\x12\x34\x01\x00\x00\x01" + bytes(6) + b"\xc0\x0c\0\1\0\1"):
            noisy.sendto(noise, DNS)

    assert await ask(networks, A, "api.mesh") == ADDRESS
    for each in slow:
        each.close()
    assert await ask(networks, A, "api.mesh", tcp=True) == ADDRESS


async def test_what_the_agent_says_wrongly_is_an_error_and_changes_nothing(
    networks: AllocationNetworks, responder: Responder
) -> None:
    resolver = Resolver(socket=responder.path)
    await share(resolver, {A: {"api": ADDRESS}}, networks)

    with pytest.raises(InputError, match="do not fit"):
        await resolver.set_names(A, {f"{number:063}": ADDRESS for number in range(3000)})
    with pytest.raises(PeerError, match="not understood"):
        await resolver.set_names(A, {"api.mesh": "nowhere"})
    assert await ask(networks, A, "api.mesh") == ADDRESS


async def test_a_responder_that_does_not_answer_is_late_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "dns.sock"))
        silent.listen()
        with pytest.raises(PeerError, match="no reply within"):
            await Resolver(socket=tmp_path / "dns.sock").held()


async def test_the_responder_is_small(networks: AllocationNetworks, responder: Responder) -> None:
    await share(Resolver(socket=responder.path), {A: {"api": ADDRESS}}, networks)

    assert responder.resident_bytes() < 24 * MIB


async def test_it_runs_in_a_sandbox_that_holds_nothing_but_itself(tmp_path: Path) -> None:
    cgroup = f"outrider-test-{secrets.token_hex(4)}"
    with private_mounts(), lab():
        made = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)
        runtime = SandboxRuntime(run_directory=tmp_path / "run", cgroup=cgroup, log=Log("test"))
        try:
            await made.create(spec(A, next_address(BLOCK, ())))
            sandbox = responder_spec(
                directory=directory(tmp_path / "sandbox", 0),
                socket_directory=directory(tmp_path / "dns", RESPONDER_UID + INNER_USER),
                network_namespace=await made.isolated(),
                uid_first=RESPONDER_UID,
            )
            status = await runtime.start(sandbox)
            resolver = Resolver(socket=responder_socket(tmp_path / "dns"))
            wait_until_listening(responder_socket(tmp_path / "dns"))
            await share(resolver, {A: {"api": ADDRESS}}, made)

            assert await ask(made, A, "api.mesh") == ADDRESS
            assert await ask(made, A, "api.mesh", tcp=True) == ADDRESS
            root = Path(f"/proc/{status.pid}/root")
            assert not (root / "home").exists()
            assert sorted(path.name for path in (root / "opt/outrider").iterdir()) == ["agent", "dnslib"]
        finally:
            await runtime.delete(RESPONDER_ID)
            Cgroups().remove(cgroup)
            await made.reap(())
            await made.close()


async def share(resolver: Resolver, wanted: Mapping[AllocId, Mapping[str, str]], networks: AllocationNetworks) -> None:
    """Have exactly `wanted` answered."""
    held = await resolver.held()
    for alloc in held - wanted.keys():
        await resolver.detach(alloc)
    for alloc, names in wanted.items():
        if alloc not in held:
            await resolver.attach(alloc, open_dns_sockets(alloc, networks.open_socket))
        await resolver.set_names(alloc, {f"{name}.mesh": address for name, address in names.items()})


def directory(path: Path, owner: int) -> Path:
    path.mkdir(mode=0o700)
    os.chown(path, owner, owner)
    return path


async def getent(networks: AllocationNetworks, alloc: AllocId, directory: Path, name: str) -> set[str]:
    """The addresses that the C library finds, with the resolv.conf of workloads, as a workload's user."""
    resolv = directory / "resolv.conf"
    resolv.write_text(resolv_conf())
    paths = {network.alloc: network.namespace for network in await networks.list()}
    user = " ".join(inside(paths[alloc], WORKLOAD))
    script = f"mount --bind {resolv} /etc/resolv.conf && exec {user} getent ahosts {name}"
    process = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "sh", "-c", script, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    return {line.split()[0] for line in output.decode().splitlines()}


def stream(networks: AllocationNetworks, alloc: AllocId) -> socket.socket:
    opened = networks.open_socket(alloc, socket.SOCK_STREAM)
    opened.settimeout(5)
    opened.connect(DNS)
    return opened


async def ask(networks: AllocationNetworks, alloc: AllocId, name: str, *, tcp: bool = False) -> str:
    return await asyncio.to_thread(_ask, networks, alloc, name, tcp=tcp)


def _ask(networks: AllocationNetworks, alloc: AllocId, name: str, *, tcp: bool) -> str:
    query = bytes(DNSRecord.question(name).pack())
    if tcp:
        with stream(networks, alloc) as client:
            client.sendall(len(query).to_bytes(2) + query)
            length = int.from_bytes(client.recv(2, socket.MSG_WAITALL))
            reply = DNSRecord.parse(client.recv(length, socket.MSG_WAITALL))
    else:
        with networks.open_socket(alloc, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(DNS)
            client.send(query)
            reply = DNSRecord.parse(client.recv(4096))
    return RCODE[reply.header.rcode] if reply.header.rcode else str(reply.short())
