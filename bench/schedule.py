"""The scheduler at scale: from a job's submission through the decision, the check and the durable journal to nodes.

Each case runs in a process of its own (`python -m bench.schedule CASE NUMBER...`), so that its memory is its own; see
`bench.control_plane` for what is real and what is simulated. The peers' figures are what they publish.
"""

import asyncio
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

from bench.control_plane import RACKS, ControlPlane, control_plane, memory_mb, nodes, used_nodes
from bench.figure import emit, percentile
from controller.core.policy import Policy
from controller.core.records import Plan
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.job import (
    MIB,
    Constraint,
    Group,
    Job,
    JobType,
    Operator,
    Packing,
    Resources,
    Spread,
    Task,
    UpdatePolicy,
)

CASE_S = 280.0
NOMAD = "Nomad C1M on five servers, published"
KUBE = "kube-scheduler's CI floor at 5,000 nodes, published"
GKE = "GKE at 130,000 nodes, published"
BORG = "Borg, published, a pass"
GROWTH = ((125_000, 625), (250_000, 1250), (500_000, 2500), (1_000_000, 5000))
DECISION_NODES = (1250, 2500, 5000, 10_000)
DRAINS = ((12_600, 630), (25_000, 1250), (50_000, 2500), (100_000, 5000))
SUBMITTERS = 64
_CORES, _MEMORY_GIB = 32, 128
_FOREVER_S = 1e9
Result = Mapping[str, float]


def run() -> None:
    for allocations, count in GROWTH:
        found = _case("million", allocations, count)
        at = f"[{allocations} allocations, {count} nodes]"
        emit(f"schedule.growth_per_s{at}", found["per_s"], "1/s")
        emit(f"schedule.growth_cpu_us{at}", found["cpu_us"], "us of processor time per placement")
        emit(f"schedule.growth_memory_mb{at}", found["memory_mb"], "MB")
        if (allocations, count) == GROWTH[-1]:
            emit("schedule.million_per_s", found["per_s"], "1/s", peer=NOMAD, peer_value=3750)
            emit("schedule.million_memory_mb", found["memory_mb"], "MB")
    found = _case("distinct", 20_000, 5000)
    for peer, value in ((GKE, 1000), (KUBE, 270)):
        emit("schedule.distinct_per_s", found["per_s"], "1/s", peer=peer, peer_value=value)
    emit("schedule.distinct_jobs_per_s", found["jobs_per_s"], "1/s")
    emit("schedule.distinct_cpu_us", found["cpu_us"], "us of processor time per placement")
    emit("schedule.distinct_memory_mb", found["memory_mb"], "MB")
    for count in DECISION_NODES:
        found = _case("decision", 1000, count)
        for name in ("p50", "p99"):
            emit(f"schedule.growth_decision_ms_{name}[{count} nodes]", found[name], "ms")
            emit(f"schedule.growth_decision_cpu_ms_{name}[{count} nodes]", found[f"cpu_{name}"], "ms of processor time")
    emit("schedule.decision_ms_p50", found["p50"], "ms")
    emit("schedule.decision_ms_p99", found["p99"], "ms", peer=BORG, peer_value=500)
    emit("schedule.decision_memory_mb", found["memory_mb"], "MB")
    for allocations, count in DRAINS:
        found = _case("drain", allocations, count)
        at = f"[{count} nodes]"
        emit(f"schedule.growth_drain_s{at}", found["took_s"], "s")
        emit(
            f"schedule.growth_drain_cpu_ms{at}", found["cpu_s"] / found["moved"] * 1e3, "ms of processor time per move"
        )
    emit("schedule.drain_s", found["took_s"], "s")
    emit("schedule.drain_moved_per_s", found["moved"] / found["took_s"], "1/s")
    emit("schedule.drain_memory_mb", found["memory_mb"], "MB")
    emit("schedule.packing_ratio", _case("packing", 4000)["ratio"], "nodes used / linear lower bound")


async def million(allocations: int, node_count: int) -> Result:
    """One batch job of so many small copies."""
    async with control_plane(nodes(node_count, cores=_CORES, memory_gib=_MEMORY_GIB)) as plane:
        before_mb = memory_mb()
        group = Group(name=GroupName("work"), count=allocations, tasks=(_task(10, 16),))
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await plane.submit(Job(name=JobName("million"), type=JobType.BATCH, groups=(group,)))
        await plane.until(lambda: plane.placed() == allocations and plane.acknowledged())
        took_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        return {
            "per_s": allocations / took_s,
            "cpu_us": cpu_s / allocations * 1e6,
            "memory_mb": memory_mb() - before_mb,
        }


async def distinct(jobs: int, node_count: int) -> Result:
    """So many jobs of one to four copies, each other than the others, with constraints and spread."""
    async with control_plane(nodes(node_count, cores=_CORES, memory_gib=_MEMORY_GIB)) as plane:
        before_mb = memory_mb()
        rng = random.Random(7)  # noqa: S311  a seeded trace
        made = [_distinct_job(at, rng) for at in range(jobs)]
        copies = sum(job.groups[0].count for job in made)
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await asyncio.gather(*(_submit_each(plane, made[at::SUBMITTERS]) for at in range(SUBMITTERS)))
        await plane.until(lambda: plane.placed() == copies)
        took_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        return {
            "per_s": copies / took_s,
            "jobs_per_s": jobs / took_s,
            "cpu_us": cpu_s / copies * 1e6,
            "memory_mb": memory_mb() - before_mb,
        }


async def decision(decisions: int, node_count: int) -> Result:
    """One job after the other, of one copy: what deciding, placing and checking takes of the controller's loop."""
    async with control_plane(nodes(node_count, cores=_CORES, memory_gib=_MEMORY_GIB)) as plane:
        before_mb = memory_mb()
        rng = random.Random(7)  # noqa: S311  a seeded trace
        took: list[tuple[float, float]] = []
        plane.watch_steps(lambda records, *step_s: took.append(step_s) if _places(records) else None)
        for at in range(decisions):
            job = _distinct_job(at, rng, count=1)
            await plane.submit(job)
            await plane.until(functools.partial(plane.has_placed, at + 1))
        took_s, cpu_s = zip(*took, strict=True)
        return {
            "p50": percentile(took_s, 0.5) * 1000,
            "p99": percentile(took_s, 0.99) * 1000,
            "cpu_p50": percentile(cpu_s, 0.5) * 1000,
            "cpu_p99": percentile(cpu_s, 0.99) * 1000,
            "memory_mb": memory_mb() - before_mb,
        }


async def drain(allocations: int, node_count: int) -> Result:
    """A tenth of the nodes, all at once, under services of 200 copies: until nothing runs there any more."""
    async with control_plane(nodes(node_count, cores=_CORES, memory_gib=_MEMORY_GIB)) as plane:
        before_mb = memory_mb()
        update = UpdatePolicy(max_parallel=20, min_healthy_s=0.0)
        group = Group(name=GroupName("web"), count=200, tasks=(_task(50, 64),), update=update)
        jobs = [Job(name=JobName(f"service-{at}"), groups=(group,)) for at in range(allocations // 200)]
        await asyncio.gather(*(_submit_each(plane, jobs[at::SUBMITTERS]) for at in range(SUBMITTERS)))
        await plane.until(lambda: plane.placed() == allocations and plane.settled())
        drained = [node.id for node in plane.engine.state.nodes.nodes[::10]]
        moved = plane.on_nodes(drained)
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await asyncio.gather(*(plane.drain(node) for node in drained))
        await plane.until(lambda: plane.on_nodes(drained) == 0 and plane.placed() == allocations)
        took_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        return {"took_s": took_s, "cpu_s": cpu_s, "moved": moved, "memory_mb": memory_mb() - before_mb}


async def packing(allocations: int) -> Result:
    """Nodes used by a mixed trace that arrives job by job, against what its sums need if it could be cut at will."""
    rng = random.Random(11)  # noqa: S311  a seeded trace
    policy = Policy(suspect_after_s=_FOREVER_S, placement=Packing.PACK)
    async with control_plane(nodes(1000, cores=_CORES, memory_gib=_MEMORY_GIB), policy) as plane:
        left, cpu, memory, at = allocations, 0, 0, 0
        while left:
            count = min(left, rng.randrange(1, 11))
            task = _task(rng.choice([100, 250, 500, 1000, 2000, 4000, 8000]), 2 ** rng.randrange(7, 15))
            group = Group(name=GroupName("web"), count=count, tasks=(task,))
            await plane.submit(Job(name=JobName(f"mixed-{at}"), groups=(group,)))
            cpu, memory = cpu + count * task.resources.cpu_millis, memory + count * task.resources.memory_bytes
            left, at = left - count, at + 1
        await plane.until(lambda: plane.placed() == allocations)
        bound = max(cpu / (_CORES * 1000), memory / (_MEMORY_GIB * 1024 * MIB))
        return {"ratio": used_nodes(plane) / bound}


CASES: dict[str, Callable[..., Awaitable[Result]]] = {
    "million": million,
    "distinct": distinct,
    "decision": decision,
    "drain": drain,
    "packing": packing,
}


def _case(name: str, *sizes: int) -> Result:
    command = [sys.executable, "-m", "bench.schedule", name, *map(str, sizes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=CASE_S)
    found: Result = json.loads(done.stdout)
    return found


def _task(cpu_millis: int, memory_mib: int) -> Task:
    resources = Resources(cpu_millis=cpu_millis, memory_bytes=memory_mib * MIB, disk_bytes=MIB)
    return Task(name=TaskName("main"), command=("work",), resources=resources)


def _distinct_job(at: int, rng: random.Random, count: int | None = None) -> Job:
    constraints = (
        Constraint(attribute="meta.disk", operator=Operator.EQUAL, value=rng.choice(["ssd", "hdd"])),
        Constraint(attribute="node.kernel", operator=Operator.VERSION, value=">= 5.10"),
        Constraint(attribute="meta.rack", operator=Operator.NOT_EQUAL, value=f"r{rng.randrange(RACKS)}"),
    )
    group = Group(
        name=GroupName("web"),
        count=count or rng.randrange(1, 5),
        tasks=(_task(rng.randrange(50, 500), rng.randrange(32, 512)),),
        constraints=constraints,
        spread=(Spread(attribute="meta.zone"),),
    )
    return Job(name=JobName(f"job-{at}"), groups=(group,))


async def _submit_each(plane: ControlPlane, made: list[Job]) -> None:
    for job in made:
        await plane.submit(job)


def _places(records: tuple[object, ...]) -> bool:
    return any(isinstance(record, Plan) and record.runs for record in records)


async def _measured(name: str, sizes: list[int]) -> Result:
    return await CASES[name](*sizes)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measured(sys.argv[1], [int(word) for word in sys.argv[2:]]))))
