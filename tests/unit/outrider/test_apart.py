"""Work in a task of its own: its failures, and its waiter's cancellation, stay what they are."""

import asyncio

import pytest

from outrider.apart import apart
from outrider.errors import PeerError


async def _fail(when: asyncio.Event | None = None) -> None:
    if when is not None:
        await when.wait()
    raise PeerError("away")


async def _group_that_fails_at_its_end() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_fail(), name="fails")


async def test_a_result_is_handed_on() -> None:
    async def work() -> int:
        return 7

    assert await apart(work(), name="work") == 7


async def test_after_a_failed_group_a_timeout_of_the_same_task_is_still_one() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await apart(_group_that_fails_at_its_end(), name="work")
    assert [str(each) for each in caught.value.exceptions] == ["away"]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


async def test_who_is_cancelled_ends_and_so_does_the_work() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(apart(work(), name="work"), name="waiter")
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_cancellation_that_comes_together_with_a_failure_is_not_dropped() -> None:
    unwinds, failing = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_fail(failing), name="fails")
            try:
                await asyncio.Event().wait()
            finally:
                unwinds.set()
                await asyncio.Event().wait()

    async def waiter() -> None:
        try:
            await apart(work(), name="work")
        except* PeerError:
            await asyncio.Event().wait()  # as who takes it for a failure and goes on

    task = asyncio.create_task(waiter(), name="waiter")
    failing.set()
    await unwinds.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await task
