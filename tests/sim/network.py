"""Links between processes, and the streams on them.

A stream is what TCP makes of a bad network: bytes come late, in bursts, or not at all, but in order; what a broken
stream still had on the way is lost, and a new stream of the same pair may overtake the old one. A cut link swallows
nothing: TCP sends again, until an end gives up.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.kernel import Kernel, Process

SLOW_SHARE = 0.02


class Network:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._cut: dict[tuple[str, str], int] = {}
        self._stalled: list[Direction] = []
        self.slow = 0.0  # added to each delay at random

    def cut(self, source: str, target: str) -> None:
        self._cut[source, target] = self._cut.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        left = self._cut.get((source, target), 0) - 1
        if left > 0:
            self._cut[source, target] = left
        else:
            self._cut.pop((source, target), None)
        self._wake()

    def heal_all(self) -> None:
        self._cut.clear()
        self.slow = 0.0
        self._wake()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cut

    def delay_s(self) -> float:
        rng = self.kernel.rng
        delay_s = rng.uniform(0.0005, 0.005)
        if self.kernel.chance(SLOW_SHARE):
            delay_s += rng.uniform(0.01, 0.5)
        return delay_s + rng.random() * self.slow

    def stalled(self, direction: "Direction") -> None:
        self._stalled.append(direction)

    def _wake(self) -> None:
        stalled, self._stalled = self._stalled, []
        for direction in stalled:
            direction.pump()


class Direction:
    """One half of a stream. `deliver(None)` is its end."""

    def __init__(self, network: Network, source: str, target: str, deliver: Callable[[Any], None]) -> None:
        self._network, self._source, self._target, self._deliver = network, source, target, deliver
        self._queue: deque[Any] = deque()
        self._pumping = False
        self.dead = False

    def send(self, message: object) -> None:
        if self.dead:
            return
        self._queue.append(message)
        if not self._pumping:
            self.pump()

    def pump(self) -> None:
        self._pumping = True
        self._network.kernel.at(self._network.delay_s(), self._arrive)

    def abandon(self, *, keep: int = 0) -> None:
        """The sender is gone: of what is on the way only the first few arrive."""
        while len(self._queue) > keep:
            self._queue.pop()

    def _arrive(self) -> None:
        if self.dead or not self._queue:
            self._pumping = False
        elif self._network.is_cut(self._source, self._target):
            self._network.stalled(self)
        else:
            self._deliver(self._queue.popleft())
            if self._queue and not self.dead:
                self.pump()
            else:
                self._pumping = False


class Stream:
    """Between an agent and a controller; each end hears what the other sends, and its end as None."""

    def __init__(self, network: Network, agent: Process, controller: Process) -> None:
        self._network = network
        self.agent, self.controller = agent, controller
        self.to_agent: Callable[[Any], None] = lambda _message: None
        self.to_controller: Callable[[Any], None] = lambda _message: None
        self.session = 0
        self._down = Direction(network, controller.name, agent.name, lambda message: self._hear(agent, message))
        self._up = Direction(network, agent.name, controller.name, lambda message: self._hear(controller, message))
        self._lives = {agent.name: agent.life, controller.name: controller.life}

    def send(self, by: Process, message: object) -> None:
        self._from(by).send(message)

    def close(self, by: Process, *, lost: bool) -> None:
        """`lost`: a reset, which throws away what was not taken yet."""
        direction = self._from(by)
        if lost:
            direction.abandon(keep=self._network.kernel.rng.randrange(3))
        direction.send(None)
        self._to(by).dead = True

    def vanish(self) -> None:
        """The host lost its power: nobody says anything any more."""
        self._up.dead = self._down.dead = True

    def _from(self, by: Process) -> Direction:
        return self._up if by is self.agent else self._down

    def _to(self, by: Process) -> Direction:
        return self._down if by is self.agent else self._up

    def _hear(self, who: Process, message: object) -> None:
        if not who.alive or who.life != self._lives[who.name]:
            return
        heard = self.to_agent if who is self.agent else self.to_controller
        who.now(lambda: heard(message))
