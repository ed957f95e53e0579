"""What the mesh costs each of fifty workloads of one host, each with a sidecar of its own: memory, and CPU at rest.

On two nodes, for one promises no more cores than there are. Each workload serves HTTP and calls the others. Memory is
proportional (PSS); each one's part of the agents stands beside it.
"""

import os
import statistics
import time
from pathlib import Path

from bench.figure import emit
from bench.fleet import dev_fleet
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

WORKLOADS = 50
REST_S = 10.0
_DENSE = ServiceName("dense")


def run() -> None:
    with dev_fleet(nodes=2) as fleet:
        fleet.submit(_job())
        fleet.healthy(_DENSE, WORKLOADS, deadline_s=200.0)
        _, agents, sidecars = processes(fleet, WORKLOADS)
        own_mb = statistics.mean(memory_mb(pid, "Pss") for pid in sidecars)
        emit("density.own_mb", own_mb, "MB", peer="Istio 1.24 proxy, published", peer_value=60)
        emit("density.agent_mb", sum(memory_mb(agent, "Pss") for agent in agents) / WORKLOADS, "MB")
        before_s = sum(map(_cpu_s, sidecars))
        time.sleep(REST_S)
        spent_s = sum(map(_cpu_s, sidecars)) - before_s
        emit("density.own_idle_cpu_millis", 1000 * spent_s / REST_S / WORKLOADS, "thousandths of a core")


def _job() -> Job:
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
    )
    return Job(name=JobName(_DENSE), groups=(group,))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
