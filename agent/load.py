"""How much the copies of scaled groups have to do: read from control groups and sidecars every few seconds.

Task: `run`. Looks at groups with `scaling:` alone; what cannot be read is left out, and the controller sees that.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, assert_never

from agent.held import Held
from outrider.clock import monotonic_s
from outrider.errors import PeerError
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import AllocFigures
from outrider.model.job import Group, ScalingMetric, TaskRole, Value
from outrider.model.job import Protocol as ServiceProtocol

INTERVAL_S = 3.0
ALLOCATIONS_MAX = 1000  # of one node, beyond which the rest is not measured
_AT_ONCE = 8


class Inbound(Protocol):
    """As sidecar.core.intent.PairStats has it."""

    @property
    def destination(self) -> str: ...
    @property
    def requests(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def requests_active(self) -> int: ...
    @property
    def latency_count(self) -> int: ...
    @property
    def latency_sum_ms(self) -> float: ...
    @property
    def connections(self) -> int: ...
    @property
    def connections_active(self) -> int: ...


class SidecarFigures(Protocol):
    @property
    def inbound(self) -> Sequence[Inbound]: ...


class Counters(Value, frozen=True, kw_only=True):
    """Totals since the sandbox or the sidecar began, and what is under way now."""

    at_s: float
    requests: int = 0  # connections, of tcp services
    completed: int = 0
    busy_s: float = 0.0  # that the completed requests took, together
    active: int = 0
    cpu_s: float = 0.0


class Load:
    """Asks where it is known: an allocation's `group` as it is wanted now, a task's `cpu_s`, a `sidecar`'s figures.

    `tell` never waits.
    """

    def __init__(
        self,
        *,
        held: Callable[[], tuple[Held, ...]],
        group: Callable[[AllocId], Group | None],
        cpu_s: Callable[[AllocId, TaskName], float],
        sidecar: Callable[[AllocId], Awaitable[SidecarFigures]],
        tell: Callable[[Iterable[AllocFigures]], None],
    ) -> None:
        self._held = held
        self._group = group
        self._cpu_s = cpu_s
        self._sidecar = sidecar
        self._tell = tell
        self._before: dict[AllocId, Counters] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            found = ((held, self._group(held.assignment.alloc)) for held in self._held())
            scaled = [(held, group) for held, group in found if group is not None and group.scaling is not None]
            scaled = scaled[:ALLOCATIONS_MAX]
            known = {held.assignment.alloc for held, _ in scaled}
            self._before = {alloc: counters for alloc, counters in self._before.items() if alloc in known}
            if scaled:
                self._tell(await self._measure(scaled))

    async def _measure(self, scaled: list[tuple[Held, Group]]) -> list[AllocFigures]:
        gate = asyncio.Semaphore(_AT_ONCE)
        found: list[AllocFigures] = []

        async def one(held: Held, group: Group) -> None:
            alloc = held.assignment.alloc
            async with gate:
                try:
                    now = await self._read(held, group)
                except (PeerError, KeyError):
                    return  # its sidecar starts, or is gone
            before, self._before[alloc] = self._before.get(alloc), now
            value = load(group, before, now) if before is not None else None
            if value is not None:
                found.append(AllocFigures(alloc=alloc, load=value))

        async with asyncio.TaskGroup() as tasks:
            for held, group in scaled:
                tasks.create_task(one(held, group), name=f"{held.assignment.alloc}-load")
        return found

    async def _read(self, held: Held, group: Group) -> Counters:
        alloc = held.assignment.alloc
        if group.scaling is not None and group.scaling.metric is ScalingMetric.CPU:
            names = [task.name for task in group.tasks if task.role is not TaskRole.INIT]
            cpu_s = sum(self._cpu_s(alloc, name) for name in names if name in held.watchers)
            return Counters(at_s=monotonic_s(), cpu_s=cpu_s)
        return counted(group, (await self._sidecar(alloc)).inbound, monotonic_s())


def counted(group: Group, pairs: Sequence[Inbound], at_s: float) -> Counters:
    """What the sidecar has counted for all services of `group`."""
    tcp = {service.name for service in group.services if service.protocol is ServiceProtocol.TCP}
    plain = [pair for pair in pairs if pair.destination in tcp]
    http = [pair for pair in pairs if pair.destination not in tcp]
    return Counters(
        at_s=at_s,
        requests=sum(count for pair in http for _, count in pair.requests) + sum(pair.connections for pair in plain),
        completed=sum(pair.latency_count for pair in http),
        busy_s=sum(pair.latency_sum_ms for pair in http) / 1000,
        active=sum(pair.requests_active for pair in http) + sum(pair.connections_active for pair in plain),
    )


def load(group: Group, before: Counters, now: Counters) -> float | None:
    """What one copy of `group` had to do between the two; None where nobody can say: it began anew."""
    passed_s = now.at_s - before.at_s
    restarted = now.requests < before.requests or now.cpu_s < before.cpu_s or now.completed < before.completed
    if group.scaling is None or passed_s <= 0 or restarted:
        return None
    match group.scaling.metric:
        case ScalingMetric.REQUESTS:
            return (now.requests - before.requests) / passed_s
        case ScalingMetric.CONCURRENCY:
            # Little's law: the time that requests took together is the mean number under way, however short each is.
            # What does not end, streams and connections, shows in what is under way now.
            return (now.busy_s - before.busy_s) / passed_s if now.completed > before.completed else float(now.active)
        case ScalingMetric.CPU:
            reserved = sum(task.resources.cpu_millis for task in group.tasks if task.role is not TaskRole.INIT)
            return 100_000 * (now.cpu_s - before.cpu_s) / passed_s / reserved
        case _:
            assert_never(group.scaling.metric)
