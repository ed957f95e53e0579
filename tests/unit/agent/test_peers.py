"""Agents among themselves: who they are is in their certificates, and nobody else is let in."""

import asyncio
import socket
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.peers import KEEPALIVE, Line, Peers, Purpose
from controller.ca import FleetCa
from outrider.errors import PeerError
from outrider.ids import NodeId
from outrider.log import Log
from outrider.tls import TlsFiles


def joined(ca: FleetCa, name: str, directory: Path) -> TlsFiles:
    directory.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    files = TlsFiles(ca=directory / "ca", certificate=directory / "crt", key=directory / "key")
    issued = ca.issue_node(request.public_bytes(serialization.Encoding.PEM), NodeId(name))
    files.certificate.write_bytes(issued.pem)
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    files.ca.write_bytes(ca.roots_pem)
    return files


def peers(files: TlsFiles, cluster: str = "test") -> Peers:
    return Peers(cluster=cluster, tls=files, log=Log("peers"))


async def echo(purpose: Purpose, line: Line) -> None:
    await line.say(Purpose(kind=line.node, alloc=purpose.alloc))


async def ask(caller: Peers, address: str, node: str) -> Purpose:
    async with caller.dial(address, NodeId(node), Purpose(kind="ask", alloc="a")) as line:
        return await line.hear(Purpose, 2)


async def test_either_end_knows_the_other_by_its_certificate(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "test")
    one, two = joined(ca, "n1", tmp_path / "n1"), joined(ca, "n2", tmp_path / "n2")
    async with peers(one).listening("127.0.0.1", 0, echo) as address:
        assert await ask(peers(two), address, "n1") == Purpose(kind="n2", alloc="a")
        with pytest.raises(PeerError, match="is node n1, not n3"):
            await ask(peers(two), address, "n3")


async def test_either_end_notices_a_host_that_is_gone_without_a_word(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "test")
    one, two = joined(ca, "n1", tmp_path / "n1"), joined(ca, "n2", tmp_path / "n2")
    taken: list[Line] = []

    async def keep(purpose: Purpose, line: Line) -> None:
        taken.append(line)
        await line.say(purpose)
        await line.hear(Purpose, 10)

    purpose = Purpose(kind="ask", alloc="a")
    async with (
        peers(one).listening("127.0.0.1", 0, keep) as address,
        peers(two).dial(address, NodeId("n1"), purpose) as line,
    ):
        await line.hear(Purpose, 10)
        for end in (line, *taken):
            connection = end.writer.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert {each: connection.getsockopt(socket.IPPROTO_TCP, each) for each in KEEPALIVE} == KEEPALIVE
        await line.say(purpose)


async def test_what_is_of_another_fleet_is_not_spoken_with(tmp_path: Path) -> None:
    ours, theirs = FleetCa(tmp_path / "ca", "test"), FleetCa(tmp_path / "other", "test")
    one, two = joined(ours, "n1", tmp_path / "n1"), joined(theirs, "n2", tmp_path / "n2")
    two_with_our_ca = TlsFiles(ca=one.ca, certificate=two.certificate, key=two.key)
    async with peers(one).listening("127.0.0.1", 0, echo) as address:
        with pytest.raises(PeerError):
            await ask(peers(two), address, "n1")
        with pytest.raises(PeerError):
            await ask(peers(two_with_our_ca), address, "n1")
    operator = ours.issue_operator("ada")
    async with peers(one).listening("127.0.0.1", 0, echo) as address:
        with pytest.raises(PeerError, match="broke off"):
            await ask(peers(operator), address, "n1")


async def test_a_renewed_certificate_is_shown_without_a_new_start(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "test")
    one, two = joined(ca, "n1", tmp_path / "n1"), joined(ca, "n2", tmp_path / "n2")
    async with peers(one).listening("127.0.0.1", 0, echo) as address:
        assert (await ask(peers(two), address, "n1")).kind == "n2"
        await asyncio.to_thread(joined, ca, "n4", tmp_path / "n1")
        assert (await ask(peers(two), address, "n4")).kind == "n2"
