"""mTLS within a fleet: credentials from files, and who a peer's certificate says it is.

Fleet certificates carry their identity as a URI SAN: `outrider://CLUSTER/node/NODE`, `.../operator/NAME`,
`.../user/NAME`, `.../reader/NAME` and `outrider://CLUSTER/controller`. Owns no certificate and no key:
`controller/ca.py` makes them.
"""

import re
import ssl
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from outrider.errors import ConfigError
from outrider.model.job import Value

# A DNS name in every controller's certificate: whoever trusts the fleet's CA need not know the controller's addresses.
CONTROLLER_NAME = "controller.outrider"

_IDENTITY = re.compile(
    r"^outrider://(?P<cluster>[^/]+)/(?:(?P<kind>node|operator|user|reader)/(?P<name>[^/\s]+)|controller)\Z"
)


class IdentityKind(StrEnum):
    OPERATOR = "operator"  # made by the controller for whoever is root on its host
    USER = "user"  # a person or a program: what they may do, their roles say
    NODE = "node"
    CONTROLLER = "controller"
    READER = "reader"  # may read metrics and the catalog: Prometheus


class Identity(Value, frozen=True, kw_only=True):
    """Who a certificate of the fleet's CA names."""

    kind: IdentityKind
    name: str  # a controller's is ""
    cluster: str

    @property
    def uri(self) -> str:
        tail = f"{self.kind}/{self.name}" if self.name else self.kind
        return f"outrider://{self.cluster}/{tail}"


class TlsFiles(Value, frozen=True, kw_only=True):
    """PEM files: the fleet CA that peers must come from, and the own certificate and key."""

    ca: Path
    certificate: Path
    key: Path


def server_credentials(files: TlsFiles, *, client_certificate: bool = True) -> grpc.ServerCredentials:
    """For a gRPC listener. Without `client_certificate` anybody may connect: for JoinService alone.

    Files that change hold from the next handshake on; their certificate must be written last.
    """
    known = _changed(files)

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = (_read(files.key), _read(files.certificate))
        roots = _read(files.ca) if client_certificate else None
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal known
        if (now := _changed(files)) == known:
            return None
        known = now
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        newer,  # type: ignore[arg-type]  # None keeps the present one: grpc's own documentation says so, its stubs do not
        client_certificate,
    )


def channel(
    target: str,
    files: TlsFiles,
    *,
    server_name: str = CONTROLLER_NAME,
    options: Mapping[str, int | str] | None = None,
) -> grpc.aio.Channel:
    """A channel to a controller at `target` ("host:port"): it must prove with its certificate that it is one."""
    credentials = grpc.ssl_channel_credentials(_read(files.ca), _read(files.key), _read(files.certificate))
    return _channel(target, credentials, server_name, options)


def joining_channel(target: str, ca: Path) -> grpc.aio.Channel:
    """A channel to JoinService: the controller proves who it is; the caller has only its token."""
    return _channel(target, grpc.ssl_channel_credentials(_read(ca)), CONTROLLER_NAME, None)


def ssl_context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """For aiohttp and aiomqtt, either side. Both sides must show a certificate of the fleet's CA.

    A server's files may change: each connection is judged by those that are there then. A client makes a new one.
    """
    context = _context(files, server=server)
    if server:

        def newest(connection: ssl.SSLObject, _name: str | None, _before: ssl.SSLContext) -> None:
            connection.context = _context(files, server=True)

        context.sni_callback = newest
    return context


def _context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if server:  # a resumed session would not be judged at all
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=files.ca)
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{files.certificate}: cannot be used for TLS: {error}") from error
    return context


def peer_identity(context: "grpc.aio.ServicerContext[Any, Any]") -> Identity | None:
    """Who calls, by the certificate that TLS has verified. None: no certificate of a fleet."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return _first(name.decode(errors="replace") for name in names)


def certificate_identity(certificate: Mapping[str, Any] | None) -> Identity | None:
    """The same from `SSLObject.getpeercert()`, for HTTP servers."""
    return _first(value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI")


def parse_identity(uri: str) -> Identity | None:
    """None: `uri` is no identity of a fleet."""
    match = _IDENTITY.match(uri)
    if match is None:
        return None
    kind = IdentityKind(match["kind"] or IdentityKind.CONTROLLER)
    return Identity(kind=kind, name=match["name"] or "", cluster=match["cluster"])


def _first(uris: Any) -> Identity | None:
    return next((identity for uri in uris if (identity := parse_identity(uri)) is not None), None)


def _channel(
    target: str, credentials: grpc.ChannelCredentials, server_name: str, options: Mapping[str, int | str] | None
) -> grpc.aio.Channel:
    arguments: dict[str, int | str] = {"grpc.ssl_target_name_override": server_name, **(options or {})}
    return grpc.aio.secure_channel(target, credentials, options=tuple(arguments.items()))


def _changed(files: TlsFiles) -> tuple[int, int]:
    try:
        found = files.certificate.stat()
    except OSError as error:
        raise ConfigError(f"{files.certificate}: cannot be read: {error.strerror}") from error
    return found.st_ino, found.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
