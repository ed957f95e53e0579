"""The node's metrics: few, named alike, and bounded however many sidecars and services there are."""

import asyncio
import re
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.metrics import PAIRS_MAX, Inside, NodeFigures, Workload, http_listener
from agent.qmp.inside import InsideUsage
from agent.sandbox.spec import Usage
from outrider.errors import PeerError
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import AllocReport, AllocStatus, TaskReport
from sidecar.bootstrap import LATENCY_BUCKETS_MS
from sidecar.core.intent import PairStats, SidecarStats
from tests.integration.processes import free_port

LABELS = {
    "cluster", "node", "version", "status", "service", "job", "group", "alloc", "task", "source", "destination",
    "direction", "code_class", "le",
}  # fmt: skip
PAIR_SERIES_MAX = len(LATENCY_BUCKETS_MS) + 1 + 2 + 5 + 5  # buckets, sum and count, classes of codes, the plain ones


class Node:
    """A node with so many allocations, each calling all the services of the fleet."""

    def __init__(self, allocs: int, services: int) -> None:
        self.allocs = tuple(AllocId(f"{number:010x}") for number in range(allocs))
        self.services = [f"service-{number}" for number in range(services)]
        self.silent: set[AllocId] = set()

    def node(self) -> NodeFigures:
        return NodeFigures(
            cluster="test", node="n1", connected=True, broker_connected=False, broker_dropped=0, refusals_dropped=0,
            leaf_expiries={"web": 1.0},
        )  # fmt: skip

    def reports(self) -> tuple[AllocReport, ...]:
        tasks = (TaskReport(name=TaskName("server"), restarts=1),)
        return tuple(AllocReport(alloc=alloc, status=AllocStatus.RUNNING, tasks=tasks) for alloc in self.allocs)

    def workloads(self) -> tuple[Workload, ...]:
        usage = Usage(cpu_s=1.5, memory_bytes=1024, oom_kills=0)
        return tuple(
            Workload(job="shop", group="web", alloc=alloc, task=task, usage=usage)
            for alloc in self.allocs
            for task in ("server", "sidecar")
        )

    async def guests(self) -> tuple[Inside, ...]:
        silent, told = InsideUsage(), InsideUsage(memory_bytes=128, memory_used_bytes=28, cpu_s=2.5)
        return tuple(
            Inside(job="shop", group="db", alloc=alloc, task="machine", usage=usage)
            for alloc, usage in ((self.allocs[0], told), (AllocId("f" * 10), silent))
        )

    async def refused(self) -> dict[AllocId, int]:
        return dict.fromkeys((*self.allocs, AllocId("0" * 10)), 7)

    def sidecars(self) -> tuple[AllocId, ...]:
        return self.allocs

    async def sidecar(self, alloc: AllocId) -> SidecarStats:
        if alloc in self.silent:
            raise PeerError("no answer")
        buckets = tuple((bound, 3) for bound in LATENCY_BUCKETS_MS)
        return SidecarStats(
            alloc=alloc,
            outbound=tuple(
                PairStats(
                    source="web", destination=service, requests=tuple((f"{digit}xx", 1) for digit in range(1, 6)),
                    latency_ms=buckets, latency_count=3, latency_sum_ms=6.0, connections=1, connections_active=1,
                )
                for service in self.services
            ),
            inbound=(PairStats(source="", destination="web", connections=2, connections_active=1, refused=1),),
        )  # fmt: skip


async def scrape(node: Node) -> Iterator[tuple[str, dict[str, str], float]]:
    port = free_port()
    async with http_listener(f"127.0.0.1:{port}", node):

        def read() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                return answer.read().decode()

        text = await asyncio.to_thread(read)
    families = text_string_to_metric_families(text)
    return ((sample.name, sample.labels, sample.value) for family in families for sample in family.samples)


@pytest.mark.parametrize(("allocs", "services"), [(1, 1), (20, 5), (50, PAIRS_MAX + 100)])
async def test_series_grow_with_allocations_and_pairs_and_are_bounded(
    allocs: int, services: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.metrics._SCRAPE_S", 30.0)  # a busy machine takes its time: how many, not how fast
    samples = list(await scrape(Node(allocs, services)))
    pairs = min(services + 1, PAIRS_MAX)
    fixed, each = 40, 15  # of the node, and of one allocation with one task and its sidecar
    assert len(samples) <= fixed + each * allocs + PAIR_SERIES_MAX * pairs
    assert {name for _, labels, _ in samples for name in labels} <= LABELS
    assert all(re.fullmatch(r"outrider_(agent|workload|guest|sidecar|mesh)_[a-z_]+", name) for name, _, _ in samples)
    hidden = {name: value for name, _, value in samples}["outrider_mesh_pairs_hidden"]
    assert (hidden > 0) == (services > PAIRS_MAX)


async def test_a_pair_is_one_however_many_sidecars_count_it() -> None:
    samples = list(await scrape(Node(allocs=20, services=1)))
    found = [value for name, labels, value in samples if name == "outrider_mesh_connections_total" and labels["source"]]
    assert found == [20]


async def test_packets_that_were_refused_are_told_of_those_that_run() -> None:
    samples = await scrape(Node(allocs=2, services=1))
    found = [value for name, _, value in samples if name == "outrider_workload_refused_packets_total"]
    assert found == [7, 7]


async def test_a_guest_has_the_figures_that_it_tells() -> None:
    samples = [(name, value) for name, _, value in await scrape(Node(allocs=1, services=1)) if "_guest_" in name]
    assert samples == [
        ("outrider_guest_cpu_seconds_total", 2.5),
        ("outrider_guest_memory_bytes", 128),
        ("outrider_guest_memory_used_bytes", 28),
    ]


async def test_a_sidecar_that_does_not_answer_is_down_and_hides_no_other() -> None:
    node = Node(allocs=3, services=1)
    node.silent = {node.allocs[1]}
    up = {labels["alloc"]: value for name, labels, value in await scrape(node) if name == "outrider_sidecar_up"}
    assert up == {node.allocs[0]: 1, node.allocs[1]: 0, node.allocs[2]: 1}
