"""Hugepages from the kernel's pool to a task's hands: fingerprinted, mounted, bounded, given back."""

import contextlib
import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent.sandbox.hugepages import free_bytes
from outrider import codec
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment
from outrider.model.job import MIB, File, Group, Resources, RestartPolicy, Task
from outrider.model.node import Fingerprint, Hugepages
from tests.integration.agent_fleet import AgentFleet, agent_fleet, alloc_id, one_test
from tests.integration.network_lab import lab
from tests.integration.processes import until

pytestmark = [pytest.mark.host, pytest.mark.asyncio(loop_scope="module")]

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_MORE = 8
PAGE = 2 * MIB
# Takes so many pages, and as many as there are beyond them; then sits on what it has.
TAKES = b"""
import mmap, os, sys, time
name, pages = "/dev/hugepages-2Mi/memory", int(sys.argv[1])
size = pages * 2097152
with open(name, "w+b") as file:
    file.truncate(size)
    taken = mmap.mmap(file.fileno(), size)
    for at in range(0, size, 4096):
        taken[at] = 1
    os.write(1, b"took %d\\n" % pages)
    with open(name + "2", "w+b") as more:
        more.truncate(2097152)
        try:
            mmap.mmap(more.fileno(), 2097152)
        except OSError as error:
            os.write(1, b"no more: %d\\n" % error.errno)
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[int]:
    """How many pages there are; some of them are the test's. The kernel's pool is afterwards what it was."""
    if not _POOL.exists():
        pytest.skip("this kernel has no hugepages of 2 MiB")
    before = int(_POOL.read_text())
    try:
        with contextlib.suppress(OSError):
            _POOL.write_text(f"{before + _MORE}\n")
        if free_bytes(PAGE) < _MORE * PAGE:
            pytest.skip(f"this kernel finds no {_MORE} free hugepages")
        yield int(_POOL.read_text())
    finally:
        with contextlib.suppress(OSError):
            _POOL.write_text(f"{before}\n")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node(pool: int) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - read when the agent starts
    with lab():
        async with agent_fleet() as made:
            await made.start()
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(node: AgentFleet) -> AsyncIterator[AgentFleet]:
    async with one_test(node):
        yield node


def taking(number: int, pages: int, asked: int) -> Assignment:
    task = Task(
        name=TaskName("app"),
        command=("python3", "-u", "${task.dir}/take.py", str(pages)),
        files=(File(path="take.py", content=TAKES),),
        resources=Resources(hugepages={"2Mi": asked * PAGE}),
        kill_timeout_s=0.1,
    )
    group = Group(name=GroupName("web"), tasks=(task,), restart=RestartPolicy(attempts=0))
    return Assignment(alloc=alloc_id(number), job=JobName("job"), job_version=1, group=group, index=0)


async def ended(fleet: AgentFleet, number: int) -> AllocReport:
    alloc = alloc_id(number)
    await until(lambda: fleet.controller.status(alloc) is AllocStatus.FAILED, "its end")
    return fleet.controller.reports[alloc]


async def test_a_task_has_the_pages_that_it_asked_for_and_gives_them_back(fleet: AgentFleet, pool: int) -> None:
    found = codec.from_wire(fleet.controller.hellos[-1].node.fingerprint, Fingerprint)
    assert [one for one in found.hugepages if one.page == "2Mi"] == [Hugepages(page="2Mi", total=pool, free=pool)]
    fleet.controller.assign(taking(1, 3, asked=3), full=True)
    log = fleet.data / "allocations" / alloc_id(1) / "app/log"
    await until(lambda: log.exists() and "no more" in log.read_text(), "it has all that it may have")
    said = [line.split(" ", 3)[3] for line in log.read_text().splitlines()]
    assert said == ["took 3", f"no more: {errno.ENOMEM}"]
    assert free_bytes(PAGE) == (pool - 3) * PAGE
    fleet.controller.assign(full=True)
    await until(lambda: free_bytes(PAGE) == pool * PAGE, "they are the kernel's again")


async def test_pages_that_somebody_else_has_are_told(fleet: AgentFleet, pool: int) -> None:
    fleet.controller.assign(taking(1, 1, asked=pool + 1), full=True)
    report = await ended(fleet, 1)
    assert f"hugepages-2Mi: {pool + 1} pages are wanted, {pool} are free" in report.message
    assert "outside of the fleet" in report.message
