"""What a copy of a scaled group has to do, from two readings of its counters."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from agent.held import Held
from agent.load import Counters, Load, counted, load
from agent.uids import AllocUids
from outrider.errors import PeerError
from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import AllocFigures, Assignment
from outrider.model.job import Group, Protocol, Resources, ScalingMetric, ScalingPolicy, Service, Task, TaskRole


@dataclass(frozen=True, kw_only=True)
class Pair:
    destination: str
    requests: tuple[tuple[str, int], ...] = ()
    requests_active: int = 0
    latency_count: int = 0
    latency_sum_ms: float = 0.0
    connections: int = 0
    connections_active: int = 0


def group(metric: ScalingMetric) -> Group:
    port = PortName("http")
    return Group(
        name=GroupName("web"),
        tasks=(
            Task(name=TaskName("first"), role=TaskRole.INIT, resources=Resources(cpu_millis=5000)),
            Task(name=TaskName("main"), resources=Resources(cpu_millis=200)),
            Task(name=TaskName("helper"), role=TaskRole.HELPER, resources=Resources(cpu_millis=300)),
        ),
        services=(
            Service(name=ServiceName("web"), port=port, protocol=Protocol.HTTP),
            Service(name=ServiceName("db"), port=port),
        ),
        scaling=ScalingPolicy(count_max=3, metric=metric, target=1.0),
    )


PAIRS = (
    Pair(
        destination="web",
        requests=(("2xx", 90), ("5xx", 10)),
        requests_active=3,
        latency_count=100,
        latency_sum_ms=5000.0,
        connections=7,
        connections_active=7,
    ),
    Pair(destination="db", connections=40, connections_active=5),
)


def test_requests_of_http_and_connections_of_tcp_services_count() -> None:
    found = counted(group(ScalingMetric.REQUESTS), PAIRS, 10.0)
    assert found == Counters(at_s=10.0, requests=140, completed=100, busy_s=5.0, active=8)


def test_requests_are_told_by_the_second() -> None:
    before, now = Counters(at_s=10.0, requests=100), Counters(at_s=14.0, requests=300)
    assert load(group(ScalingMetric.REQUESTS), before, now) == 50.0


def test_concurrency_is_the_time_that_requests_took_together_or_what_is_under_way() -> None:
    wanted = group(ScalingMetric.CONCURRENCY)
    before = Counters(at_s=10.0, completed=100, busy_s=5.0, active=1)
    assert load(wanted, before, Counters(at_s=14.0, completed=180, busy_s=13.0, active=0)) == 2.0
    assert load(wanted, before, Counters(at_s=14.0, completed=100, busy_s=5.0, active=6)) == 6.0


def test_cpu_is_a_share_of_what_the_tasks_that_stay_reserve() -> None:
    before, now = Counters(at_s=10.0, cpu_s=1.0), Counters(at_s=14.0, cpu_s=2.0)
    assert load(group(ScalingMetric.CPU), before, now) == pytest.approx(50.0)


@pytest.mark.parametrize("now", [Counters(at_s=14.0, requests=5, cpu_s=9), Counters(at_s=14.0, requests=50, cpu_s=0.5)])
def test_what_began_anew_says_nothing(now: Counters) -> None:
    assert load(group(ScalingMetric.REQUESTS), Counters(at_s=10.0, requests=10, cpu_s=1.0), now) is None


@dataclass
class Node:
    """What the agent holds, and how often a sidecar does not answer."""

    held: tuple[Held, ...]
    away: set[str] = field(default_factory=set)
    asked: int = 0
    told: list[tuple[AllocFigures, ...]] = field(default_factory=list)

    async def sidecar(self, alloc: AllocId) -> "Stats":
        self.asked += 1
        if alloc in self.away:
            raise PeerError("its Envoy does not answer")
        return Stats(inbound=(Pair(destination="web", requests=(("2xx", 100 * self.asked),)),))


@dataclass(frozen=True, kw_only=True)
class Stats:
    inbound: Sequence[Pair]


def held(number: int, *, scaled: bool) -> Held:
    wanted = group(ScalingMetric.REQUESTS) if scaled else Group(name=GroupName("other"), tasks=())
    alloc = AllocId(f"{number:010x}")
    assignment = Assignment(alloc=alloc, job=JobName("shop"), job_version=1, group=wanted, index=0)
    return Held(assignment=assignment, uids=AllocUids(first=0, tasks=()), watchers={})


async def test_only_scaled_groups_are_measured_and_what_does_not_answer_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.load.INTERVAL_S", 0.01)
    node = Node(held=(held(1, scaled=True), held(2, scaled=False), held(3, scaled=True)), away={AllocId(f"{3:010x}")})
    told = asyncio.Event()

    def tell(figures: object) -> None:
        node.told.append(tuple(figures))  # type: ignore[arg-type]
        if len(node.told) == 3:
            told.set()

    groups = {one.assignment.alloc: one.assignment.group for one in node.held}
    measuring = Load(held=lambda: node.held, group=groups.get, cpu_s=lambda *_: 0.0, sidecar=node.sidecar, tell=tell)
    running = asyncio.create_task(measuring.run())
    async with asyncio.timeout(10):
        await told.wait()
    running.cancel()
    assert node.told[0] == (), "one reading says nothing yet"
    assert [[one.alloc for one in figures] for figures in node.told[1:]] == [[f"{1:010x}"]] * 2
