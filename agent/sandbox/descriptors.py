"""Waits for file descriptors without a transport or a task: nothing is read ahead, so nothing is buffered."""

import asyncio


async def readable(*descriptors: int) -> None:
    """Return once one of them can be read, or has reached its end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    for descriptor in descriptors:
        loop.add_reader(descriptor, _settle, ready)
    try:
        await ready
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)


async def writable(descriptor: int) -> None:
    """Return once it takes more, or its reader is gone."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(descriptor, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
