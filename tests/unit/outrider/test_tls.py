"""Identities are read from certificates' URI names; what is no identity of a fleet is none."""

from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.tls import Identity, IdentityKind, TlsFiles, certificate_identity, parse_identity, ssl_context


@pytest.mark.parametrize(
    "identity",
    [
        Identity(kind=IdentityKind.NODE, name="n1", cluster="dev"),
        Identity(kind=IdentityKind.OPERATOR, name="ann", cluster="dev"),
        Identity(kind=IdentityKind.READER, name="prometheus", cluster="dev"),
        Identity(kind=IdentityKind.CONTROLLER, name="", cluster="dev"),
    ],
)
def test_an_identity_is_its_uri(identity: Identity) -> None:
    assert parse_identity(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://x/ns/default/dc/dc1/svc/web",
        "outrider://dev/node/",
        "outrider://dev/node/a/b",
        "outrider:///controller",
        "outrider://dev/controller/x",
        "outrider://dev/root/x",
        "x outrider://dev/node/n1",
        "outrider://dev/node/n1\n",
    ],
)
def test_anything_else_is_none(uri: str) -> None:
    assert parse_identity(uri) is None


def test_a_certificate_without_an_identity_has_none() -> None:
    assert certificate_identity(None) is None
    assert certificate_identity({"subjectAltName": (("DNS", "outrider://dev/node/n1"),)}) is None
    found = certificate_identity({"subjectAltName": (("DNS", "x"), ("URI", "outrider://dev/node/n1"))})
    assert found == Identity(kind=IdentityKind.NODE, name="n1", cluster="dev")


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    files = TlsFiles(ca=tmp_path / "ca", certificate=tmp_path / "crt", key=tmp_path / "key")
    with pytest.raises(ConfigError, match="cannot be used for TLS"):
        ssl_context(files, server=True)
