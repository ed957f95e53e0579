"""Many requests, a few at once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def each(items: Iterable[T], act: Callable[[T], Awaitable[None]], *, at_once: int, name: str) -> None:
    """`act` on every item; the first failure cancels the rest and is raised."""
    gate = asyncio.Semaphore(at_once)

    async def one(item: T) -> None:
        async with gate:
            await act(item)

    try:
        async with asyncio.TaskGroup() as group:
            for number, item in enumerate(items):
                group.create_task(one(item), name=f"{name}-{number}")
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
