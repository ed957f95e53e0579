"""The fleet's CA: certificates say who somebody is, keys stay closed, and nobody takes another node's name."""

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.ca import FleetCa
from outrider.errors import HostError, RefusedError
from outrider.ids import NodeId
from outrider.tls import IdentityKind, parse_identity

N1 = NodeId("n1")


def _csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None, name: str = "anything") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    request = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _uris(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_keys_are_closed_and_the_ca_is_the_same_after_a_restart(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    ca.issue_server(["10.0.0.1", "controller.example"])
    ca.issue_operator("cli")
    for key in (tmp_path / "ca").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert FleetCa(tmp_path / "ca", "dev").roots_pem == ca.roots_pem


def test_a_node_is_who_the_ca_says_not_who_it_asks_to_be(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    pem = ca.issue_node(_csr(name="@controller"), N1).pem
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "n1"
    (uri,) = _uris(certificate)
    identity = parse_identity(uri)
    assert identity is not None
    assert (identity.kind, identity.name, identity.cluster) == (IdentityKind.NODE, "n1", "dev")
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(uri)], "no host's name: it poses as no other server"
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.roots_pem))


def test_a_users_certificate_names_the_user_and_is_short_lived(tmp_path: Path) -> None:
    issued = FleetCa(tmp_path / "ca", "dev").issue_user(_csr(name="root"), "alice")
    certificate = x509.load_pem_x509_certificate(issued.pem)
    assert _uris(certificate) == ["outrider://dev/user/alice"]
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "@user"
    assert certificate.not_valid_after_utc.timestamp() == issued.expires_at_s
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < dt.timedelta(days=31)


def test_a_bad_request_is_refused(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    tampered = _csr().replace(b"MI", b"MJ", 1)
    weak = _csr(rsa.generate_private_key(65537, 1024))  # noqa: S505 - to be refused
    for csr in (b"", b"garbage", tampered, weak, _csr(ec.generate_private_key(ec.SECP224R1()))):
        with pytest.raises(RefusedError, match="certificate request"):
            ca.issue_node(csr, N1)


def test_a_request_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    der = bytearray(x509.load_pem_x509_csr(_csr()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    request = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(RefusedError, match="not signed by its own key"):
        FleetCa(tmp_path / "ca", "dev").issue_node(request, N1)


def test_a_server_shows_the_ca_in_its_chain(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    chain = x509.load_pem_x509_certificates(ca.issue_server([]).certificate.read_bytes())
    assert chain[1] == x509.load_pem_x509_certificate(ca.roots_pem)


def test_a_broken_directory_is_named(tmp_path: Path) -> None:
    FleetCa(tmp_path / "ca", "dev")
    (tmp_path / "ca/ca.key").write_text("garbage")
    with pytest.raises(HostError, match="open the fleet's CA"):
        FleetCa(tmp_path / "ca", "dev")
