"""What a task is held to, and what it is given, seen from inside it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from agent.sandbox.cgroup import ROOT
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment
from outrider.model.job import MIB, Group, Network, Resources, RestartPolicy, Task
from tests.integration.agent_fleet import AgentFleet, agent_fleet, alloc_id, one_test
from tests.integration.network_lab import lab
from tests.integration.processes import until

pytestmark = [pytest.mark.host, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node() -> AsyncIterator[AgentFleet]:
    with lab():
        settings = {
            "devices": {"null": 2},
            "device_files": {"null": ["/dev/null", "/dev/zero"]},
            "capabilities": ["NET_BIND_SERVICE"],
        }
        async with agent_fleet(**settings) as made:
            await made.start()
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(node: AgentFleet) -> AsyncIterator[AgentFleet]:
    async with one_test(node):
        yield node


def assignment(number: int, script: str, *, network: Network | None = None, **task: object) -> Assignment:
    made = Task(name=TaskName("app"), command=("sh", "-c", script), **task)  # type: ignore[arg-type]
    group = Group(name=GroupName("web"), tasks=(made,), restart=RestartPolicy(attempts=0), network=network or Network())
    return Assignment(alloc=alloc_id(number), job=JobName("job"), job_version=1, group=group, index=0, batch=True)


async def ended(fleet: AgentFleet, number: int) -> AllocReport:
    alloc = alloc_id(number)
    over = (AllocStatus.COMPLETE, AllocStatus.FAILED)
    await until(lambda: fleet.controller.status(alloc) in over, f"its end: {fleet.controller.reports}")
    return fleet.controller.reports[alloc]


def output(fleet: AgentFleet, number: int) -> list[str]:
    log = fleet.data / "allocations" / alloc_id(number) / "app" / "log"
    return [line.split(" ", 3)[3] for line in log.read_text().splitlines()]


async def test_a_task_is_held_to_what_its_job_says(fleet: AgentFleet) -> None:
    resources = Resources(shm_bytes=8 * MIB, nice=7, ulimits={"nofile": 123, "core": 0})
    script = "ulimit -n; nice; df -B1 /dev/shm | tail -1 | awk '{print $2}'"
    fleet.controller.assign(assignment(1, script, resources=resources))
    await ended(fleet, 1)
    assert output(fleet, 1) == ["123", "7", str(8 * MIB)]


async def test_devices_are_those_it_was_given_and_no_others(fleet: AgentFleet) -> None:
    fleet.controller.assign(
        assignment(1, "sleep 1000", resources=Resources(devices={"null": 1})),
        assignment(2, "head -c 3 /dev/zero | od -An -c; sleep 1000", resources=Resources(devices={"null": 1})),
    )
    claims = fleet.run / "devices/null"
    await until(lambda: claims.is_dir() and len(list(claims.iterdir())) == 2, "both have one")
    owners = {path.name: path.read_text().split()[0] for path in claims.iterdir()}
    assert set(owners.values()) == {alloc_id(1), alloc_id(2)}
    fleet.controller.assign(full=True)
    await until(lambda: not list(claims.iterdir()), "both were given back")


async def test_a_capability_needs_the_jobs_word_and_the_nodes(fleet: AgentFleet) -> None:
    script = "grep CapEff /proc/self/status"
    fleet.controller.assign(
        assignment(1, script),
        assignment(2, script, capabilities=("NET_BIND_SERVICE",)),
        assignment(3, script, capabilities=("NET_RAW",)),
    )
    await ended(fleet, 1)
    await ended(fleet, 2)
    assert output(fleet, 1) == ["CapEff:\t0000000000000000"]
    assert output(fleet, 2) == [f"CapEff:\t{1 << 10:016x}"]
    report = await ended(fleet, 3)
    assert report.status is AllocStatus.FAILED
    assert "this node does not let a task have NET_RAW" in report.message


async def test_bandwidth_is_a_token_bucket_at_both_ends(fleet: AgentFleet) -> None:
    fleet.controller.assign(assignment(1, "sleep 1000", network=Network(bandwidth_bytes=1_000_000)))
    await until(lambda: fleet.controller.status(alloc_id(1)) is AllocStatus.RUNNING, "running")
    outer = [line for line in fleet.shell("tc qdisc show").splitlines() if "tbf" in line]
    assert len(outer) == 1
    assert "rate 8Mbit" in outer[0]
    pid = fleet.workload_pids("sleep 1000")[0]
    inner = fleet.shell(f"nsenter --target {pid} --net tc qdisc show")
    assert "qdisc tbf" in inner
    assert "rate 8Mbit" in inner


async def test_an_io_weight_is_the_kernels_or_is_refused(fleet: AgentFleet) -> None:
    fleet.controller.assign(assignment(1, "sleep 1000", resources=Resources(io_weight=123)))
    over = (AllocStatus.RUNNING, AllocStatus.FAILED)
    await until(lambda: fleet.controller.status(alloc_id(1)) in over, "it runs, or says why not")
    report = fleet.controller.reports[alloc_id(1)]
    if report.status is AllocStatus.FAILED:
        assert "this node's kernel has no I/O weights" in report.message
        return
    files = [*ROOT.glob(f"**/{fleet.run.name}/{alloc_id(1)}.app/*.weight")]
    assert "123" in "".join(path.read_text() for path in files)
