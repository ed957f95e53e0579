"""Fetches a fleet's CA from a server that is known by nothing but the CA's fingerprint. Trusts nothing else of it."""

import hashlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from time import gmtime, strftime
from typing import Any

from outrider.clock import wall_s
from outrider.config import host_port
from outrider.errors import PeerError, RefusedError

_TIMEOUT_S = 10.0


def pinned_ca(address: str, sha256: str) -> str:
    """The CA that `address` shows in its TLS chain and that has the fingerprint, as PEM. Blocks.

    Raises PeerError where nobody answers or this host's clock is too far off, RefusedError where the chain holds no
    such CA: then it is another fleet.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint is what is checked
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(host_port(address), timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            # Public as `get_unverified_chain` from Python 3.13 on.
            chain: Sequence[Any] = secure._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]  # noqa: SLF001
    except OSError as error:
        raise PeerError(f"{address}: {error}") from error
    pinned = sha256.replace(":", "").lower()
    for certificate in chain:
        pem: str = certificate.public_bytes()
        if hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest() == pinned:
            _check_clock(address, chain[0].get_info())
            return pem
    raise RefusedError(
        "wrong-fleet",
        f"{address} shows no CA with fingerprint {sha256[:16]}...: it is another fleet, or its CA changed",
    )


def _check_clock(address: str, certificate: Mapping[str, str]) -> None:
    """TLS would say no more than that a certificate is not valid."""
    since_s, until_s = (ssl.cert_time_to_seconds(certificate[key]) for key in ("notBefore", "notAfter"))
    if not since_s <= wall_s() <= until_s:
        clock = strftime("%b %d %H:%M:%S %Y GMT", gmtime(wall_s()))
        raise PeerError(
            f"{address}: its certificate is valid from {certificate['notBefore']} until {certificate['notAfter']}, and "
            f"this host's clock says {clock}: set the clock that is wrong"
        )
