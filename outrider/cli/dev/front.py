"""Starts a dev fleet's supervisor, waits until the fleet is ready, tells how it is, and stops it.

The supervisor is a process of its own in either case; in the foreground it dies with us, and cleans up first.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from outrider import codec
from outrider.cli import output
from outrider.cli.address import Address
from outrider.cli.client import Fleet, open_channel
from outrider.cli.dev import removal
from outrider.cli.dev.layout import CONTROL_ADDRESS, PROMETHEUS_PORT, Layout, claim, find, new_layout
from outrider.cli.dev.programs import read_agent_keys, write_agent_keys
from outrider.cli.exits import Interrupt
from outrider.errors import HostError, PeerError
from outrider.model.fleet import NodeState
from outrider.model.node import NodeStatus
from outrider.v1 import operator_pb2

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 120.0
_POLL_S = 0.1
_LOG_LINES = 8
_TOOLS = ("crun", "conmon", "nft", "ip", "nsenter", "unshare", "setpriv")


def start(name: str, node_count: int, *, detach: bool, hints: bool = True, agent_config: Path | None = None) -> None:
    """Raises InputError, HostError. Without `detach`: until Ctrl-C or SIGTERM, and nothing of it is left.

    `hints`: say what to do next. `agent_config`: keys for every agent's configuration.
    """
    layout = new_layout(name, node_count)
    more = read_agent_keys(agent_config) if agent_config is not None else {}
    _check_host()
    claim(layout)
    began_s = time.monotonic()
    supervisor = None
    try:
        signal.signal(signal.SIGTERM, lambda *_: _interrupt())
        write_agent_keys(layout, more)
        supervisor = _spawn(layout, detach=detach)
        _wait_ready(layout, supervisor)
        output.say(f"fleet {name} is ready: {node_count} nodes in {time.monotonic() - began_s:.1f} s")
        if hints:
            _tell_next(layout, detach=detach)
        if not detach:
            _attend(layout, supervisor)
    except BaseException:
        _give_up(layout, supervisor)
        raise


def stop(name: str) -> None:
    """Raises PeerError where there is no such fleet, HostError with what could not be removed."""
    layout = find(name)
    if layout is None:
        raise PeerError(f"no fleet {name!r} runs here")
    pid = supervisor_pid(layout)
    if pid is not None:
        _stop_supervisor(layout, pid)
    if layout.run.exists() or layout.data.exists():
        removal.remove(layout)
    output.say(f"fleet {name} is gone")


def show_status(name: str, *, json: bool) -> None:
    layout = find(name)
    if layout is None:
        raise PeerError(f"no fleet {name!r} runs here; `outrider dev --name {name}` starts one")
    pid = supervisor_pid(layout)
    if pid is None:
        raise PeerError(f"fleet {name} was killed; `outrider dev down --name {name}` removes what it left")
    with _fleet(layout) as fleet:
        nodes = _nodes(fleet)
    if json:
        described = {"name": name, "supervisor_pid": pid, "address": f"unix:{layout.operator_socket}"}
        output.print_json({**described, "run": str(layout.run), "data": str(layout.data), "nodes": nodes})
        return
    output.print_fields(
        (("fleet", name), ("supervisor", pid), ("address", f"unix:{layout.operator_socket}"), ("data", layout.data))
    )
    print()
    output.print_table(
        ("NODE", "STATUS", "ADDRESS", "REASON"), ((n.node.id, n.status, n.node.address, n.reason) for n in nodes)
    )


def supervisor_pid(layout: Layout) -> int | None:
    """None where it does not run: a number in a file may long be another process."""
    try:
        pid = int(layout.supervisor.read_text())
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if b"outrider.cli.dev.supervisor" in words and layout.name.encode() in words else None


def _check_host() -> None:
    if os.geteuid():
        raise HostError("dev fleet", step="make namespaces", hint="needs root: sudo outrider dev")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise HostError(
            "dev fleet", step=f"find {', '.join(missing)}", hint="apt install crun conmon nftables iproute2"
        )
    for tool, use in (("mosquitto", "events on MQTT"), ("prometheus", "figures")):
        if shutil.which(tool) is None:
            output.say(f"{tool} is not installed: no {use}")


def _spawn(layout: Layout, *, detach: bool) -> "subprocess.Popen[bytes]":
    path = layout.log("supervisor")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "outrider.cli.dev.supervisor", layout.name]
    if not detach:  # killed, we cannot stop it: it stops itself
        command = ["setpriv", "--pdeathsig", "TERM", "--", *command]
    with path.open("ab") as log:
        # A session of its own: the terminal's Ctrl-C is ours to pass on.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
        )


def _wait_ready(layout: Layout, supervisor: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    told: set[str] = set()
    while time.monotonic() < deadline_s:
        if supervisor.poll() is not None:
            raise HostError(f"fleet {layout.name}", step=f"start: its supervisor ended\n{_last_words(layout)}")
        with contextlib.suppress(PeerError), _fleet(layout) as fleet:
            ready = {node.node.id for node in _nodes(fleet) if node.status is NodeStatus.READY}
            for node in sorted(ready - told):
                output.say(f"  {node} is ready")
            told |= ready
            if len(ready) == layout.node_count:
                return
        time.sleep(_POLL_S)
    waited = f"nodes are ready within {_READY_TIMEOUT_S:g} s, {len(told)} of {layout.node_count} are"
    raise HostError(f"fleet {layout.name}", step=f"wait until all {waited}\n{_last_words(layout)}")


def _give_up(layout: Layout, supervisor: "subprocess.Popen[bytes] | None") -> None:
    # A second Ctrl-C must not leave half a fleet behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    output.say("removing the fleet")
    if supervisor is not None:
        _stop_supervisor(layout, supervisor.pid)
        supervisor.wait()
    removal.remove(layout)


def _tell_next(layout: Layout, *, detach: bool) -> None:
    lines = [
        "  outrider node ls                          its nodes",
        "  outrider job run examples/shop/shop.yaml  a first job",
        "  outrider dev kill n1                      watch it cope; `dev heal n1`",
    ]
    if shutil.which("prometheus"):
        prometheus = f"nsenter --net={layout.control_namespace} curl {CONTROL_ADDRESS}:{PROMETHEUS_PORT}"
        lines.append(f"  {prometheus}  its Prometheus")
    name = "" if layout.name == "dev" else f" --name {layout.name}"
    lines.append(f"  outrider dev down{name}" if detach else "  Ctrl-C ends and removes it")
    output.say("\n".join(lines))


def _attend(layout: Layout, supervisor: "subprocess.Popen[bytes]") -> None:
    """Until `dev down` from elsewhere; Ctrl-C raises. Raises HostError where the supervisor failed."""
    # A signal just before a blocking waitpid would be noticed at its end only: the wake-up descriptor loses none.
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    ended = os.pidfd_open(supervisor.pid)
    while supervisor.poll() is None:
        if reader in select.select([reader, ended], [], [])[0]:
            raise Interrupt
    if find(layout.name) is not None:
        raise HostError(f"fleet {layout.name}", step=f"run: its supervisor ended\n{_last_words(layout)}")


def _interrupt() -> None:
    raise Interrupt


def _stop_supervisor(layout: Layout, pid: int) -> None:
    """It removes the fleet and ends; where it hangs, it is ended and what it left is the caller's to remove."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while removal.alive(pid) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    if removal.alive(pid):
        output.say(f"supervisor {pid} of fleet {layout.name} did not end in time; removing the fleet without it")
        removal.end([pid])


@contextlib.contextmanager
def _fleet(layout: Layout) -> Iterator[Fleet]:
    if not layout.operator_socket.is_socket():
        raise PeerError(f"fleet {layout.name}: its controller does not listen yet")
    address = Address(target=f"unix:{layout.operator_socket}")
    with open_channel(address) as channel:
        yield Fleet(address, channel)


def _nodes(fleet: Fleet) -> list[NodeState]:
    found = fleet.call(fleet.stub.ListNodes, operator_pb2.ListNodesRequest(), timeout_s=5.0).nodes
    return [codec.from_wire(node, NodeState) for node in found]


def _last_words(layout: Layout) -> str:
    """The ends of all logs: they go with the fleet."""
    words: list[str] = []
    for path in sorted(layout.log("x").parent.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        words.extend(f"  {path.stem} | {line}" for line in lines)
    return "\n".join(words)
