"""Disks that are full, really: the data directory of a controller, or an agent, is a small file system of its own."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio

from agent.sandbox.mounts import mount_tmpfs, resize_tmpfs, unmount
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.allocation import AllocStatus
from outrider.model.job import MIB, Group, Job, Task
from outrider.v1 import operator_pb2
from tests.integration.agent_fleet import agent_fleet
from tests.integration.controllers import Controller, submit
from tests.integration.network_lab import Lab, node
from tests.integration.processes import until
from tests.integration.test_agent import BATCH, WEB, running, script, web

__all__ = ["node"]

pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(120)]

SIZE_BYTES = 4 * MIB
JOBS_MAX = 400  # of 32 KiB each, all different: far more than that


@pytest_asyncio.fixture
async def cramped(tmp_path: Path) -> AsyncIterator[Controller]:
    """A controller whose disk is small."""
    controller = Controller(tmp_path)
    controller.data.mkdir(mode=0o700)
    mount_tmpfs(controller.data, size_bytes=SIZE_BYTES, uid=0, mode=0o700)
    try:
        await controller.start()
        yield controller
    finally:
        await controller.kill()
        unmount(controller.data)


def large(number: int) -> Job:
    task = Task(name=TaskName("main"), command=("true",), env={"WORDS": f"{number:032d}" * 1024})
    return Job(name=JobName(f"job-{number}"), groups=(Group(name=GroupName("g"), count=0, tasks=(task,)),))


async def known(controller: Controller) -> set[str]:
    async with controller.operator() as stub:
        answer = await stub.ListJobs(operator_pb2.ListJobsRequest(), timeout=20)
    return {one.name for one in answer.jobs}


async def test_a_controller_whose_disk_is_full_says_so_and_has_lost_nothing_once_there_is_room(
    cramped: Controller,
) -> None:
    acknowledged: set[str] = set()
    async with cramped.operator() as stub:
        with contextlib.suppress(grpc.aio.AioRpcError):
            for number in range(JOBS_MAX):
                await submit(stub, large(number))
                acknowledged.add(f"job-{number}")
    assert 0 < len(acknowledged) < JOBS_MAX
    process = cramped.process
    assert process is not None
    await until(lambda: process.returncode is not None, "it ends: it may acknowledge nothing more")
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "The disk is full: make room and start the controller again" in cramped.log.read_text()

    resize_tmpfs(cramped.data, size_bytes=64 * MIB)
    await cramped.start()
    assert acknowledged <= await known(cramped)
    async with cramped.operator() as stub:
        await submit(stub, large(JOBS_MAX))


@contextlib.contextmanager
def filled(directory: Path) -> Iterator[None]:
    """Not a byte is free there."""
    free = os.statvfs(directory)
    file = directory / "filler"
    with file.open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize)
    try:
        yield
    finally:
        file.unlink()


async def test_what_runs_on_a_node_whose_disk_is_full_runs_on_and_more_starts_once_there_is_room(
    node: Lab,  # noqa: ARG001 - it is where this thread then lives
) -> None:
    async with agent_fleet() as fleet:
        fleet.data.mkdir(mode=0o711)
        mount_tmpfs(fleet.data, size_bytes=64 * MIB, uid=0, mode=0o711)
        try:
            await fleet.start()
            fleet.controller.mesh()
            fleet.controller.assign(web(), full=True)
            await running(fleet)
            before = fleet.workload_pids(f"marked-{WEB}")
            with filled(fleet.data):
                process = fleet.process
                assert process is not None
                fleet.controller.assign(script(BATCH, "exit 0"))
                await until(lambda: process.poll() is not None, "it ends: what it cannot remember it must not do")
                said = fleet.log().splitlines()[-1]
                assert said.startswith(f"agent: {fleet.data}"), "in one line, where and what"
                assert "No space left on device" in said
                assert fleet.workload_pids(f"marked-{WEB}") == before
            await fleet.start()
            fleet.controller.assign(web(), script(BATCH, "exit 0"), full=True)
            await until(lambda: fleet.controller.status(BATCH) is AllocStatus.COMPLETE, "it ran")
            await running(fleet)
            assert fleet.workload_pids(f"marked-{WEB}") == before
        finally:
            if fleet.process is not None:
                fleet.kill()
            fleet.purge()
            unmount(fleet.data)
