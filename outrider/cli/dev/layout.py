"""Where a dev fleet's things are, derived from its name alone, and the record by which `dev down` finds it.

Two fleets never collide: every path, namespace and cgroup carries the name. Owns no process.
"""

import os
from pathlib import Path

import msgspec

from outrider.cli.address import RUN_DIRECTORY
from outrider.errors import InputError
from outrider.ids import NodeId, is_name
from outrider.model.job import Value

NODES_MAX = 50
_NAME_CHARS_MAX = 24  # sockets' paths below the run directory stay below their limit
_DATA_DIRECTORY = Path("/var/lib/outrider")
_RECORD = "fleet.json"
_RESERVED = {"claims"}  # the agents' directory beside the fleets' own

CONTROL_ADDRESS = "10.99.0.1"
NETWORK_BITS = 24
FLEET_PORT = 7070
JOIN_PORT = 7071
CONTROLLER_METRICS_PORT = 7072
AGENT_METRICS_PORT = 7073
BROKER_PORT = 8883
PROMETHEUS_PORT = 9090


class Layout(Value, frozen=True, kw_only=True):
    """One dev fleet."""

    name: str
    node_count: int

    @property
    def run(self) -> Path:
        return RUN_DIRECTORY / self.name

    @property
    def data(self) -> Path:
        return _DATA_DIRECTORY / self.name

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(NodeId(f"n{number}") for number in range(1, self.node_count + 1))

    @property
    def operator_socket(self) -> Path:
        return self.run / "operator.sock"

    @property
    def join_token(self) -> Path:
        return self.data / "controller" / "join-token"

    @property
    def supervisor(self) -> Path:
        """Holds its process id."""
        return self.run / "supervisor.pid"

    @property
    def control_namespace(self) -> Path:
        return self.run / "ns" / "control"

    def namespace(self, node: NodeId) -> Path:
        return self.run / "ns" / node

    def address(self, node: NodeId) -> str:
        return f"10.99.0.{10 + int(node.removeprefix('n'))}"

    def config(self, program: str) -> Path:
        return self.data / "config" / program

    def log(self, program: str) -> Path:
        return self.data / "logs" / f"{program}.log"

    def lost(self, node: NodeId) -> Path:
        """Exists while `dev kill` keeps the node dead."""
        return self.run / "lost" / node


def new_layout(name: str, node_count: int) -> Layout:
    """Raises InputError where the name or the count cannot be."""
    if not is_name(name) or len(name) > _NAME_CHARS_MAX or name in _RESERVED:
        raise InputError(f"{name!r} cannot name a fleet: lower-case letters, digits, dashes, at most {_NAME_CHARS_MAX}")
    if not 1 <= node_count <= NODES_MAX:
        raise InputError(f"{node_count} nodes: between 1 and {NODES_MAX} fit on a machine")
    return Layout(name=name, node_count=node_count)


def claim(layout: Layout) -> None:
    """Takes the name. Raises InputError where a fleet has it, running or left behind."""
    layout.run.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        descriptor = os.open(layout.run / _RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise InputError(
            f"fleet {layout.name} runs already, or was killed; `outrider dev down --name {layout.name}` removes it, "
            "`--name` starts another beside it"
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode({"name": layout.name, "node_count": layout.node_count}))


def find(name: str) -> Layout | None:
    """The fleet of that name as it was started, or None."""
    try:
        content = (RUN_DIRECTORY / name / _RECORD).read_bytes()
        return msgspec.json.decode(content, type=Layout)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        # Killed while it was claimed: nothing runs yet, and what there is lies below the name.
        return Layout(name=name, node_count=NODES_MAX)


def find_all() -> tuple[Layout, ...]:
    found = (find(path.parent.name) for path in sorted(RUN_DIRECTORY.glob(f"*/{_RECORD}")))
    return tuple(layout for layout in found if layout is not None)
