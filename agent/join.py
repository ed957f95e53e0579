"""How a node without a certificate becomes one of the fleet: key and request made here, one Join, three files written.

The controller must show, in its TLS chain, the CA whose fingerprint the token has; then the token is sent.
"""

import asyncio
import os
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.config import Config, JoinConfig
from agent.leaves import signing_request
from outrider.clock import wall_s
from outrider.errors import ConfigError, PeerError, RefusedError
from outrider.log import Log
from outrider.pinned import pinned_ca
from outrider.tls import Identity, IdentityKind, joining_channel
from outrider.tokens import parse_token
from outrider.v1 import fleet_pb2, fleet_pb2_grpc

_DEADLINE_S = 10.0
_RETRY_S = 1.0


async def join(config: Config, log: Log) -> None:
    """Returns once the node's three files are there. A controller that is away is tried again, for ever.

    Raises ConfigError where there is nothing to join with, RefusedError where the controller says no.
    """
    files = config.tls
    if files.certificate.exists() and files.ca.exists() and files.key.exists():
        if certificate_life_s(files.certificate)[1] > wall_s() or config.join is None:
            return
        log.warning("certificate expired", path=str(files.certificate), then="joining again")
    if config.join is None:
        raise ConfigError(
            f"{files.certificate}: there is no certificate, and no `join` in the configuration to get one"
        )
    config.data.mkdir(mode=0o711, parents=True, exist_ok=True)
    while True:
        try:
            await _join(config, config.join)
        except PeerError as error:
            log.warning("cannot join", address=config.join.address, reason=str(error))
            await asyncio.sleep(_RETRY_S)
        else:
            log.info("joined", address=config.join.address)
            return


async def _join(config: Config, wanted: JoinConfig) -> None:
    files = config.tls
    token = _token(wanted)
    ca_pem = await asyncio.to_thread(pinned_ca, wanted.address, wanted.ca_sha256 or parse_token(token).ca_sha256)
    write_secret(files.ca, ca_pem.encode(), 0o644)
    identity = Identity(kind=IdentityKind.NODE, name=config.node, cluster=config.cluster)
    request = fleet_pb2.JoinRequest(
        token=token, node=config.node, csr_pem=signing_request(node_key(files.key), identity.uri)
    )
    async with joining_channel(wanted.address, files.ca) as channel:
        stub = fleet_pb2_grpc.JoinServiceStub(channel)
        try:
            response = await stub.Join(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise PeerError(f"{wanted.address}: {error.details()}") from error
            raise RefusedError("join", f"{wanted.address} refused node {config.node}: {error.details()}") from error
    if response.cluster != config.cluster:
        text = f"{wanted.address} is fleet {response.cluster!r}, the configuration's `cluster` says {config.cluster!r}"
        raise RefusedError("join", text)
    if response.ca_pem:  # two roots, while the fleet's CA changes
        write_secret(files.ca, response.ca_pem.encode(), 0o644)
    write_secret(files.certificate, response.certificate_pem.encode(), 0o600)  # last: its presence means joined


def _token(wanted: JoinConfig) -> str:
    if wanted.token_file is None:
        return wanted.token or ""
    try:
        return wanted.token_file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{wanted.token_file}: the join token cannot be read: {error.strerror}") from error


def certificate_life_s(path: Path) -> tuple[float, float]:
    """From and until when it is valid. Raises ConfigError where it cannot be read."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no certificate: {error}; remove it to join again") from error
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The node's key, made once: a node that joins again with the same key is known."""
    if path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path}: expected an EC key; remove the file to have one made")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(path, pem, 0o600)
    return key


def write_secret(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others for a moment."""
    unfinished = path.with_name(path.name + ".new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
