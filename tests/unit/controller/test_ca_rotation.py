"""The fleet's CA changes: whoever knows only one of the two roots follows every chain; in the end one is left."""

import ssl
from pathlib import Path

import grpc
import grpc.aio
import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import CertificateSigningRequestBuilder, Name

from controller.ca import FleetCa, pem_sha256
from outrider.errors import HostError
from outrider.ids import NodeId
from outrider.tls import TlsFiles, channel, peer_identity, server_credentials, ssl_context

N1 = NodeId("n1")


def node(ca: FleetCa, directory: Path, *, trusts: str = "") -> TlsFiles:
    """A node that joined now; it trusts what the CA says, or `trusts`."""
    directory.mkdir()
    files = TlsFiles(ca=directory / "ca", certificate=directory / "crt", key=directory / "key")
    key = ec.generate_private_key(ec.SECP256R1())
    csr = CertificateSigningRequestBuilder().subject_name(Name([])).sign(key, hashes.SHA256())
    files.ca.write_text(trusts or "".join(ca.roots))
    files.certificate.write_bytes(ca.issue_node(csr.public_bytes(serialization.Encoding.PEM), N1).pem)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files.key.write_bytes(pem)
    return files


def meet(server: TlsFiles, client: TlsFiles) -> str:
    """ "" where each lets the other in; else why not. As agents meet each other, without a network between."""
    sides = []
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    for files, is_server in ((server, True), (client, False)):
        context = ssl_context(files, server=is_server)
        context.check_hostname = False
        reads, writes = (to_server, to_client) if is_server else (to_client, to_server)
        sides.append(context.wrap_bio(reads, writes, server_side=is_server))
    for _ in range(8):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return str(error.reason)
    assert all(side.version() for side in sides)
    return ""


def test_whoever_knows_only_one_of_the_two_roots_follows_every_chain(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    before = ca.roots[0]
    old = node(ca, tmp_path / "old")
    assert ca.rotate()
    assert len(ca.roots) == 2
    renewed = node(ca, tmp_path / "renewed")
    not_told = node(ca, tmp_path / "not-told", trusts=before)
    came_later = node(ca, tmp_path / "later", trusts=ca.roots[0])
    knows_both = node(ca, tmp_path / "both")
    for one in (renewed, not_told, came_later, knows_both):
        for other in (renewed, not_told, knows_both, came_later):
            assert meet(one, other) == ""
    assert meet(old, renewed) == meet(renewed, old) == ""
    assert ca.retire()
    alone = node(ca, tmp_path / "alone")
    assert meet(alone, renewed) == ""
    assert "CERTIFICATE_VERIFY_FAILED" in meet(alone, old)


def test_a_second_rotation_waits_for_the_end_of_the_first(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    first = ca.sha256
    assert ca.rotated_at_s is None
    assert not ca.retire()
    assert ca.rotate()
    second = ca.sha256
    assert ca.rotated_at_s is not None
    assert not ca.rotate()
    assert ca.sha256 == second != first
    assert ca.retire()
    assert ca.rotate()
    assert pem_sha256(ca.roots[1]) == second


def test_a_crash_at_any_file_of_a_change_leaves_one_ca_or_the_other(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    old = node(ca, tmp_path / "old")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    ca.rotate()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    successor = FleetCa(tmp_path / "ca", "dev")._authority
    for written in range(len(whole) + 1):
        directory = tmp_path / f"crash-{written}"
        directory.mkdir()
        for name, content in kept.items():
            (directory / name).write_bytes(content)
        (directory / "successor").write_bytes(msgspec.msgpack.encode(successor))
        for name in ("previous.crt", "cross.crt", "ca.crt", "ca.key")[:written]:
            (directory / name).write_bytes(whole[name])
        again = FleetCa(directory, "dev")
        assert again.sha256 == ca.sha256
        assert meet(node(again, tmp_path / f"new-{written}"), old) == ""
        assert not (directory / "successor").exists()


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    FleetCa(tmp_path / "ca", "dev")
    FleetCa(tmp_path / "other", "dev")
    (tmp_path / "ca/ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    with pytest.raises(HostError, match=r"not the key of ca\.crt"):
        FleetCa(tmp_path / "ca", "dev")


async def test_a_listener_shows_and_trusts_what_its_files_hold_now(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    files = ca.issue_server(["localhost"])
    old = node(ca, tmp_path / "old")

    async def who(_: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        return str(peer_identity(context)).encode()

    server = grpc.aio.server()
    handlers = {"m": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    port = server.add_secure_port("localhost:0", server_credentials(files))
    await server.start()

    async def call(client: TlsFiles) -> bytes | grpc.StatusCode:
        async with channel(f"localhost:{port}", client) as connection:
            try:
                return await connection.unary_unary("/t/m")(b"", timeout=10)  # type: ignore[call-arg]
            except grpc.aio.AioRpcError as error:
                return error.code()

    try:
        assert b"node" in await call(old)
        ca.rotate()
        ca.issue_server(["localhost"])
        new = node(ca, tmp_path / "new", trusts=ca.roots[0])
        assert b"node" in await call(old), "it follows the new chain to the root that it knows"
        assert b"node" in await call(new)
        ca.retire()
        ca.issue_server(["localhost"])
        assert b"node" in await call(new)
        assert await call(old) is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(None)
