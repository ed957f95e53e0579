"""A dev fleet of five nodes with its broker, under 200 requests a second through the mesh, that loses one thing after
another, each in turn and then at random: what was wanted runs again, once, and what was acknowledged is there."""

import contextlib
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import msgspec
import pytest

from bench.failover import COPIES, NodeLosses, target_job
from bench.fleet import Fleet, dev_fleet
from outrider.cli.dev import namespaces
from outrider.cli.dev.layout import Layout, find
from outrider.cli.dev.removal import end, sandboxes
from outrider.ids import JobName, NodeId
from outrider.v1 import node_pb2, operator_pb2
from tests.integration.processes import comm

pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(1200)]
NODES = 5
RANDOM_ROUNDS = 10
AWAY_S = 3.0
DEADLINE_S = 90.0
SERVER = "busybox"


class Hosts:
    """The fleet, what may be lost of it, and the history of what it acknowledged."""

    def __init__(self, fleet: Fleet, layout: Layout, rng: random.Random) -> None:
        self.fleet, self.layout, self.rng = fleet, layout, rng
        self.losses = NodeLosses(fleet, layout, nodes=NODES)
        self.acknowledged: set[str] = set()
        self.seen = ""

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "agent": lambda: self._kill(self._of_nodes(b"agent")),
            "monitor": lambda: self._kill(self._of_nodes(b"conmon")),
            "sidecar": lambda: self._kill(self._of_sandboxes("envoy")),
            "workload": lambda: self._kill(self._of_sandboxes(SERVER)),
            "controller": lambda: self._kill(self._of(self.layout.control_namespace, b"controller")),
            "broker": lambda: self._kill(self._of(self.layout.control_namespace, b"mosquitto")),
            "node killed": lambda: self._away(self.losses.kill),
            "node cut off": lambda: self._away(self.losses.blackhole),
            "node stopped": lambda: self._away(self.losses.stop),
        }

    def acknowledge(self) -> None:
        """A job of no copies, whose acknowledgement is remembered."""
        name = f"noted-{secrets.token_hex(3)}"
        group = msgspec.structs.replace(target_job().groups[0], count=0, services=())
        self.fleet.submit(msgspec.structs.replace(target_job(), name=JobName(name), groups=(group,)))
        self.acknowledged.add(name)

    def is_whole_again(self) -> bool:
        with contextlib.suppress(grpc.RpcError):  # the controller is about to come back
            return self._is_whole()
        return False

    def _is_whole(self) -> bool:
        nodes = self.fleet.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20).nodes
        ready = sum(node.status == node_pb2.NODE_STATUS_READY for node in nodes)
        listed = self.fleet.operator.ListAllocations(operator_pb2.ListAllocationsRequest(job="target"), timeout=20)
        healthy = sum(found.healthy for found in listed.allocations)
        running = len(self._of_sandboxes(SERVER))
        self.seen = f"{ready} nodes ready, {healthy} copies healthy, {running} run"
        return (ready, healthy, running) == (NODES, COPIES, COPIES)

    def jobs(self) -> set[str]:
        return {job.name for job in self.fleet.operator.ListJobs(operator_pb2.ListJobsRequest(), timeout=20).jobs}

    def left_over(self) -> list[int]:
        return self._of_sandboxes(SERVER)

    def _away(self, how: Callable[[NodeId], Callable[[], None]]) -> None:
        heal = how(self.rng.choice(self.layout.nodes))
        time.sleep(AWAY_S)
        heal()

    def _kill(self, pids: list[int]) -> None:
        assert pids, "there is nothing to kill"
        end([self.rng.choice(sorted(pids))])

    def _of_nodes(self, word: bytes) -> list[int]:
        return [pid for node in self.layout.nodes for pid in self._of(self.layout.namespace(node), word)]

    def _of(self, namespace: Path, word: bytes) -> list[int]:
        return [pid for pid in namespaces.processes(namespace) if word in program(pid) and pid != os.getpid()]

    def _of_sandboxes(self, name: str) -> list[int]:
        found = {pid for node in self.layout.nodes for pid in sandboxes(self.layout, node)}
        return sorted(pid for pid in found if comm(pid) == name)


def program(pid: int) -> bytes:
    """Its first words: the interpreter and its module, or the program."""
    try:
        return b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3])
    except OSError:
        return b""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    with dev_fleet(nodes=NODES) as fleet:
        layout = find(fleet.name)
        assert layout is not None
        yield Hosts(fleet, layout, random.Random(seed))  # noqa: S311 - no secret


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what()}"
        time.sleep(0.1)


def test_whatever_is_lost_what_was_wanted_runs_again_once(hosts: Hosts) -> None:
    hosts.losses.begin()
    faults = hosts.faults()
    for name in [*faults, *hosts.rng.choices(sorted(faults), k=RANDOM_ROUNDS)]:
        hosts.acknowledge()
        began_s = time.time()
        print(name, end=": ", flush=True)
        faults[name]()
        until(hosts.is_whole_again, lambda: f"whole: {hosts.seen}")
        assert hosts.acknowledged <= hosts.jobs(), name
        print(f"{len(hosts.losses.failed_since(began_s))} failed requests")
    hosts.fleet.stop("target")
    until(lambda: not hosts.left_over(), lambda: f"nothing of a stopped job is left: {hosts.left_over()}")
