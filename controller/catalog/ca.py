"""The embedded Connect CA: the mesh's trust domain, its root, and the leaves it signs.

No I/O: the catalog keeps the row.
"""

import uuid
from datetime import UTC, datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.catalog.rows import CaRow, RetiredRoot
from outrider.errors import InputError
from outrider.ids import ServiceName, is_name
from outrider.model.mesh import Leaf, spiffe_id

LEAF_LIFETIME = timedelta(hours=72)  # Consul's default
_ROOT_LIFETIME = timedelta(days=3650)
_BACKDATED = timedelta(minutes=5)  # nodes' clocks differ
_CSR_CHARS_MAX = 16_384


def make_root(now: datetime, trust_domain: str = "") -> CaRow:
    """A new key, and a new trust domain where none is given: Consul's form, so that Consul's own proxies accept it."""
    trust_domain = trust_domain or f"{uuid.uuid4()}.consul"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Outrider Connect CA {trust_domain[:8]}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return CaRow(trust_domain=trust_domain, certificate_pem=_pem(certificate), key_pem=_key_pem(key))


def with_next_root(row: CaRow, now: datetime) -> CaRow:
    """The first half of a rotation: another root that is trusted, and does not sign yet. Again changes nothing."""
    if row.next_certificate_pem:
        return row
    made = make_root(now, row.trust_domain)
    return msgspec.structs.replace(row, next_certificate_pem=made.certificate_pem, next_key_pem=made.key_pem)


def with_next_root_signing(row: CaRow, now: datetime) -> CaRow:
    """The second half, once everybody trusts the next root: it signs, and the old one's leaves live on."""
    assert row.next_certificate_pem, "a rotation begins with `with_next_root`"
    until_s = (now + LEAF_LIFETIME).timestamp()
    old = RetiredRoot(certificate_pem=row.certificate_pem, until_s=until_s)
    return CaRow(
        trust_domain=row.trust_domain,
        certificate_pem=row.next_certificate_pem,
        key_pem=row.next_key_pem,
        retired=(old, *(root for root in row.retired if root.until_s > now.timestamp())),
    )


def trusted(row: CaRow) -> tuple[str, ...]:
    """All roots, the one that signs first."""
    following = (row.next_certificate_pem,) if row.next_certificate_pem else ()
    return (row.certificate_pem, *following, *(root.certificate_pem for root in row.retired))


class ConnectCa:
    """Signs leaves with the root of the row that it was given last."""

    def __init__(self, row: CaRow, datacenter: str) -> None:
        self.datacenter = datacenter
        self.use(row)

    def use(self, row: CaRow) -> None:
        self.trust_domain = row.trust_domain
        self.certificate_pem = row.certificate_pem
        self.certificate = x509.load_pem_x509_certificate(row.certificate_pem.encode())
        key = serialization.load_pem_private_key(row.key_pem.encode(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    def sign(self, service: ServiceName, csr_pem: str, now: datetime) -> Leaf:
        """A leaf for the key of `csr_pem`, which must ask for exactly this service's SPIFFE name. Raises InputError."""
        if not is_name(service):
            raise InputError(f"service {service!r}: not a name")
        request = _parse(csr_pem)
        wanted = spiffe_id(self.trust_domain, self.datacenter, service)
        asked = _names(request)
        if asked != [wanted]:
            raise InputError(f"certificate request for {service}: asks for {asked}, must ask for {wanted} alone")
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InputError(f"certificate request for {service}: the key must be EC P-256")
        return self._leaf(service, key, wanted, now)

    def make(self, service: ServiceName, now: datetime) -> Leaf:
        """A leaf with a key made here: only for an operator who asks for one, as Consul's agent does."""
        if not is_name(service):
            raise InputError(f"service {service!r}: not a name")
        key = ec.generate_private_key(ec.SECP256R1())
        uri = spiffe_id(self.trust_domain, self.datacenter, service)
        leaf = self._leaf(service, key.public_key(), uri, now)
        return Leaf(
            service=service,
            certificate_pem=leaf.certificate_pem,
            key_pem=_key_pem(key),
            expires_at_s=leaf.expires_at_s,
            serial=leaf.serial,
        )

    def _leaf(self, service: ServiceName, key: ec.EllipticCurvePublicKey, uri: str, now: datetime) -> Leaf:
        until = min(now + LEAF_LIFETIME, self.certificate.not_valid_after_utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(
            service=service,
            certificate_pem=_pem(certificate),
            expires_at_s=certificate.not_valid_after_utc.timestamp(),
            serial=f"{certificate.serial_number:x}",
        )


def certificate_window(pem: str) -> tuple[datetime, datetime]:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return certificate.not_valid_before_utc.astimezone(UTC), certificate.not_valid_after_utc.astimezone(UTC)


def _parse(csr_pem: str) -> x509.CertificateSigningRequest:
    if len(csr_pem) > _CSR_CHARS_MAX:
        raise InputError(f"certificate request: {len(csr_pem)} characters, at most {_CSR_CHARS_MAX} are read")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        valid = request.is_signature_valid
    except (ValueError, InvalidSignature) as error:
        raise InputError(f"certificate request: not a PEM of one: {error}") from error
    if not valid:
        raise InputError("certificate request: it is not signed by the key that it names")
    return request


def _names(request: x509.CertificateSigningRequest) -> list[str]:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise InputError("certificate request: no subject alternative name") from error
    return [str(name.value) for name in names]


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        key_encipherment=not signs_certificates,
        key_agreement=not signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
