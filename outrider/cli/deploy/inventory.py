"""hosts.yaml: which hosts become what, and how they are reached. Owns its keys and their checks; touches no host."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from outrider.config import load
from outrider.errors import ConfigError
from outrider.ids import NAME_PATTERN
from outrider.model.job import Value

FLEET_PORT, JOIN_PORT, METRICS_PORT, AGENT_METRICS_PORT = 7070, 7071, 7072, 9464

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Role = Literal["agent", "controller"]


class Ssh(Value, frozen=True, kw_only=True):
    """How hosts are reached. The agent, the keys and ~/.ssh/config of whoever deploys are used too."""

    user: str | None = None
    port: Port | None = None
    identity: Path | None = None  # a private key
    known_hosts: Path | None = None  # default: ~/.ssh/known_hosts
    password_file: Path | None = None
    sudo: bool = False  # `sudo -n`; not needed where the user is root


class Host(Value, frozen=True, kw_only=True):
    host: str  # name or address, as SSH reaches it
    name: Name | None = None  # of the node; default: the first label of `host`
    address: str | None = None  # where other nodes and agents reach it; default: `host`
    roles: tuple[Role, ...] = ("agent",)
    agent: Mapping[str, Any] = {}  # more keys of its agent.yaml, over those for all
    controller: Mapping[str, Any] = {}
    ssh: Ssh = Ssh()  # over the one for all

    @property
    def node(self) -> str:
        return self.name or self.host.split(".")[0].lower()

    @property
    def reached_at(self) -> str:
        return self.address or self.host


class Inventory(Value, frozen=True, kw_only=True):
    cluster: Name
    hosts: tuple[Host, ...]
    controllers: tuple[str, ...] = ()  # HOST or HOST:PORT of those that are not among `hosts`
    ssh: Ssh = Ssh()
    agent: Mapping[str, Any] = {}  # more keys of every agent.yaml
    controller: Mapping[str, Any] = {}

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("hosts: name one at least")
        for kind, names in (("host", [h.host for h in self.hosts]), ("name", [h.node for h in self.hosts])):
            doubled = next((name for name in names if names.count(name) > 1), None)
            if doubled is not None:
                raise ValueError(f"hosts: two have the {kind} {doubled!r}")

    @property
    def controller_hosts(self) -> tuple[Host, ...]:
        return tuple(host for host in self.hosts if "controller" in host.roles)

    def controller_addresses(self, port: int) -> tuple[str, ...]:
        own = tuple(f"{host.reached_at}:{port}" for host in self.controller_hosts)
        return own or tuple(_with_port(each, port) for each in self.controllers)


def read_inventory(path: Path) -> Inventory:
    """Raises ConfigError, which names the key."""
    inventory = load(path, Inventory)
    if not inventory.controller_hosts and not inventory.controllers:
        raise ConfigError(f"{path}: hosts: none has the role controller; then `controllers` says where they are")
    return inventory


def _with_port(address: str, port: int) -> str:
    """`port` belongs to another service of the same controller than the one that the address may name."""
    return f"{address.partition(':')[0]}:{port}"
