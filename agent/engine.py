"""The agent's one loop: events in, `step`, commands out. Decides nothing and does nothing itself.

Task: the loop. Queue: events, EVENTS_MAX; when it is full whoever has one to tell waits.
"""

import asyncio
import random
from collections.abc import Callable

from agent.core.commands import Command
from agent.core.events import Event, Tick
from agent.core.state import State, next_deadline_s
from agent.core.step import all_reports, step
from outrider.clock import uptime_s
from outrider.ids import AllocId
from outrider.model.allocation import AllocReport, Generation
from outrider.model.job import Group

EVENTS_MAX = 4096
_LOOK_S = 5.0  # timers stand still while the host sleeps: look at its clock at least that often


class Engine:
    def __init__(self, *, rng: random.Random) -> None:
        self._rng = rng
        self._state = State(allocs={}, strays={})
        self._queue: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)

    @property
    def acknowledged(self) -> Generation:
        return self._state.acknowledged

    def group(self, alloc: AllocId) -> Group | None:
        """As it is wanted now; None of one that is not known."""
        known = self._state.allocs.get(alloc)
        return known.assignment.group if known is not None else None

    def reports(self) -> tuple[AllocReport, ...]:
        return all_reports(self._state)

    async def tell(self, event: Event) -> None:
        await self._queue.put(event)

    def begin(self, event: Event, *, execute: Callable[[Command], None]) -> None:
        """The first event, before the loop runs and before the controller is greeted.

        `execute` begins a command and returns at once; its outcome comes back through `tell`.
        """
        self._execute = execute
        self._take(event)

    async def run(self) -> None:
        while True:
            self._take(await self._next())

    def _take(self, event: Event) -> None:
        for command in step(self._state, event, uptime_s(), self._rng):
            self._execute(command)

    async def _next(self) -> Event:
        """What was told; a Tick once one is due, however much is told meanwhile."""
        remaining_s = next_deadline_s(self._state) - uptime_s()
        if remaining_s <= 0:
            return Tick()
        try:
            async with asyncio.timeout(min(remaining_s, _LOOK_S)):
                return await self._queue.get()
        except TimeoutError:
            return Tick()
