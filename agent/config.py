"""The agent's configuration file. Owns its keys and their checks; reads nothing else."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.pull.gate import ImagePolicy
from outrider.belongings import CAPABILITIES
from outrider.config import host_port
from outrider.ids import NAME_PATTERN, NodeId
from outrider.model.job import MIB, Value
from outrider.model.node import ANY_POOL, KVM, Reserved
from outrider.tls import TlsFiles

# The longest path below `run` is a socket's, and sun_path holds 108.
_RUN_CHARS_MAX = 48

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
MetaName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$")]
TcpPort = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class JoinConfig(Value, frozen=True, kw_only=True):
    """How a node without a certificate gets one. The CA's fingerprint is in the token: it meets no stranger."""

    address: str
    ca_sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F:]{64,95}$")] | None = None  # instead of the token's
    token: str | None = None
    token_file: Path | None = None

    def __post_init__(self) -> None:
        _check_host_port("address", self.address)
        if (self.token is None) == (self.token_file is None):
            raise ValueError("token or token_file: give exactly one")


class MqttConfig(Value, frozen=True, kw_only=True):
    """A broker that trusts the fleet's CA."""

    host: str
    port: TcpPort = 8883


class ImagesConfig(Value, frozen=True, kw_only=True):
    """Container images. `auth_file`: as `skopeo login` writes it. `certificates`: holds HOST:PORT/ca.crt."""

    auth_file: Path | None = None
    certificates: Path | None = None
    policy: ImagePolicy = ImagePolicy()
    cache_bytes: Annotated[int, msgspec.Meta(ge=1)] = 20 * 1024 * MIB  # of all; what runs may exceed it


class GuestConfig(Value, frozen=True, kw_only=True):
    """What processes with `isolation: vm` boot. `modules`: of the kernel, searched for those that it lacks."""

    kernel: Path
    modules: Path | None = None
    busybox: Path = Path("/bin/busybox")  # the static one
    agent: Path = Path("/usr/sbin/qemu-ga")  # absent: nothing can be run beside them


class PortRange(Value, frozen=True, kw_only=True):
    """The host ports that the scheduler may give out, both ends included."""

    first: TcpPort = 20000
    last: TcpPort = 29999

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"first: {self.first} is above last, {self.last}")


class TracesConfig(Value, frozen=True, kw_only=True):
    """Where sidecars send spans: a collector that speaks OTLP over gRPC, in the clear; best one of this host."""

    otlp: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0  # of the requests whose caller has not decided

    def __post_init__(self) -> None:
        _check_host_port("otlp", self.otlp)
        try:
            ipaddress.IPv4Address(host_port(self.otlp)[0])
        except ValueError as error:
            raise ValueError(f"otlp: {error}; sidecars resolve no names") from error


class Config(Value, frozen=True, kw_only=True):
    cluster: Name
    node: Name
    data: Path  # durable: certificates, records, logs
    run: Path  # volatile, below /run: sockets, namespaces
    address: str  # where other nodes reach this one's sidecars
    controllers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    join: JoinConfig | None = None
    peer_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # where other agents bring guests; 0: any that is free
    metrics_listen: str | None = None  # plain HTTP
    mqtt: MqttConfig | None = None
    traces: TracesConfig | None = None
    host_image: bool = False  # whether jobs may use `image: host` here
    pool: Name = "default"
    meta: Mapping[MetaName, str] = {}  # jobs' constraints speak of meta.NAME
    devices: Mapping[Name, Annotated[int, msgspec.Meta(ge=1)]] = {}  # name -> how many the node has
    reserved: Reserved = Reserved()  # of what the node has, never given to workloads
    ports: PortRange = PortRange()
    images: ImagesConfig = ImagesConfig()
    artifact_cache_bytes: Annotated[int, msgspec.Meta(ge=1)] = 5 * 1024 * MIB  # of all; and at most so much of one
    device_files: Mapping[Name, tuple[Path, ...]] = {}  # of `devices`: one file for each that it counts
    capabilities: tuple[str, ...] = ()  # that a task may have where it asks
    guest: GuestConfig | None = None
    volume_paths: tuple[Path, ...] = ()  # below these, a volume may be a directory of this node
    log: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for controller in self.controllers:
            _check_host_port("controllers", controller)
        if self.metrics_listen is not None:
            _check_host_port("metrics_listen", self.metrics_listen)
        try:
            ipaddress.IPv4Address(self.address)
        except ValueError as error:
            raise ValueError(f"address: {error}") from error
        if self.pool == ANY_POOL:
            raise ValueError(f"pool: {ANY_POOL!r} is how a job names every pool; choose another name")
        if KVM in self.devices:
            raise ValueError(f"devices: {KVM} is found by a test of its own; leave it out")
        for name, files in self.device_files.items():
            if len(files) != self.devices.get(name, 0):
                message = f"{len(files)} files for {self.devices.get(name, 0)} devices: one for each"
                raise ValueError(f"device_files: {name}: {message}")
        unknown = set(self.capabilities) - CAPABILITIES
        if unknown:
            known = ", ".join(sorted(CAPABILITIES))
            raise ValueError(f"capabilities: {', '.join(sorted(unknown))}: no task can have that; known are {known}")
        least = min(self.reserved.cpu_millis, self.reserved.memory_bytes, self.reserved.disk_bytes)
        if least < 0 or not all(1 <= port <= 65535 for port in self.reserved.ports):
            raise ValueError("reserved: amounts are not negative, and ports are within 1 and 65535")
        if len(str(self.run)) > _RUN_CHARS_MAX:
            raise ValueError(f"run: {self.run} has more than {_RUN_CHARS_MAX} characters; use a directory below /run")

    @property
    def node_id(self) -> NodeId:
        return NodeId(self.node)

    @property
    def tls(self) -> TlsFiles:
        """The node's credentials, made by joining."""
        return TlsFiles(ca=self.data / "ca.crt", certificate=self.data / "node.crt", key=self.data / "node.key")


def _check_host_port(key: str, text: str) -> None:
    try:
        host_port(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
