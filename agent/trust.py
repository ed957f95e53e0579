"""Whom this node trusts, and whose its own certificate is. Reads and writes the files of both; asks nobody."""

import hashlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from agent.join import write_secret
from outrider.errors import ConfigError, InputError
from outrider.model.job import Value
from outrider.tls import TlsFiles


class Trusting(Value, frozen=True, kw_only=True):
    """Fingerprints. `issuer_sha256`: "" where the certificate is of none of the roots."""

    roots_sha256: tuple[str, ...]
    issuer_sha256: str


class Told(Value, frozen=True, kw_only=True):
    """What the controller says: whom to trust, and whose certificates are to be."""

    roots_pem: bytes
    issuer_sha256: str


def trusting(files: TlsFiles) -> Trusting:
    """As the files say. Raises ConfigError where they cannot be read."""
    try:
        roots = x509.load_pem_x509_certificates(files.ca.read_bytes())
        own = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{files.certificate}: {error}; remove it to join again") from error
    issuers = [_sha256(root) for root in roots if _issued(own, root)]
    return Trusting(roots_sha256=tuple(map(_sha256, roots)), issuer_sha256=issuers[0] if issuers else "")


def told(roots_pem: Sequence[str], issuer_sha256: str) -> Told:
    """Raises InputError where a root is none, or the issuer is not among them."""
    try:
        roots = [x509.load_pem_x509_certificate(pem.encode()) for pem in roots_pem]
    except ValueError as error:
        raise InputError(f"the controller names a root that is no certificate: {error}") from error
    if issuer_sha256 not in map(_sha256, roots):
        raise InputError("the controller names roots, and an issuer that is none of them")
    content = b"".join(root.public_bytes(serialization.Encoding.PEM) for root in roots)
    return Told(roots_pem=content, issuer_sha256=issuer_sha256)


def trust(files: TlsFiles, wanted: Told) -> bool:
    """From here on these roots, and no others. False: so it is already. Raises OSError."""
    if files.ca.exists() and files.ca.read_bytes() == wanted.roots_pem:
        return False
    write_secret(files.ca, wanted.roots_pem, 0o644)
    return True


def _issued(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _sha256(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
