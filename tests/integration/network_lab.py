"""A node of its own for a test: its network namespace, another host beside it, and people inside its allocations.

The calling thread lives in the node's namespace until `close`; whatever it starts begins there too.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NODE = "10.77.0.1"
OTHER_HOST = "10.77.0.2"  # stands for the control plane, another node, and the rest of the world
SERVER_PORT = 7000
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

# Serves TCP and UDP at argv[1:]: "ADDRESS PORT" pairs; tells each TCP caller its peer's and its own address.
_SERVER = """
import json, selectors, socket, sys
selector = selectors.DefaultSelector()
for address, port in zip(sys.argv[1::2], sys.argv[2::2]):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        opened = socket.socket(socket.AF_INET, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((address, int(port)))
        if kind == socket.SOCK_STREAM:
            opened.listen(64)
        selector.register(opened, selectors.EVENT_READ)
print("serving", flush=True)
while True:
    for key, _ in selector.select():
        if key.fileobj.type == socket.SOCK_DGRAM:
            key.fileobj.sendto(b"here", key.fileobj.recvfrom(100)[1])
        else:
            client, peer = key.fileobj.accept()
            try:
                dialled = int.from_bytes(client.getsockopt(0, 80, 16)[2:4])  # SO_ORIGINAL_DST
            except FileNotFoundError:
                dialled = 0  # where nothing tracks connections
            told = {"peer": peer[0], "own": client.getsockname(), "dialled": dialled}
            client.sendall(json.dumps(told).encode())
            client.close()
"""

# Each attempt of argv[1] is [kind, address, port]; prints what came of each.
_CALLER = """
import json, socket, sys
def attempt(kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kinds = {"tcp": (socket.SOCK_STREAM, 0), "big": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0),
             "ping": (socket.SOCK_DGRAM, socket.IPPROTO_ICMP), "raw": (socket.SOCK_RAW, socket.IPPROTO_ICMP),
             "packet": (socket.SOCK_RAW, 0)}
    if kind == "packet":
        family = socket.AF_PACKET
    try:
        with socket.socket(family, *kinds[kind]) as opened:
            opened.settimeout(0.3)
            opened.connect((address, port))
            if kind == "big":
                opened.sendall(bytes(20_000))
            elif kind != "tcp":
                opened.send(b"\\x08\\x00\\xf7\\xff\\x00\\x00\\x00\\x00")
            return opened.recv(1000).decode("latin-1")
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return type(error).__name__
print(json.dumps([attempt(*each) for each in json.loads(sys.argv[1])]))
"""
_SILENT = frozenset({"timeout", "OSError", "ConnectionRefusedError", "PermissionError", ""})


class Lab:
    def __init__(self) -> None:
        self._servers: list[subprocess.Popen[bytes]] = []
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        assert _libc.unshare(_CLONE_NEWNET) == 0
        _run("ip link set lo up")
        host = self._start(["unshare", "--net", "sh", "-c", "echo ready; read go; exec sleep 600"])
        _run(f"ip link add up0 type veth peer name eth0 netns {host.pid}")
        _run(f"ip addr add {NODE}/24 dev up0")
        _run("ip link set up0 up")
        self.other_host = ("nsenter", f"--net=/proc/{host.pid}/ns/net")
        for command in ("ip link set lo up", f"ip addr add {OTHER_HOST}/24 dev eth0", "ip link set eth0 up"):
            _run(" ".join((*self.other_host, command)))
        self._serve(self.other_host, (OTHER_HOST, SERVER_PORT))
        self._serve((), (NODE, SERVER_PORT))

    def close(self) -> None:
        for server in self._servers:
            server.kill()
            server.communicate()
        assert _libc.setns(self._home, _CLONE_NEWNET) == 0
        os.close(self._home)

    def serve_in(self, namespace: str, uid: int, *listeners: tuple[str, int]) -> None:
        """A server inside an allocation, as `uid` of the host."""
        self._serve(inside(namespace, uid), *listeners)

    def run_on_other_host(self, *command: str) -> None:
        """Until the lab closes. Returns once it has said a line."""
        self._start([*self.other_host, *command])

    def from_other_host(self, *attempts: tuple[str, str, int]) -> list[str]:
        return _call(self.other_host, attempts)

    def from_node(self, *attempts: tuple[str, str, int]) -> list[str]:
        return _call((), attempts)

    def from_inside(self, namespace: str, uid: int, *attempts: tuple[str, str, int]) -> list[str]:
        return _call(inside(namespace, uid), attempts)

    def run(self, command: str) -> str:
        """What a command says that runs in the node's namespace."""
        return _run(command)

    def _serve(self, prefix: tuple[str, ...], *listeners: tuple[str, int]) -> None:
        places = [str(part) for listener in listeners for part in listener]
        self._start([*prefix, sys.executable, "-c", _SERVER, *places])

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() != b"", f"{command} did not start"
        return server


@contextmanager
def lab() -> Iterator[Lab]:
    made = Lab()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def node() -> Iterator[Lab]:
    with lab() as made:
        yield made


def inside(namespace: str, uid: int) -> tuple[str, ...]:
    """The start of a command line that runs inside an allocation: without capabilities, unless `uid` is 0."""
    return ("nsenter", f"--net={namespace}", f"--setuid={uid}", f"--setgid={uid}")


def arrived(outcome: str) -> bool:
    """Whether an attempt got an answer."""
    return outcome not in _SILENT


def links() -> int:
    """How many network interfaces this thread's namespace has."""
    return len(socket.if_nameindex())


def mounts_below(path: Path) -> int:
    return Path("/proc/self/mounts").read_text().count(f" {path}")


def told(outcome: str) -> dict[str, object]:
    """What a lab's server told its caller."""
    values = json.loads(outcome)
    assert isinstance(values, dict)
    return values


def _call(prefix: tuple[str, ...], attempts: tuple[tuple[str, str, int], ...]) -> list[str]:
    command = [*prefix, sys.executable, "-c", _CALLER, json.dumps(attempts)]
    outcomes = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=30).stdout)
    assert isinstance(outcomes, list)
    return outcomes


def _run(command: str) -> str:
    return subprocess.run(command.split(), check=True, timeout=10, stdout=subprocess.PIPE, text=True).stdout
