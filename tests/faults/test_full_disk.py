"""Disks that are full, really: a controller's data directory is a small file system of its own."""

import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio

from agent.sandbox.mounts import mount_tmpfs, resize_tmpfs, unmount
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.job import MIB, Group, Job, Task
from outrider.v1 import operator_pb2
from tests.integration.controllers import Controller, submit
from tests.integration.processes import until

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
