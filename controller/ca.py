"""The fleet's CA: mTLS between processes (the mesh has a CA of its own). Files below DATA/ca, keys mode 0600.

Owns making and keeping certificates. Never decides who may join: `join` does, by its tokens.
"""

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.files import write_file
from outrider.broker import CONTROLLER_USER, OPERATOR_USER
from outrider.errors import HostError, RefusedError
from outrider.ids import NodeId
from outrider.model.job import Value
from outrider.tls import CONTROLLER_NAME, Identity, IdentityKind, TlsFiles

NODE_VALID_S = 7 * 24 * 3600.0  # renewed at half life
_CA_VALID = dt.timedelta(days=3650)
_OWN_VALID = dt.timedelta(days=365)  # made anew at each start
_USER_VALID = dt.timedelta(days=30)
_CLOCK_SKEW = dt.timedelta(minutes=5)

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class Issued(Value, frozen=True, kw_only=True):
    """A certificate, and what is told of it."""

    pem: bytes
    serial: str  # hexadecimal
    expires_at_s: float


class FleetCa:
    """One fleet's CA, made at the controller's first start."""

    def __init__(self, directory: Path, cluster: str, *, node_valid_s: float = NODE_VALID_S) -> None:
        """Raises HostError where the files cannot be read, made or do not fit each other."""
        self._directory = directory
        self._cluster = cluster
        self._node_valid = dt.timedelta(seconds=node_valid_s)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (directory / "ca.key").exists():
                self._create()
            self._key = _private_key((directory / "ca.key").read_bytes())
            self._certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        except (OSError, ValueError) as error:
            hint = "restore the directory from a backup, or remove it: all nodes must join again then"
            raise HostError(str(directory), step=f"open the fleet's CA: {error}", hint=hint) from error

    @property
    def sha256(self) -> str:
        """The CA certificate's fingerprint, in hexadecimal: tokens carry it."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

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

    def issue_node(self, csr_pem: bytes, node: NodeId) -> Issued:
        """A node's certificate for the key of `csr_pem`; what else the request asks for is ignored.

        Raises RefusedError where the request is malformed.
        """
        identity = Identity(kind=IdentityKind.NODE, name=node, cluster=self._cluster)
        # Agents take guests from each other: a server too, and by its one name no controller and no broker.
        return self._sign(requested_key(csr_pem), node, [_uri(identity)], server=True, valid=self._node_valid)

    def issue_user(self, csr_pem: bytes, user: str) -> Issued:
        """A user's; to the broker all of them are one. Raises RefusedError as `issue_node` does."""
        identity = Identity(kind=IdentityKind.USER, name=user, cluster=self._cluster)
        return self._sign(requested_key(csr_pem), "@user", [_uri(identity)], server=False, valid=_USER_VALID)

    def _create(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Outrider fleet {self._cluster}")])
        builder = _builder(name, name, key.public_key(), _CA_VALID)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(ca=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        # The certificate first: a key on disk means that both are there.
        write_file(self._directory / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        write_file(self._directory / "ca.key", _key_pem(key), 0o600)

    def _issue_files(self, stem: str, common_name: str, names: Sequence[x509.GeneralName], *, server: bool) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self._sign(key.public_key(), common_name, names, server=server, valid=_OWN_VALID).pem
        files = TlsFiles(
            ca=self._directory / f"{stem}.ca",
            certificate=self._directory / f"{stem}.crt",
            key=self._directory / f"{stem}.key",
        )
        write_file(files.ca, self.pem, 0o644)
        write_file(files.key, _key_pem(key), 0o600)
        # A server shows the CA too: a node that joins knows its fingerprint before it has the certificate.
        write_file(files.certificate, pem + self.pem if server else pem, 0o644)
        return files

    def _sign(
        self,
        public_key: _PublicKey,
        common_name: str,
        names: Sequence[x509.GeneralName],
        *,
        server: bool,
        valid: dt.timedelta,
    ) -> Issued:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        builder = _builder(subject, self._certificate.subject, public_key, valid)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        signed = builder.sign(self._key, hashes.SHA256())
        return Issued(
            pem=signed.public_bytes(serialization.Encoding.PEM),
            serial=f"{signed.serial_number:x}",
            expires_at_s=signed.not_valid_after_utc.timestamp(),
        )


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


def requested_key(csr_pem: bytes) -> _PublicKey:
    """The key that the request proves to hold. Raises RefusedError("bad-csr")."""
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
