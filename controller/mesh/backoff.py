"""Pauses between tries: doubling, jittered, bounded. For waiting on Consul; never gives up."""

import asyncio
import random

_FIRST_S, _LAST_S = 0.05, 3.0


class Backoff:
    """`pause` after each failure, `reset` after a success."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    async def pause(self) -> None:
        delay_s, self._next_s = self._next_s, min(self._next_s * 2, _LAST_S)
        await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))  # noqa: S311 -- spreads load, guards nothing

    def reset(self) -> None:
        self._next_s = _FIRST_S
