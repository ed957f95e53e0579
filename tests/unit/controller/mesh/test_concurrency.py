"""Many requests at once, some of which fail: what is raised, and what is left behind."""

import asyncio

import pytest

from controller.mesh.concurrency import each
from outrider.errors import PeerError


async def test_the_first_failure_is_raised_and_nothing_further_begins() -> None:
    begun: list[int] = []

    async def act(item: int) -> None:
        begun.append(item)
        await asyncio.sleep(0)
        if item == 1:
            raise PeerError("away")

    with pytest.raises(PeerError, match="away"):
        await each(range(100), act, at_once=2, name="test")
    assert set(begun) <= {0, 1, 2}


async def test_after_a_failure_a_timeout_of_the_same_task_is_still_one() -> None:
    """A task that goes on after it must not be ended by the next deadline that passes."""

    async def fail(_item: int) -> None:
        await asyncio.sleep(0)
        raise PeerError("away")

    with pytest.raises(PeerError):
        await each([1, 2], fail, at_once=2, name="test")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


async def test_who_is_cancelled_is_and_so_is_all_that_was_begun() -> None:
    ended: list[int] = []

    async def hang(item: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    task = asyncio.create_task(each([1, 2], hang, at_once=2, name="test"), name="each")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [1, 2]
