"""The fleet's CA: mTLS between processes (the mesh has a CA of its own). Files below DATA/ca, keys mode 0600.

Owns making and keeping certificates. Never decides who may join: `join` does, by its tokens.
"""

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outrider.broker import CONTROLLER_USER, OPERATOR_USER
from outrider.errors import HostError, RefusedError
from outrider.ids import NodeId
from outrider.tls import CONTROLLER_NAME, Identity, IdentityKind, TlsFiles

_CA_VALID = dt.timedelta(days=3650)
_LEAF_VALID = dt.timedelta(days=365)
_CLOCK_SKEW = dt.timedelta(minutes=5)

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class FleetCa:
    """One fleet's CA, made at the controller's first start."""

    def __init__(self, directory: Path, cluster: str) -> None:
        """Raises HostError where the files cannot be read, made or do not fit each other."""
        self._directory = directory
        self._cluster = cluster
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (directory / "nodes").mkdir(mode=0o700, exist_ok=True)
            if not (directory / "ca.key").exists():
                self._create()
            self._key = _private_key((directory / "ca.key").read_bytes())
            self._certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        except (OSError, ValueError) as error:
            hint = "restore the directory from a backup, or remove it: all nodes must join again then"
            raise HostError(str(directory), step=f"open the fleet's CA: {error}", hint=hint) from error

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue_server(self, names: Sequence[str]) -> TlsFiles:
        """The controller's own certificate, good for both ends; `names` are more DNS names and IP addresses."""
        identity = Identity(kind=IdentityKind.CONTROLLER, name="", cluster=self._cluster)
        return self._issue_files(
            "server", CONTROLLER_USER, [*_alternatives((CONTROLLER_NAME, *names)), _uri(identity)], server=True
        )

    def issue_broker(self, names: Sequence[str]) -> TlsFiles:
        """A Mosquitto's certificate. It is no controller's: it cannot pose as one."""
        return self._issue_files("broker", "@broker", _alternatives(names), server=True)

    def issue_operator(self, name: str) -> TlsFiles:
        """DATA/ca/operator.{crt,key,ca}: for the CLI. All operators are one user to the broker."""
        identity = Identity(kind=IdentityKind.OPERATOR, name=name, cluster=self._cluster)
        return self._issue_files("operator", OPERATOR_USER, [_uri(identity)], server=False)

    def issue_reader(self, name: str) -> TlsFiles:
        """DATA/ca/reader.{crt,key,ca}: for Prometheus."""
        identity = Identity(kind=IdentityKind.READER, name=name, cluster=self._cluster)
        return self._issue_files("reader", "@reader", [_uri(identity)], server=False)

    def issue_node(self, csr_pem: bytes, node: NodeId, *, known_may_rejoin: bool) -> bytes:
        """A node's certificate for the key of `csr_pem`; what else the request asks for is ignored.

        Raises RefusedError where the request is malformed, or where `node` joined before with another key
        and the token does not name it.
        """
        public_key = _requested_key(csr_pem)
        path = self._directory / "nodes" / f"{node}.crt"
        if path.exists() and not known_may_rejoin:
            known = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
            if known != public_key:
                raise RefusedError(
                    "node-known", f"node {node} joined before with another key; take another name, or remove {path}"
                )
        identity = Identity(kind=IdentityKind.NODE, name=node, cluster=self._cluster)
        pem = self._sign(public_key, node, [_uri(identity)], server=False)
        _write(path, pem, 0o600)
        return pem

    def _create(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Outrider fleet {self._cluster}")])
        builder = _builder(name, name, key.public_key(), _CA_VALID)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(ca=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        # The certificate first: a key on disk means that both are there.
        _write(self._directory / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(self._directory / "ca.key", _key_pem(key), 0o600)

    def _issue_files(self, stem: str, common_name: str, names: Sequence[x509.GeneralName], *, server: bool) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self._sign(key.public_key(), common_name, names, server=server)
        files = TlsFiles(
            ca=self._directory / f"{stem}.ca",
            certificate=self._directory / f"{stem}.crt",
            key=self._directory / f"{stem}.key",
        )
        _write(files.ca, self.pem, 0o644)
        _write(files.key, _key_pem(key), 0o600)
        # A server shows the CA too: a node that joins knows its fingerprint before it has the certificate.
        _write(files.certificate, pem + self.pem if server else pem, 0o644)
        return files

    def _sign(
        self, public_key: _PublicKey, common_name: str, names: Sequence[x509.GeneralName], *, server: bool
    ) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        builder = _builder(subject, self._certificate.subject, public_key, _LEAF_VALID)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: _PublicKey, valid: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _requested_key(csr_pem: bytes) -> _PublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        if not request.is_signature_valid:
            raise RefusedError("bad-csr", "the certificate request is not signed by its own key")
        public_key = request.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise RefusedError("bad-csr", f"the certificate request cannot be read: {error}") from error
    if isinstance(public_key, ec.EllipticCurvePublicKey) and public_key.curve.key_size >= 256:
        return public_key
    if isinstance(public_key, rsa.RSAPublicKey) and 2048 <= public_key.key_size <= 8192:
        return public_key
    raise RefusedError("bad-csr", "the certificate request's key is neither EC of 256 bits nor RSA of 2048 at least")


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("ca.key: expected an EC key")  # noqa: TRY004 - told as a bad file, like its siblings
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _uri(identity: Identity) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(identity.uri)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_alternative(name) for name in dict.fromkeys(names)]


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others for a moment."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
