"""`python -m bench fleet`: 100, 1,000 and 5,000 simulated agents with real streams on one controller, mTLS each.

Of each size: what the controller takes while all is quiet, how long a heartbeat's echo and an assignment take, and how
long a storm lasts: the controller is killed and started again, and everybody comes back until all are ready; not more
at once than `bench.swarm` lets greet. The agents share the machine's cores with the controller; what they take is told
beside it. Each size has SIZE_S: one that takes longer ends the run, and `fleet.agents_max` says how far it came.
"""

import asyncio
import contextlib
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc.aio

from bench.figure import emit, percentile
from bench.swarms import Swarms, cpu_s
from outrider import codec
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.job import Group, Job, Resources, Task
from outrider.v1 import job_pb2, operator_pb2
from tests.integration.controllers import Controller
from tests.integration.processes import until

SIZES = PARTS = (100, 1000, 5000)
QUIET_S = 20.0
SIZE_S = 240.0

# CPU: none is published for a fleet of agents that are only there; failure detection at this size is.
_NOMAD = "Nomad, published: a failure is seen at 5,000 clients after 110 to 210 s"
_NOMAD_S = 110.0
_KUBERNETES = "Kubernetes SLO: pod start p99 5 s, image pull apart"
_KUBERNETES_MS = 5000.0
_K3S = "k3s server, published"
_K3S_MB = 1600.0


def run(parts: Sequence[str] = ()) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a socket for each agent, here and there
    reached = 0
    for size in SIZES:
        if parts and str(size) not in parts:
            continue
        try:
            asyncio.run(asyncio.wait_for(_measure(size), SIZE_S))
        except (AssertionError, TimeoutError) as error:
            emit("fleet.agents_max", reached, "agents")
            raise SystemExit(f"stopped at {size} agents, after {SIZE_S:g} s: {str(error) or 'not done'}") from error
        reached = size
    emit("fleet.agents_max", reached, "agents")


async def _measure(size: int) -> None:
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as directory:
        controller = Controller(Path(directory), log="warning")
        controller.configuration["log"] = "info"
        await controller.start()
        # The same address after its death: agents dial it, as they would.
        controller.configuration["listen"] = controller.at["listen"]
        try:
            async with Swarms(controller.data / "ca", "edge-test", controller.at["listen"], size) as swarm:
                await _measure_swarm(controller, swarm, size)
        finally:
            await controller.kill()


async def _measure_swarm(controller: Controller, swarm: Swarms, size: int) -> None:
    await _ready(controller, size)
    await asyncio.sleep(5.0)  # what the first registration left to be done is done
    await swarm.clear()
    before = time.monotonic(), _cpu_s(controller), swarm.cpu_s()
    await asyncio.sleep(QUIET_S)
    took_s, controller_s, agents_s = (
        now - then for now, then in zip((time.monotonic(), _cpu_s(controller), swarm.cpu_s()), before, strict=True)
    )
    emit(f"fleet.cpu_cores_{size}", controller_s / took_s, "cores")
    emit(f"fleet.agents_cpu_cores_{size}", agents_s / took_s, "cores")
    echoes, _ = await swarm.told()
    emit(f"fleet.heartbeat_echo_ms_p99_{size}", percentile(echoes, 0.99) * 1000, "ms")
    submitted_s = time.monotonic()
    await _submit(controller, size)

    async def all_came() -> bool:
        await asyncio.sleep(0.25)
        return await swarm.assigned() >= size

    await until(all_came, f"{size} assignments", SIZE_S)
    _, came_s = await swarm.told()
    latencies = [at_s - submitted_s for at_s in came_s]
    emit(f"fleet.assignment_ms_p50_{size}", percentile(latencies, 0.5) * 1000, "ms")
    emit(
        f"fleet.assignment_ms_p99_{size}",
        percentile(latencies, 0.99) * 1000,
        "ms",
        peer=_KUBERNETES,
        peer_value=_KUBERNETES_MS,
    )
    emit(f"fleet.rss_mb_{size}", controller.rss_mb(), "MB", peer=_K3S, peer_value=_K3S_MB)
    await controller.kill()
    began_s = time.monotonic()
    await controller.start()
    await _ready(controller, size)
    storm_s = time.monotonic() - began_s
    emit(f"fleet.storm_s_{size}", storm_s, "s", peer=_NOMAD, peer_value=_NOMAD_S)
    emit(f"fleet.storm_rss_mb_{size}", controller.rss_mb(), "MB", peer=_K3S, peer_value=_K3S_MB)


async def _ready(controller: Controller, size: int) -> None:
    async with controller.operator() as stub:

        async def ready() -> bool:
            await asyncio.sleep(0.1)
            with contextlib.suppress(grpc.aio.AioRpcError):
                nodes = (await stub.GetFleet(operator_pb2.GetFleetRequest(), timeout=20)).nodes_ready
                return bool(nodes >= size)
            return False

        await until(ready, f"{size} nodes are ready", SIZE_S)


async def _submit(controller: Controller, size: int) -> None:
    task = Task(name=TaskName("t"), command=("sleep", "1"), resources=Resources(cpu_millis=10))
    job = Job(name=JobName("everywhere"), groups=(Group(name=GroupName("g"), count=size, tasks=(task,)),))
    async with controller.operator() as stub:
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        await stub.SubmitJob(request, timeout=60)


def _cpu_s(controller: Controller) -> float:
    assert controller.process is not None
    return cpu_s(controller.process.pid)
