"""A server that is known by its CA's fingerprint alone: whoever shows another, or meets a clock that is wrong."""

import contextlib
import datetime as dt
import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outrider.errors import PeerError, RefusedError
from outrider.pinned import pinned_ca


def certificate(directory: Path, *, since: dt.timedelta) -> Path:
    """Signed by itself, with its key in the same file; valid for a day from `since` on, seen from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller.outrider")])
    begins = dt.datetime.now(dt.UTC) + since
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begins).not_valid_after(begins + dt.timedelta(days=1))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path = directory / "server.pem"
    path.write_bytes(
        pem
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@contextlib.contextmanager
def server(path: Path) -> Iterator[str]:
    """Its address. It meets one caller, who leaves without a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def meet() -> None:
            caller, _ = listening.accept()
            with contextlib.suppress(OSError), context.wrap_socket(caller, server_side=True) as met:
                met.recv(1)

        thread = threading.Thread(target=meet)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            thread.join()


def fingerprint(path: Path) -> str:
    pem = path.read_text().partition("-----END CERTIFICATE-----")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[0] + pem[1])).hexdigest()


def test_the_ca_with_the_fingerprint_is_taken_and_no_other(tmp_path: Path) -> None:
    path = certificate(tmp_path, since=dt.timedelta(hours=-1))
    with server(path) as address:
        assert (
            fingerprint(path)
            == hashlib.sha256(ssl.PEM_cert_to_DER_cert(pinned_ca(address, fingerprint(path)))).hexdigest()
        )
    with server(path) as address, pytest.raises(RefusedError, match="shows no CA with fingerprint 0000000000000000"):
        pinned_ca(address, "00" * 32)


@pytest.mark.parametrize("hours", [1, -25], ids=["an hour behind", "an hour ahead"])
def test_a_clock_that_is_off_is_told_as_such(hours: int, tmp_path: Path) -> None:
    path = certificate(tmp_path, since=dt.timedelta(hours=hours))
    with server(path) as address, pytest.raises(PeerError, match=r"this host's clock says .* GMT: set the clock"):
        pinned_ca(address, fingerprint(path))
