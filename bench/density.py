"""What the mesh costs each of fifty workloads of one host: memory, and CPU at rest. With a sidecar of its own each, and
then with one that all of a node share.

On two nodes, for one promises no more cores than there are. Each workload serves HTTP and calls the others. Memory is
proportional (PSS); each one's part of the agents stands beside it.
"""

import os
import statistics
import time
from pathlib import Path

from bench.figure import emit
from bench.fleet import Fleet, dev_fleet
from bench.footprint import memory_mb, processes
from outrider.ids import GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.job import (
    MIB,
    Check,
    CheckKind,
    Group,
    Job,
    Network,
    Port,
    Protocol,
    Resources,
    Service,
    Task,
    UpdatePolicy,
    Upstream,
)
from outrider.model.sidecar import SidecarKind

WORKLOADS = 50
REST_S = 10.0
_DENSE = ServiceName("dense")


def run() -> None:
    with dev_fleet(nodes=2) as fleet:
        sidecars, agents = _started(fleet, SidecarKind.OWN)
        own_mb = statistics.mean(memory_mb(pid, "Pss") for pid in sidecars)
        emit("density.own_mb", own_mb, "MB", peer="Istio 1.24 proxy, published", peer_value=60)
        emit("density.agent_mb", sum(memory_mb(agent, "Pss") for agent in agents) / WORKLOADS, "MB")
        emit("density.own_idle_cpu_millis", _idle_millis(sidecars), "thousandths of a core")
        fleet.stop(_DENSE)
        shared, _ = _started(fleet, SidecarKind.SHARED)
        shared_mb = sum(memory_mb(pid, "Pss") for pid in shared) / WORKLOADS
        emit("density.shared_mb", shared_mb, "MB", peer="Istio 1.24 ztunnels of two nodes, published", peer_value=0.48)
        emit("density.shared_idle_cpu_millis", _idle_millis(shared), "thousandths of a core")


def _started(fleet: Fleet, kind: SidecarKind) -> tuple[list[int], list[int]]:
    """The Envoys of the fifty, once all are healthy; and the agents."""
    fleet.submit(_job(kind))
    fleet.healthy(_DENSE, WORKLOADS, deadline_s=200.0)
    _, agents, sidecars = processes(fleet, WORKLOADS if kind is SidecarKind.OWN else 2)
    if kind is SidecarKind.OWN:
        return sidecars, agents
    return [pid for pid in sidecars if "/node.sidecar" in Path(f"/proc/{pid}/cgroup").read_text()], agents


def _idle_millis(sidecars: list[int]) -> float:
    """Of one workload."""
    before_s = sum(map(_cpu_s, sidecars))
    time.sleep(REST_S)
    return 1000 * (sum(map(_cpu_s, sidecars)) - before_s) / REST_S / WORKLOADS


def _job(kind: SidecarKind) -> Job:
    port = PortName("http")
    service = Service(
        name=_DENSE,
        port=port,
        protocol=Protocol.HTTP,
        check=Check(kind=CheckKind.TCP, interval_s=30.0),
        upstreams=(Upstream(service=_DENSE),),
        allow=(_DENSE,),
    )
    task = Task(
        name=TaskName("main"),
        command=("/bin/busybox", "httpd", "-f", "-p", "${port.http}"),
        resources=Resources(cpu_millis=10, memory_bytes=16 * MIB),
    )
    group = Group(
        name=GroupName("main"),
        count=WORKLOADS,
        update=UpdatePolicy(max_parallel=WORKLOADS, healthy_deadline_s=280.0),
        network=Network(ports=(Port(name=port),)),
        services=(service,),
        tasks=(task,),
        sidecar=kind,
    )
    return Job(name=JobName(_DENSE), groups=(group,))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
