"""Many requests, a few at once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from outrider.errors import OutriderError

T = TypeVar("T")


async def each(items: Iterable[T], act: Callable[[T], Awaitable[None]], *, at_once: int, name: str) -> None:
    """`act` on every item. After a failure no further one begins, and the first is raised."""
    gate = asyncio.Semaphore(at_once)
    failures: list[OutriderError] = []

    async def one(item: T) -> None:
        async with gate:
            if failures:
                return
            try:
                await act(item)
            except OutriderError as error:
                # Not the group's: Python 3.11.2's TaskGroup leaves its task marked as cancelled after a failure, and
                # the next `asyncio.timeout` there that runs out then ends the task without a word.
                failures.append(error)

    async with asyncio.TaskGroup() as group:
        for number, item in enumerate(items):
            group.create_task(one(item), name=f"{name}-{number}")
    if failures:
        raise failures[0]
