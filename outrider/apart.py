"""Work in a task of its own, for who goes on after its failure: what Python 3.11.2's TaskGroup leaves stays there.

A group whose child fails while it waits at its end leaves its task marked as cancelled: each later `asyncio.timeout` of
that task that runs out is then a cancellation, which ends the task without a word. And a group drops the cancellation
that comes together with a failure: the task that was to end goes on.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def apart(work: Coroutine[Any, Any, T], *, name: str) -> T:
    """What `work` returns or raises; CancelledError where this task was cancelled meanwhile, whatever `work` raises."""
    task = asyncio.create_task(work, name=name)
    try:
        return await task
    except Exception as error:
        waiting = asyncio.current_task()
        if waiting is not None and waiting.cancelling():
            raise asyncio.CancelledError from error
        raise
