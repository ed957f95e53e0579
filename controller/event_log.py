"""The fleet's events: numbered, the newest kept, told to whoever listens. No task of its own.

Queues: one for each listener, LISTENER_EVENTS_MAX long. A listener that lets it fill up is ended, never silently
skipped; it reads again from the sequence it knows.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable

import msgspec

from outrider.clock import wall_s
from outrider.errors import RefusedError
from outrider.model.fleet import FleetEvent

KEPT_EVENTS_MAX = 10_000
LISTENER_EVENTS_MAX = 1024
LISTENERS_MAX = 256


class EventLog:
    """Sequences only grow within a controller's life, and begin above those of the life before."""

    def __init__(self) -> None:
        self._kept: deque[FleetEvent] = deque(maxlen=KEPT_EVENTS_MAX)
        self._listeners: set[_Listener] = set()
        # Milliseconds of the start: a listener that comes back after a restart with an old sequence misses nothing.
        self._sequence = itertools.count(int(wall_s() * 1000))
        self.forward: Callable[[FleetEvent], None] | None = None  # to the broker, where there is one

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def publish(self, event: FleetEvent) -> None:
        stamped = msgspec.structs.replace(event, sequence=next(self._sequence), at_s=wall_s())
        self._kept.append(stamped)
        for listener in self._listeners:
            listener.put(stamped)
        if self.forward is not None:
            self.forward(stamped)

    def kept(self, after: int) -> tuple[FleetEvent, ...]:
        return tuple(event for event in self._kept if event.sequence > after)

    async def follow(self, after: int) -> AsyncGenerator[FleetEvent, None]:
        """What is kept beyond `after`, then everything as it comes. Raises RefusedError("slow-listener")."""
        if len(self._listeners) >= LISTENERS_MAX:
            raise RefusedError("too-many-listeners", f"{LISTENERS_MAX} listeners follow the events already; end one")
        kept = self.kept(after)
        listener = _Listener()
        self._listeners.add(listener)
        try:
            for event in kept:
                yield event
            while True:
                yield await listener.get()
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[FleetEvent] = asyncio.Queue(LISTENER_EVENTS_MAX)
        self._overrun = False

    def put(self, event: FleetEvent) -> None:
        if self._queue.full():
            self._overrun = True
        else:
            self._queue.put_nowait(event)

    async def get(self) -> FleetEvent:
        if self._overrun:
            raise RefusedError(
                "slow-listener",
                f"more than {LISTENER_EVENTS_MAX} events waited for this listener; follow again from the last sequence",
            )
        return await self._queue.get()
