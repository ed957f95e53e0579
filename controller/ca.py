"""The fleet's CA: mTLS between processes (the mesh has a CA of its own). Files below DATA/ca, keys mode 0600.

Owns making and keeping certificates, and the CA's own change: `rotate` makes a successor which the one before signs too
(`cross.crt`), and from then on two roots are trusted until `retire`. Whoever knows only one of the two can follow every
chain, so that nobody must hear of the change first. Never decides who may join: `join` does, by its tokens.
"""

import datetime as dt
import hashlib
import ipaddress
import secrets
import ssl
from collections.abc import Sequence
from pathlib import Path

import msgspec
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
_SUCCESSOR = "successor"  # an Authority that is not yet in all of its files
_CLOCK_SKEW = dt.timedelta(minutes=5)

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class Issued(Value, frozen=True, kw_only=True):
    """A certificate, and what is told of it."""

    pem: bytes
    serial: str  # hexadecimal
    expires_at_s: float


class Authority(Value, frozen=True, kw_only=True):
    """Who signs, and who is trusted beside it meanwhile. `cross`: the certificate's name and key, by `previous`."""

    key_pem: bytes
    certificate_pem: bytes
    cross_pem: bytes = b""
    previous_pem: bytes = b""

    @property
    def roots(self) -> tuple[bytes, ...]:
        """The one that signs first."""
        return (self.certificate_pem, self.previous_pem) if self.previous_pem else (self.certificate_pem,)

    def __post_init__(self) -> None:
        if _private_key(self.key_pem).public_key() != self.certificate.public_key():
            raise ValueError("ca.key: it is not the key of ca.crt")

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate_pem)


class FleetCa:
    """One fleet's CA, made at the controller's first start."""

    def __init__(self, directory: Path, cluster: str, *, node_valid_s: float = NODE_VALID_S) -> None:
        """Raises HostError where the files cannot be read, made or do not fit each other."""
        self._directory = directory
        self._cluster = cluster
        self._node_valid = dt.timedelta(seconds=node_valid_s)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._authority = self._found() or self._made()
        except (OSError, ValueError) as error:
            hint = "restore the directory from a backup, or remove it: all nodes must join again then"
            raise HostError(str(directory), step=f"open the fleet's CA: {error}", hint=hint) from error

    @property
    def sha256(self) -> str:
        """The fingerprint of the certificate that signs, in hexadecimal: tokens carry it."""
        return pem_sha256(self._authority.certificate_pem.decode())

    @property
    def roots(self) -> tuple[str, ...]:
        """Who is trusted, as PEM: one, or two while the CA changes, the one that signs first."""
        return tuple(pem.decode() for pem in self._authority.roots)

    @property
    def roots_pem(self) -> bytes:
        return b"".join(self._authority.roots)

    @property
    def rotated_at_s(self) -> float | None:
        """Since when two roots are trusted; None: there is one."""
        path = self._directory / "previous.crt"
        return path.stat().st_mtime if self._authority.previous_pem else None

    def rotate(self) -> bool:
        """From here on a new CA signs, and both are trusted. False: two are trusted already. Raises OSError."""
        before = self._authority
        if before.previous_pem:
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        name = self._name()
        root = _root(name, name, key.public_key(), key)
        cross = _root(name, before.certificate.subject, key.public_key(), _private_key(before.key_pem), path_length=0)
        after = Authority(
            key_pem=_key_pem(key),
            certificate_pem=_pem(root),
            cross_pem=_pem(cross),
            previous_pem=before.certificate_pem,
        )
        # One file, then the files that it stands for: a crash between them is mended by the next start.
        write_file(self._directory / _SUCCESSOR, msgspec.msgpack.encode(after), 0o600)
        self._settle(after)
        return True

    def retire(self) -> bool:
        """From here on the newer root alone is trusted. False: so it is already. Raises OSError."""
        retired = bool(self._authority.previous_pem)
        self._authority = msgspec.structs.replace(self._authority, cross_pem=b"", previous_pem=b"")
        for name in ("previous.crt", "cross.crt"):
            (self._directory / name).unlink(missing_ok=True)
        return retired

    def reload(self) -> bool:
        """What another controller of the fleet made of it. False: nothing. Raises HostError as at the beginning."""
        before, self._authority = self._authority, self._found() or self._authority
        return before != self._authority

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

    def _found(self) -> Authority | None:
        """As the files say."""
        directory = self._directory
        if (directory / _SUCCESSOR).exists():
            self._settle(msgspec.msgpack.decode((directory / _SUCCESSOR).read_bytes(), type=Authority))
        if not (directory / "ca.key").exists():
            return None
        cross, previous = directory / "cross.crt", directory / "previous.crt"
        both = cross.exists() and previous.exists()
        return Authority(
            key_pem=(directory / "ca.key").read_bytes(),
            certificate_pem=(directory / "ca.crt").read_bytes(),
            cross_pem=cross.read_bytes() if both else b"",
            previous_pem=previous.read_bytes() if both else b"",
        )

    def _made(self) -> Authority:
        key, name = ec.generate_private_key(ec.SECP256R1()), self._name()
        made = Authority(key_pem=_key_pem(key), certificate_pem=_pem(_root(name, name, key.public_key(), key)))
        self._settle(made)
        return made

    def _settle(self, authority: Authority) -> None:
        if authority.previous_pem:
            write_file(self._directory / "previous.crt", authority.previous_pem, 0o644)
            write_file(self._directory / "cross.crt", authority.cross_pem, 0o644)
        # The certificate first: a key on disk means that both are there.
        write_file(self._directory / "ca.crt", authority.certificate_pem, 0o644)
        write_file(self._directory / "ca.key", authority.key_pem, 0o600)
        (self._directory / _SUCCESSOR).unlink(missing_ok=True)
        self._authority = authority

    def _name(self) -> x509.Name:
        """No two of a fleet have the same: chains are followed by it."""
        text = f"Outrider fleet {self._cluster} {secrets.token_hex(4)}"
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def _issue_files(self, stem: str, common_name: str, names: Sequence[x509.GeneralName], *, server: bool) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self._sign(key.public_key(), common_name, names, server=server, valid=_OWN_VALID).pem
        files = TlsFiles(
            ca=self._directory / f"{stem}.ca",
            certificate=self._directory / f"{stem}.crt",
            key=self._directory / f"{stem}.key",
        )
        write_file(files.ca, self.roots_pem, 0o644)
        write_file(files.key, _key_pem(key), 0o600)
        # A server shows the CA too: a node that joins knows its fingerprint before it has the certificate. The
        # certificate comes last: who watches the files looks at that one.
        write_file(files.certificate, pem + self.roots_pem if server else pem, 0o644)
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
        authority = self._authority
        signing_key = _private_key(authority.key_pem)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        builder = _builder(subject, authority.certificate.subject, public_key, valid)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
        )
        signed = builder.sign(signing_key, hashes.SHA256())
        return Issued(
            pem=_pem(signed) + authority.cross_pem,  # by which those who know only the previous root follow
            serial=f"{signed.serial_number:x}",
            expires_at_s=signed.not_valid_after_utc.timestamp(),
        )


def pem_sha256(pem: str) -> str:
    """A certificate's fingerprint, in hexadecimal."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def _root(
    name: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    path_length: int = 1,  # room for a successor that it signs
) -> x509.Certificate:
    builder = _builder(name, issuer, public_key, _CA_VALID)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    builder = builder.add_extension(_key_usage(ca=True), critical=True)
    return builder.sign(signing_key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


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
