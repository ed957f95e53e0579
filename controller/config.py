"""The controller's configuration file. Owns its keys and their checks; reads nothing else."""

import re
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from controller.ca import NODE_VALID_S
from outrider.config import host_port
from outrider.errors import ConfigError
from outrider.ids import NAME_PATTERN
from outrider.model.job import Packing, Value

_SOCKET_PATH_CHARS_MAX = 100  # sun_path holds 108

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
TcpPort = Annotated[int, msgspec.Meta(ge=1, le=65535)]

WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, never bound


def _host_name() -> str:
    """The host's own, as far as it can be a name."""
    name = re.sub("[^a-z0-9-]", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return name or "controller"


def _is_wildcard(listen: str) -> bool:
    return host_port(listen)[0] in WILDCARDS


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


class JournalKind(StrEnum):
    SQLITE = "sqlite"  # one controller, a file below `data`
    CONSUL = "consul"  # several controllers, one of which leads; its KV has the journal


class MqttConfig(Value, frozen=True, kw_only=True):
    """A broker that trusts the fleet's CA. Without one everything still works over gRPC."""

    host: str
    port: TcpPort = 8883


class SecretsConfig(Value, frozen=True, kw_only=True):
    """The key that secrets are sealed under. OUTRIDER_SECRETS_KEY in the environment goes before the file."""

    key_file: Path | None = None  # default: secrets.key below `data`; it is made where it is not there


class RateLimit(Value, frozen=True, kw_only=True):
    """Calls of one user, and of one address; root's on the controller's own socket are not counted."""

    per_s: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    burst: Annotated[float, msgspec.Meta(ge=1)] = 200.0


class Config(Value, frozen=True, kw_only=True):
    cluster: Name
    name: Name = msgspec.field(default_factory=_host_name)  # of this controller among those of the fleet
    data: Path
    listen: str  # FleetService and OperatorService, mTLS
    join_listen: str  # JoinService, and users with a token: TLS; the token proves the caller
    operator_socket: Path  # OperatorService on a unix socket of mode 0600
    metrics_listen: str | None = None  # plain HTTP: /metrics and /v1/discovery/prometheus
    targets_file: Path | None = None  # kept up to date for a Prometheus that discovers by file
    catalog: CatalogConfig = CatalogConfig()
    consul: ConsulConfig | None = None
    journal: JournalKind = JournalKind.SQLITE
    progress_listen: str = "127.0.0.1:0"  # where this host's Consul agent asks whether the controller gets on
    advertise: str | None = None  # where agents and other controllers reach this one; default: where it listens
    adopt_intentions: bool = False
    placement: Packing = Packing.SPREAD  # of jobs that do not say: copies and load apart, or one node after the other
    preemption: bool = True  # whether a job of higher priority may take the place of one of lower
    mqtt: MqttConfig | None = None
    secrets: SecretsConfig = SecretsConfig()
    log: Literal["debug", "info", "warning", "error"] = "info"
    rate_limit: RateLimit = RateLimit()
    node_certificate_valid_s: Annotated[float, msgspec.Meta(ge=60)] = NODE_VALID_S  # renewed at half life
    join_token_file: Path | None = None  # keep a join token for any node there: for a fleet on one machine
    addresses: tuple[str, ...] = ()  # more names and IP addresses for the server's certificate

    def __post_init__(self) -> None:
        for key in ("listen", "join_listen", "metrics_listen", "progress_listen"):
            _check_listen(key, getattr(self, key))
        if self.targets_file is not None and self.metrics_listen is None:
            raise ValueError("targets_file: needs `metrics_listen`, the controller's own figures are among the targets")
        if self.journal is JournalKind.CONSUL and self.advertise is None and _is_wildcard(self.listen):
            raise ValueError(
                f"advertise: with `journal: consul` and `listen: {self.listen}` say by which address "
                "agents and the other controllers reach this one"
            )
        _check_socket("operator_socket", self.operator_socket)

    @property
    def secrets_key_file(self) -> Path:
        return self.secrets.key_file or self.data / "secrets.key"

    @property
    def consul_or_local(self) -> ConsulConfig:
        """With the journal in Consul: the one that is named, else this host's own agent."""
        return self.consul or ConsulConfig(url="http://127.0.0.1:8500")

    @property
    def catalog_socket(self) -> Path:
        return self.catalog.socket or self.operator_socket.with_name("catalog.sock")


def with_journal(config: Config, journal: JournalKind) -> Config:
    """Raises ConfigError where the rest does not fit."""
    try:
        return msgspec.structs.replace(config, journal=journal)
    except ValueError as error:
        raise ConfigError(str(error)) from error
