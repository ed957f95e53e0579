"""What users notice when something dies: under 200 requests a second through the mesh, each loss ten times.

A node is lost in three manners, each apart: killed (kill -9 of all of it, its kernel says goodbye), blackholed
(silence), stopped (SIGSTOP of all of it). Then the agent alone is killed. Three controllers on three Consul servers are
a fleet of their own: the leader is killed, or Consul's. A request has failed when no 200 came within two seconds.
Every figure is the worst of ten; the medians stand beside them.
"""

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc

from bench.controllers import measure as measure_controllers
from bench.figure import emit
from bench.fleet import Fleet, dev_fleet
from outrider.cli.dev import namespaces
from outrider.cli.dev.layout import Layout, find
from outrider.cli.dev.removal import end, sandboxes
from outrider.ids import GroupName, JobName, NodeId, PortName, ServiceName, TaskName
from outrider.model.job import (
    Check,
    CheckKind,
    DisconnectPolicy,
    File,
    Group,
    Job,
    Network,
    Port,
    Protocol,
    Service,
    Task,
    Upstream,
)
from outrider.v1 import node_pb2, operator_pb2

ROUNDS = 10
NODES = 4
COPIES = 3
REPLACE_AFTER_S = 2.0
QUIET_S = 3.0  # without a failed request: the loss is over for those who call
_DEADLINE_S = 60.0

# What the peers publish or are known for: a node's loss seen, then its work moved.
_KUBERNETES = "Kubernetes, published defaults: 40 s until NotReady"
_KUBERNETES_S = 40.0
_KUBERNETES_MOVED = "Kubernetes, published defaults: 40 s, then 300 s until eviction"
_KUBERNETES_MOVED_S = 340.0
_NOMAD = "Nomad, published: heartbeat TTL 20 s at least"
_NOMAD_S = 20.0

_CLIENT = """
import http.client, threading, time
def ask():
    connection = http.client.HTTPConnection("target.mesh", timeout=2)
    due = time.monotonic()
    while True:
        due = max(due + 0.1, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise OSError(f"status {answer.status}")
            counts[0] += 1
            slowest[0] = max(slowest[0], time.monotonic() - due)
        except (OSError, http.client.HTTPException) as error:
            print("failed", time.time(), type(error).__name__, error, flush=True)
            connection.close()
            connection = http.client.HTTPConnection("target.mesh", timeout=2)
counts, slowest = [0], [0.0]
for _ in range(20):
    threading.Thread(target=ask, daemon=True).start()
while True:
    time.sleep(0.2)
    print("asked", time.time(), counts[0], slowest[0], flush=True)
    slowest[0] = 0.0
"""


# Each on a fleet of its own, so that any of them can be measured alone.
PARTS = ("node", "blackhole", "stopped", "agent", "controllers")


def run(parts: Sequence[str] = PARTS) -> None:
    for part in parts:
        if part == "controllers":
            asyncio.run(measure_controllers(ROUNDS))
            continue
        with dev_fleet(nodes=NODES) as fleet:
            layout = find(fleet.name)
            assert layout is not None
            bench = NodeLosses(fleet, layout)
            bench.begin()
            if part == "agent":
                restarts = [bench.restart_agent() for _ in range(ROUNDS)]
                emit("failover.agent_restart_failed_requests", max(restarts), "requests")
            else:
                how = {"node": bench.kill, "blackhole": bench.blackhole, "stopped": bench.stop}[part]
                _tell_losses(part, [bench.lose(how) for _ in range(ROUNDS)])


def _tell_losses(part: str, losses: list["Loss"]) -> None:
    seen, seen_s = (_NOMAD, _NOMAD_S) if part == "blackhole" else (_KUBERNETES, _KUBERNETES_S)
    _tell(f"failover.{part}_last_failed_s", [one.last_failed_s for one in losses], seen, seen_s)
    _tell(f"failover.{part}_replaced_s", [one.replaced_s for one in losses], _KUBERNETES_MOVED, _KUBERNETES_MOVED_S)
    emit(f"failover.{part}_failed_requests", max(one.failed for one in losses), "requests")
    emit(f"failover.{part}_slowest_answer_s", max(one.slowest_s for one in losses), "s")


def _tell(figure: str, values: list[float], peer: str, peer_s: float) -> None:
    emit(figure, max(values), "s", peer=peer, peer_value=peer_s)
    emit(f"{figure.removesuffix('_s')}_median_s", statistics.median(values), "s", peer=peer, peer_value=peer_s)


class Loss:
    """What one loss cost those who call."""

    def __init__(self, *, last_failed_s: float, replaced_s: float, failed: int, slowest_s: float) -> None:
        self.last_failed_s, self.replaced_s, self.failed = last_failed_s, replaced_s, failed
        self.slowest_s = slowest_s


class Failures:
    """The client's words, read as they come. Owns a thread."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.failed_at_s: list[float] = []
        self.asked = 0
        self.slowest_s = 0.0
        self.last_word_s = 0.0
        self._lines = lines
        self._thread = threading.Thread(target=self._read, name="client-log", daemon=True)
        self._thread.start()

    def since(self, began_s: float) -> list[float]:
        return [at_s for at_s in list(self.failed_at_s) if at_s >= began_s]

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):  # the fleet ends before the log does
            for line in self._lines:
                word, at, *rest = line.split()
                self.last_word_s = float(at)
                if word == "failed":
                    self.failed_at_s.append(float(at))
                    print(line, file=sys.stderr)
                else:
                    self.asked = int(rest[0])
                    self.slowest_s = max(self.slowest_s, float(rest[1]))


class NodeLosses:
    def __init__(self, fleet: Fleet, layout: Layout, nodes: int = NODES) -> None:
        self._fleet, self._layout, self._count = fleet, layout, nodes
        self._failures: Failures

    def begin(self) -> None:
        self._fleet.submit(target_job())
        self._fleet.healthy("target", COPIES)
        self._fleet.submit(_client())
        alloc = self._fleet.healthy("client", 1)[0]
        self._client_node = self._nodes_of("client")[0]
        self._failures = Failures(self._fleet.logs(alloc, follow=True))
        _until(lambda: self._failures.asked > 100, "the client asks")

    def failed_since(self, began_s: float) -> list[float]:
        return self._failures.since(began_s)

    def lose(self, how: Callable[[NodeId], Callable[[], None]]) -> Loss:
        victim = next(node for node in self._nodes_of("target") if node != self._client_node)
        before = self._allocations("target")
        _until(lambda: time.time() - max(self._failures.failed_at_s, default=0.0) > QUIET_S, "no request fails")
        self._failures.slowest_s = 0.0
        began_s = time.time()
        heal = how(NodeId(victim))
        replaced_s = self._replaced(victim, before) - began_s
        _until(lambda: time.time() - max(self._failures.since(began_s), default=began_s) > QUIET_S, "no request fails")
        failed, slowest_s = self._failures.since(began_s), self._failures.slowest_s
        heal()
        _until(lambda: self._ready() == self._count and len(self._healthy("target")) == COPIES, "all is well again")
        return Loss(
            last_failed_s=max(failed, default=began_s) - began_s,
            replaced_s=replaced_s,
            failed=len(failed),
            slowest_s=slowest_s,
        )

    def kill(self, node: NodeId) -> Callable[[], None]:
        """kill -9 of all that is the node's: agent, sandboxes, their monitors; the kernel resets what they had."""
        self._layout.lost(node).touch()
        for _ in range(2):
            end(self._pids(node))

        return lambda: self._layout.lost(node).unlink(missing_ok=True)

    def blackhole(self, node: NodeId) -> Callable[[], None]:
        namespaces.set_link(self._layout, node, up=False)
        return lambda: namespaces.set_link(self._layout, node, up=True)

    def stop(self, node: NodeId) -> Callable[[], None]:
        pids = self._pids(node)
        _signal(pids, signal.SIGSTOP)
        return lambda: _signal(pids, signal.SIGCONT)

    def restart_agent(self) -> int:
        """Failed requests while the agent of a node with a target is killed and comes back."""
        node = NodeId(self._nodes_of("target")[0])
        began_s = time.time()
        agents = [pid for pid in self._pids(node) if _is_agent(pid)]
        end(agents)
        _until(lambda: bool(set(self._agents(node)) - set(agents)), "the agent is back")
        _until(lambda: self._ready() == self._count and time.time() - began_s > QUIET_S, "the node is ready")
        return len(self._failures.since(began_s))

    def _replaced(self, victim: str, before: set[str]) -> float:
        """When a new copy elsewhere was first seen healthy."""
        request = operator_pb2.GetJobRequest(job="target")
        for status in self._fleet.operator.WatchJob(request, timeout=_DEADLINE_S):
            for found in status.allocations:
                if found.healthy and found.node != victim and found.id not in before:
                    return time.time()
        raise RuntimeError("the fleet stopped telling before a replacement was healthy")

    def _pids(self, node: NodeId) -> list[int]:
        found = {*namespaces.processes(self._layout.namespace(node)), *sandboxes(self._layout, node)}
        return sorted(found - {os.getpid()})

    def _agents(self, node: NodeId) -> list[int]:
        return [pid for pid in self._pids(node) if _is_agent(pid)]

    def _allocations(self, job: str) -> set[str]:
        listed = self._fleet.operator.ListAllocations(operator_pb2.ListAllocationsRequest(job=job, terminal=True))
        return {found.id for found in listed.allocations}

    def _healthy(self, job: str) -> list[str]:
        listed = self._fleet.operator.ListAllocations(operator_pb2.ListAllocationsRequest(job=job))
        return [found.node for found in listed.allocations if found.healthy]

    def _nodes_of(self, job: str) -> list[str]:
        return sorted(self._healthy(job))

    def _ready(self) -> int:
        nodes = self._fleet.operator.ListNodes(operator_pb2.ListNodesRequest()).nodes
        return sum(node.status == node_pb2.NODE_STATUS_READY for node in nodes)


def target_job() -> Job:
    task = Task(
        name=TaskName("server"),
        command=("/bin/sh", "-c", "exec busybox httpd -f -p ${port.http} -h ${task.dir}"),
        files=(File(path="index.html", content=b"here\n"),),
    )
    service = Service(
        name=ServiceName("target"),
        port=PortName("http"),
        protocol=Protocol.HTTP,
        check=Check(kind=CheckKind.TCP),
        allow=(ServiceName("client"),),
    )
    group = Group(
        name=GroupName("target"),
        count=COPIES,
        tasks=(task,),
        services=(service,),
        network=Network(ports=(Port(name=PortName("http")),)),
        disconnect=DisconnectPolicy(replace_after_s=REPLACE_AFTER_S),
    )
    return Job(name=JobName("target"), groups=(group,))


def _client() -> Job:
    task = Task(name=TaskName("client"), command=("/usr/bin/python3", "-c", _CLIENT))
    service = Service(name=ServiceName("client"), upstreams=(Upstream(service=ServiceName("target")),))
    return Job(name=JobName("client"), groups=(Group(name=GroupName("client"), tasks=(task,), services=(service,)),))


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_agent(pid: int) -> bool:
    try:
        words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")  # noqa: SIM115, PTH123 - read at once
    except OSError:
        return False
    return words[1:3] == [b"-m", b"agent"]


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {_DEADLINE_S:g} s: {what}")
        time.sleep(0.02)
