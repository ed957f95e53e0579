"""Simulated time: everything happens in one order, which the seed alone decides. Owns clock, dice and trace."""

import hashlib
import heapq
import random
from collections.abc import Callable

Act = Callable[[], None]


class BrokenError(AssertionError):
    """A promise does not hold; the seed and the trace say how it came to that."""

    trace: tuple[str, ...] = ()


class Kernel:
    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.rng = random.Random(seed)  # noqa: S311  a seeded simulation
        self.now_s = 0.0
        self.trace: list[str] = []
        self.events = 0
        self._tracing = tracing
        self._digest = hashlib.blake2b(digest_size=16)
        self._queue: list[tuple[float, int, Act]] = []
        self._count = 0

    def at(self, delay_s: float, act: Act) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, act))

    def note(self, who: str, what: str) -> None:
        line = f"{self.now_s:9.4f} {who:<4} {what}"
        self._digest.update(line.encode())
        if self._tracing:
            self.trace.append(line)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._queue)
            self.events += 1
            act()
        self.now_s = until_s

    @property
    def digest(self) -> str:
        """Of all that was noted: two runs of one seed have the same."""
        return self._digest.hexdigest()


class Process:
    """Something with a life: what it left to be done dies with it; what is stopped (SIGSTOP) does it later."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel, self.name = kernel, name
        self.life = 0
        self.alive = False
        self.frozen = False
        self._thaw: list[Act] = []

    def later(self, delay_s: float, act: Act) -> None:
        life = self.life

        def due() -> None:
            if self.alive and self.life == life:
                self.now(act)

        self.kernel.at(delay_s, due)

    def now(self, act: Act) -> None:
        """At once, or as soon as it goes on."""
        if self.frozen:
            self._thaw.append(act)
        else:
            act()

    def begin_life(self) -> None:
        self.life += 1
        self.alive, self.frozen, self._thaw = True, False, []

    def end_life(self) -> None:
        self.alive, self.frozen, self._thaw = False, False, []

    def freeze(self) -> None:
        self.frozen = self.alive

    def thaw(self) -> None:
        self.frozen = False
        life, waiting, self._thaw = self.life, self._thaw, []
        for act in waiting:
            if self.alive and self.life == life:
                self.now(act)

    def note(self, what: str) -> None:
        self.kernel.note(self.name, what)
