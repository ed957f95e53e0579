"""The Connect CA signs what it was asked to, for the service that was authorized, and nothing else."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from controller.catalog.ca import ConnectCa, make_root
from outrider.errors import InputError
from outrider.ids import ServiceName
from outrider.model.mesh import spiffe_id

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CA = ConnectCa(make_root(NOW), "dc1")
WEB = ServiceName("web")
WEB_ID = spiffe_id(CA.trust_domain, "dc1", WEB)


def request(*uris: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=False)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def test_a_leaf_lives_for_consuls_three_days_and_was_valid_five_minutes_ago() -> None:
    leaf = CA.sign(WEB, request(WEB_ID), NOW)
    certificate = x509.load_pem_x509_certificate(leaf.certificate_pem.encode())
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + timedelta(hours=72)
    assert leaf.expires_at_s == (NOW + timedelta(hours=72)).timestamp()
    assert leaf.key_pem == ""
    assert leaf.serial == f"{certificate.serial_number:x}"
    certificate.verify_directly_issued_by(CA.certificate)


@pytest.mark.parametrize(
    ("csr", "why"),
    [
        (request(spiffe_id(CA.trust_domain, "dc1", ServiceName("api"))), "must ask for"),
        (request(spiffe_id("other.consul", "dc1", WEB)), "must ask for"),
        (request(WEB_ID, spiffe_id(CA.trust_domain, "dc1", ServiceName("api"))), "must ask for"),
        (request(), "no subject alternative name"),
        (request(WEB_ID, key=rsa.generate_private_key(65537, 2048)), "EC P-256"),
        (request(WEB_ID, key=ec.generate_private_key(ec.SECP384R1())), "EC P-256"),
        ("nonsense", "not a PEM"),
        ("x" * 20_000, "at most"),
    ],
)
def test_any_other_request_is_refused(csr: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        CA.sign(WEB, csr, NOW)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="not a name"):
        CA.sign(ServiceName("web/../api"), request(WEB_ID), NOW)
