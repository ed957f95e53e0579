"""The sandbox that the responder runs in: what it sees of the host, what it may use. Pure but for where Python is."""

import sys
from importlib.util import find_spec
from pathlib import Path

from agent.sandbox.spec import HostRoot, Limits, Mount, SandboxSpec
from outrider.model.job import MIB

RESPONDER_ID = "node.dns"
_INNER_CODE = "/opt/outrider"
_INNER_DIRECTORY = "/run/dns"
_SOCKET = "dns.sock"


def responder_spec(*, directory: Path, socket_directory: Path, network_namespace: str, uid_first: int) -> SandboxSpec:
    """`socket_directory`: owned by the responder's user, and the agent's only otherwise; see `responder_socket`.

    Its network namespace needs no link: the sockets that it answers on are handed to it.
    """
    code = tuple(
        Mount(source=str(_package_directory(name)), target=f"{_INNER_CODE}/{name}") for name in ("agent", "dnslib")
    )
    # A Python from elsewhere than /usr is not part of the root.
    python = Path(sys.base_prefix)
    if not python.is_relative_to("/usr"):
        code = (*code, Mount(source=str(python), target=str(python)))
    interpreter = python / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return SandboxSpec(
        id=RESPONDER_ID,
        argv=(str(interpreter), "-m", "agent.network.dns", "--socket", f"{_INNER_DIRECTORY}/{_SOCKET}"),
        root=HostRoot(),
        network_namespace=network_namespace,
        uid_first=uid_first,
        limits=Limits(cpu_millis=100, memory_bytes=64 * MIB, pids_max=8),
        directory=str(directory),
        env={"PYTHONPATH": _INNER_CODE, "PYTHONDONTWRITEBYTECODE": "1"},
        mounts=(*code, Mount(source=str(socket_directory), target=_INNER_DIRECTORY, read_only=False)),
        hostname="dns",
    )


def responder_socket(socket_directory: Path) -> Path:
    """Where the agent finds the responder: for `Resolver`."""
    return socket_directory / _SOCKET


def _package_directory(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None, f"{name} is installed, or the agent would not run"
    assert spec.origin is not None, f"{name} is a package with an __init__.py"
    return Path(spec.origin).parent
