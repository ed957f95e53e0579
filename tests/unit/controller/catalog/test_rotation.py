"""The root's rotation: trusted first, signing then, and the old one trusted until its last leaf has ended."""

from datetime import UTC, datetime

from cryptography import x509

from controller.catalog.ca import (
    LEAF_LIFETIME,
    ConnectCa,
    make_root,
    trusted,
    with_next_root,
    with_next_root_signing,
)
from outrider.ids import ServiceName

NOW = datetime(2026, 11, 26, tzinfo=UTC)
WEB = ServiceName("web")


def test_the_next_root_is_trusted_before_it_signs_and_the_old_one_for_as_long_as_its_leaves_live() -> None:
    first = make_root(NOW)
    ca = ConnectCa(first, "dc1")
    offered = with_next_root(first, NOW)
    assert with_next_root(offered, NOW) == offered, "begun again, it is the same rotation"
    assert (offered.certificate_pem, offered.trust_domain) == (first.certificate_pem, first.trust_domain)
    assert trusted(offered) == (first.certificate_pem, offered.next_certificate_pem)

    second = with_next_root_signing(offered, NOW)
    ca.use(second)
    leaf = x509.load_pem_x509_certificate(ca.make(WEB, NOW).certificate_pem.encode())
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(offered.next_certificate_pem.encode()))
    assert trusted(second) == (offered.next_certificate_pem, first.certificate_pem)

    later = NOW + LEAF_LIFETIME
    third = with_next_root_signing(with_next_root(second, later), later)
    assert trusted(third) == (third.certificate_pem, second.certificate_pem), "nothing of the first one lives"
