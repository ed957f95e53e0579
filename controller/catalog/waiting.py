"""Who waits for which topic: the blocking half of blocking queries. Owns no task."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress


class Waiters:
    """`wake` reaches exactly those who wait on one of its topics; `close` reaches all, for ever."""

    def __init__(self, waiting_max: int) -> None:
        self._events: dict[str, set[asyncio.Event]] = {}
        self._max = waiting_max
        self.waiting = 0
        self.closed = False

    @property
    def full(self) -> bool:
        return self.waiting >= self._max

    async def wait(self, topics: Iterable[str], timeout_s: float) -> None:
        """Until one of `topics` changes, at most `timeout_s`."""
        if self.closed:
            return
        event, topics = asyncio.Event(), tuple(topics)
        for topic in topics:
            self._events.setdefault(topic, set()).add(event)
        self.waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await event.wait()
        finally:
            self.waiting -= 1
            for topic in topics:
                self._events[topic].discard(event)
                if not self._events[topic]:
                    del self._events[topic]

    def wake(self, topics: Iterable[str]) -> None:
        for topic in topics:
            for event in self._events.get(topic, ()):
                event.set()

    def close(self) -> None:
        self.closed = True
        self.wake(tuple(self._events))
