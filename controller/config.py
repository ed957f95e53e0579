"""The controller's configuration file. Owns its keys and their checks; reads nothing else."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from outrider.config import host_port
from outrider.ids import NAME_PATTERN
from outrider.model.job import Value

_SOCKET_PATH_CHARS_MAX = 100  # sun_path holds 108

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
TcpPort = Annotated[int, msgspec.Meta(ge=1, le=65535)]


def _check_listen(key: str, text: str | None) -> None:
    if text is not None:
        try:
            host_port(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def _check_socket(key: str, path: Path | None) -> None:
    if path is not None and len(str(path)) > _SOCKET_PATH_CHARS_MAX:
        raise ValueError(f"{key}: {path} has more than {_SOCKET_PATH_CHARS_MAX} characters; use a directory below /run")


class CatalogConfig(Value, frozen=True, kw_only=True):
    """The embedded Consul API: mTLS on `listen`, and without TLS on a unix socket of mode 0600."""

    socket: Path | None = None  # default: catalog.sock beside the operator's socket
    listen: str | None = None

    def __post_init__(self) -> None:
        _check_listen("listen", self.listen)
        _check_socket("socket", self.socket)


class ConsulConfig(Value, frozen=True, kw_only=True):
    """A real Consul instead of the embedded catalog."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^/]+/?$")]
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file come together or not at all")


class MqttConfig(Value, frozen=True, kw_only=True):
    """A broker that trusts the fleet's CA. Without one everything still works over gRPC."""

    host: str
    port: TcpPort = 8883


class Config(Value, frozen=True, kw_only=True):
    cluster: Name
    data: Path
    listen: str  # FleetService and OperatorService, mTLS
    join_listen: str  # JoinService: TLS; the token proves the caller
    operator_socket: Path  # OperatorService on a unix socket of mode 0600
    metrics_listen: str | None = None  # plain HTTP: /metrics and /v1/discovery/prometheus
    catalog: CatalogConfig = CatalogConfig()
    consul: ConsulConfig | None = None
    adopt_intentions: bool = False
    mqtt: MqttConfig | None = None
    log: Literal["debug", "info", "warning", "error"] = "info"
    addresses: tuple[str, ...] = ()  # more names and IP addresses for the server's certificate

    def __post_init__(self) -> None:
        for key in ("listen", "join_listen", "metrics_listen"):
            _check_listen(key, getattr(self, key))
        _check_socket("operator_socket", self.operator_socket)

    @property
    def catalog_socket(self) -> Path:
        return self.catalog.socket or self.operator_socket.with_name("catalog.sock")
