"""A dev fleet's network: one namespace for control, one for each node, a bridge between. Nothing in the host's.

Namespaces are bound to files below the fleet's run directory. Programs are started in them with nsenter.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outrider.cli.dev.layout import CONTROL_ADDRESS, NETWORK_BITS, Layout
from outrider.errors import HostError
from outrider.ids import NodeId

_LINK = "eth0"  # a node's, in its own namespace
_TIMEOUT_S = 20.0


def create(layout: Layout) -> None:
    """Raises HostError."""
    (layout.run / "ns").mkdir(exist_ok=True)
    for path in (layout.control_namespace, *map(layout.namespace, layout.nodes)):
        path.touch()
        _run("make a network namespace", "unshare", f"--net={path}", "true")
    lines = [
        "link set lo up",
        "link add bridge0 type bridge",
        f"address add {CONTROL_ADDRESS}/{NETWORK_BITS} dev bridge0",
        "link set bridge0 up",
    ]
    for node in layout.nodes:
        lines.append(f"link add {node} type veth peer name {_LINK} netns {layout.namespace(node)}")
        lines.append(f"link set {node} master bridge0 up")
    _ip(layout.control_namespace, lines)
    for node in layout.nodes:
        address = f"{layout.address(node)}/{NETWORK_BITS}"
        lines = ["link set lo up", f"address add {address} dev {_LINK}", f"link set {_LINK} up"]
        _ip(layout.namespace(node), [*lines, f"route add default via {CONTROL_ADDRESS}"])


def remove(layout: Layout) -> None:
    """What of it exists; without complaint about what does not. Raises HostError where something stays."""
    directory = layout.run / "ns"
    for path in sorted(directory.glob("*")):
        if _is_bound(path):
            # Other mount namespaces may hold a copy of the binding: what is in the namespace goes now.
            subprocess.run([*inside(path), "ip", "link", "delete", "bridge0"], check=False, capture_output=True)
            subprocess.run([*inside(path), "ip", "link", "delete", _LINK], check=False, capture_output=True)
            _run("unbind a network namespace", "umount", "--lazy", str(path))
        path.unlink()


def set_link(layout: Layout, node: NodeId, *, up: bool) -> None:
    """Cuts the node off, as a pulled cable would, or joins it again."""
    lines = [f"link set {_LINK} {'up' if up else 'down'}"]
    if up:  # it went with the link
        lines.append(f"route replace default via {CONTROL_ADDRESS}")
    _ip(layout.namespace(node), lines)


def inside(namespace: Path) -> list[str]:
    """The words that begin a command inside `namespace`."""
    return ["nsenter", f"--net={namespace}", "--"]


def processes(namespace: Path) -> Iterator[int]:
    """Ids of the processes that live in `namespace`."""
    if not _is_bound(namespace):
        return
    wanted = namespace.stat()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                found = (entry / "ns" / "net").stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    yield int(entry.name)


def _is_bound(path: Path) -> bool:
    return path.exists() and path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev


def _ip(namespace: Path, lines: list[str]) -> None:
    _run("set up the network", *inside(namespace), "ip", "-batch", "-", text="\n".join(lines) + "\n")


def _run(step: str, *command: str, text: str = "") -> None:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=os.environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError("dev fleet", step=f"{step}: {error}") from error
    if done.returncode:
        hint = "needs root" if os.geteuid() else ""
        raise HostError("dev fleet", step=f"{step}: {done.stderr.strip() or command[0]}", hint=hint)
