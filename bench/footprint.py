"""What an idle fleet costs: resident and proportional memory of the controller, an agent and a sidecar (mean of 20)."""

import statistics
from pathlib import Path

from bench.figure import emit
from bench.fleet import Fleet, dev_fleet
from outrider.ids import GroupName, JobName, ServiceName, TaskName
from outrider.model.job import Group, Job, Resources, Service, Task

SIDECARS = 20
_MIB_IN_KIB = 1024


def run() -> None:
    with dev_fleet(nodes=1) as fleet:
        fleet.submit(_idle())
        fleet.healthy("idle", SIDECARS)
        controller, (agent,), sidecars = processes(fleet, SIDECARS)
        emit(
            "footprint.controller_rss_mb",
            memory_mb(controller, "Rss"),
            "MB",
            peer="k3s server, published",
            peer_value=1600,
        )
        emit("footprint.agent_rss_mb", memory_mb(agent, "Rss"), "MB", peer="k3s agent, published", peer_value=275)
        mean_mb = statistics.mean(memory_mb(pid, "Pss") for pid in sidecars)
        emit("footprint.sidecar_pss_mb", mean_mb, "MB", peer="Istio 1.24 proxy, published", peer_value=60)


def _idle() -> Job:
    group = Group(
        name=GroupName("idle"),
        count=SIDECARS,
        services=(Service(name=ServiceName("idle")),),
        tasks=(Task(name=TaskName("sleep"), command=("/bin/sleep", "1000"), resources=Resources(cpu_millis=10)),),
    )
    return Job(name=JobName("idle"), groups=(group,))


def processes(fleet: Fleet, count: int) -> tuple[int, list[int], list[int]]:
    """Process ids of this fleet's controller, agents and sidecars: at least `count`, for nodes may have a spare one."""
    controllers, agents, sidecars = [], [], []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
            cgroup = (directory / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        pid = int(directory.name)
        if words[1:3] == ["-m", "controller"] and any(f"/{fleet.name}/" in word for word in words):
            controllers.append(pid)
        elif words[1:3] == ["-m", "agent"] and any(f"/{fleet.name}/" in word for word in words):
            agents.append(pid)
        elif words[0].endswith("/envoy") and fleet.name in cgroup:
            sidecars.append(pid)
    assert len(controllers) == 1, controllers
    assert len(sidecars) >= count, sidecars
    return controllers[0], agents, sidecars


def memory_mb(pid: int, kind: str) -> float:
    """`kind`: Rss or Pss, as /proc/PID/smaps_rollup has it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / _MIB_IN_KIB
    raise RuntimeError(f"process {pid} tells no {kind}")
