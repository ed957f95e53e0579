"""The node's metrics, all of them, and the plain HTTP listener for Prometheus where it is configured.

Read when scraped: an unscraped node pays nothing. Figures of a service pair are sums over this node's sidecars, so
that label sets grow with services and not with allocations; beyond PAIRS_MAX pairs they are counted, not shown.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.qmp.inside import InsideUsage
from agent.sandbox.spec import Usage
from outrider import __version__
from outrider.config import host_port
from outrider.errors import ConfigError, PeerError
from outrider.ids import AllocId
from outrider.model.allocation import AllocReport, AllocStatus
from outrider.model.job import Value

PAIRS_MAX = 500
_STATS_S = 2.0  # for all sidecars together: Prometheus itself waits for ten
_STATS_AT_ONCE = 8
_SCRAPE_S = 9.0  # for all of a scrape, the loop's own delay included: Prometheus waits for ten
_WORKLOAD_LABELS = ("job", "group", "alloc", "task")
_PAIR_LABELS = ("source", "destination")


class Pair(Protocol):
    """As sidecar.core.intent.PairStats has it."""

    @property
    def source(self) -> str: ...
    @property
    def destination(self) -> str: ...
    @property
    def requests(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def errors(self) -> int: ...
    @property
    def latency_ms(self) -> tuple[tuple[float, int], ...]: ...
    @property
    def latency_count(self) -> int: ...
    @property
    def latency_sum_ms(self) -> float: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def connections(self) -> int: ...
    @property
    def connections_active(self) -> int: ...
    @property
    def refused(self) -> int: ...


class SidecarFigures(Protocol):
    """As sidecar.core.intent.SidecarStats has it."""

    @property
    def alloc(self) -> AllocId: ...
    @property
    def inbound(self) -> Sequence[Pair]: ...
    @property
    def outbound(self) -> Sequence[Pair]: ...


class Workload(Value, frozen=True, kw_only=True):
    """One task, or one sidecar, and what it uses."""

    job: str
    group: str
    alloc: str
    task: str
    usage: Usage


class Inside(Value, frozen=True, kw_only=True):
    """A guest that runs, and what it says of itself."""

    job: str
    group: str
    alloc: str
    task: str
    usage: InsideUsage


class NodeFigures(Value, frozen=True, kw_only=True):
    """What the agent knows of itself."""

    cluster: str
    node: str
    connected: bool
    broker_connected: bool
    broker_dropped: int
    refusals_dropped: int
    leaf_expiries: Mapping[str, float]
    certificate_expires_at_s: float = 0.0


class Figures(Protocol):
    """Where the figures come from."""

    def node(self) -> NodeFigures: ...
    def reports(self) -> tuple[AllocReport, ...]: ...
    def workloads(self) -> tuple[Workload, ...]: ...
    async def guests(self) -> tuple[Inside, ...]: ...
    async def refused(self) -> Mapping[AllocId, int]: ...
    def sidecars(self) -> tuple[AllocId, ...]: ...
    async def sidecar(self, alloc: AllocId) -> SidecarFigures: ...


class _Live(Collector):
    """Asks the agent's loop for the figures, from the listener's thread."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterator[Metric]:
        yield from asyncio.run_coroutine_threadsafe(self._all(), self._loop).result(_SCRAPE_S)

    async def _all(self) -> list[Metric]:
        guests, refused, sidecars = await asyncio.gather(
            self._figures.guests(), self._figures.refused(), _sidecars(self._figures)
        )
        return [*_node(self._figures), *_workloads(self._figures, refused), *_guests(guests), *sidecars]


@asynccontextmanager
async def http_listener(listen: str, figures: Figures) -> AsyncIterator[None]:
    """GET /metrics until left. Raises ConfigError where it cannot bind."""
    registry = CollectorRegistry()
    registry.register(_Live(figures))
    ProcessCollector(namespace="outrider_agent", registry=registry)
    host, port = host_port(listen)
    try:
        # The library's own server, in a thread: an HTTP framework would be a tenth of the agent's memory.
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics_listen: cannot listen on {listen}: {error.strerror}") from error
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)


def _node(figures: Figures) -> Iterator[Metric]:
    node, prefix = figures.node(), "outrider_agent_"
    info = GaugeMetricFamily(f"{prefix}info", "What runs here", labels=("cluster", "node", "version"))
    info.add_metric((node.cluster, node.node, __version__), 1)
    yield info
    for name, text, value in (
        ("controller_connected", "1: a session with a controller is open", node.connected),
        ("broker_connected", "1: the MQTT broker is connected", node.broker_connected),
    ):
        yield GaugeMetricFamily(prefix + name, text, value=value)
    text = "When the node's own certificate ends"
    yield GaugeMetricFamily(f"{prefix}certificate_expiry_timestamp_seconds", text, value=node.certificate_expires_at_s)
    yield CounterMetricFamily(f"{prefix}broker_dropped", "Events dropped while it was away", value=node.broker_dropped)
    yield CounterMetricFamily(f"{prefix}refusals_dropped", "Refusals not passed on", value=node.refusals_dropped)
    counts = dict.fromkeys(AllocStatus, 0)
    for report in figures.reports():
        counts[report.status] += 1
    allocations = GaugeMetricFamily(f"{prefix}allocations", "Allocations on this node", labels=("status",))
    for status, count in counts.items():
        allocations.add_metric((status,), count)
    yield allocations
    expiry = GaugeMetricFamily(
        f"{prefix}leaf_expiry_timestamp_seconds", "When a service's certificate ends", labels=("service",)
    )
    for service, at_s in node.leaf_expiries.items():
        expiry.add_metric((service,), at_s)
    yield expiry


def _workloads(figures: Figures, refused: Mapping[AllocId, int]) -> Iterator[Metric]:
    prefix = "outrider_workload_"
    cpu = CounterMetricFamily(f"{prefix}cpu_seconds", "CPU time used", labels=_WORKLOAD_LABELS)
    memory = GaugeMetricFamily(f"{prefix}memory_bytes", "Memory in use", labels=_WORKLOAD_LABELS)
    oom = CounterMetricFamily(f"{prefix}oom_kills", "Kills for reaching the memory limit", labels=_WORKLOAD_LABELS)
    known = figures.workloads()
    names = {}
    for workload in known:
        labels = (workload.job, workload.group, workload.alloc, workload.task)
        names[workload.alloc] = (workload.job, workload.group)
        cpu.add_metric(labels, workload.usage.cpu_s)
        memory.add_metric(labels, workload.usage.memory_bytes)
        oom.add_metric(labels, workload.usage.oom_kills)
    restarts = CounterMetricFamily(f"{prefix}restarts", "Restarts on this node", labels=_WORKLOAD_LABELS)
    for report in figures.reports():
        for task in report.tasks:
            if report.alloc in names:
                restarts.add_metric((*names[report.alloc], report.alloc, task.name), task.restarts)
    packets = CounterMetricFamily(
        f"{prefix}refused_packets", "Packets sent where nothing lets it", labels=_WORKLOAD_LABELS[:-1]
    )
    for alloc, count in refused.items():
        if alloc in names:
            packets.add_metric((*names[alloc], alloc), count)
    yield from (cpu, memory, oom, restarts, packets)


def _guests(guests: Iterable[Inside]) -> Iterator[Metric]:
    """As the guests themselves have it, where their drivers and agents say so."""
    prefix = "outrider_guest_"
    cpu = CounterMetricFamily(f"{prefix}cpu_seconds", "CPU time used inside", labels=_WORKLOAD_LABELS)
    memory = GaugeMetricFamily(f"{prefix}memory_bytes", "Memory that the guest has", labels=_WORKLOAD_LABELS)
    used = GaugeMetricFamily(f"{prefix}memory_used_bytes", "Of it, not available in there", labels=_WORKLOAD_LABELS)
    for guest in guests:
        usage = guest.usage
        for family, value in ((cpu, usage.cpu_s), (memory, usage.memory_bytes), (used, usage.memory_used_bytes)):
            if value is not None:
                family.add_metric((guest.job, guest.group, guest.alloc, guest.task), value)
    yield from (cpu, memory, used)


async def _sidecars(figures: Figures) -> list[Metric]:
    allocs = figures.sidecars()
    answers = await _ask(allocs, figures.sidecar)
    up = GaugeMetricFamily("outrider_sidecar_up", "1: its Envoy answers", labels=("alloc",))
    active = GaugeMetricFamily("outrider_sidecar_connections", "Open connections", labels=("alloc", "direction"))
    for alloc in allocs:
        up.add_metric((alloc,), alloc in answers)
    for alloc, stats in answers.items():
        for direction, pairs in (("inbound", stats.inbound), ("outbound", stats.outbound)):
            active.add_metric((alloc, direction), sum(pair.connections_active for pair in pairs))
    return [up, active, *_pairs(answers.values())]


async def _ask(
    allocs: Iterable[AllocId], sidecar: Callable[[AllocId], Awaitable[SidecarFigures]]
) -> dict[AllocId, SidecarFigures]:
    """Of all that answer in time."""
    answers: dict[AllocId, SidecarFigures] = {}
    gate = asyncio.Semaphore(_STATS_AT_ONCE)

    async def ask(alloc: AllocId) -> None:
        async with gate:
            try:
                answers[alloc] = await sidecar(alloc)
            except (PeerError, KeyError):
                return  # shown as down; one that is being removed is in nobody's list any more

    try:
        async with asyncio.timeout(_STATS_S), asyncio.TaskGroup() as group:
            for alloc in allocs:
                group.create_task(ask(alloc), name=f"{alloc}-stats")
    except TimeoutError:
        return answers
    return answers


class _Sum:
    """One pair of services, over all sidecars of the node."""

    def __init__(self) -> None:
        self.requests: defaultdict[str, int] = defaultdict(int)
        self.buckets: defaultdict[float, int] = defaultdict(int)
        self.count = 0
        self.sum_s = 0.0
        self.sent = self.received = self.connections = self.errors = self.refused = 0

    def add(self, pair: Pair) -> None:
        for code_class, count in pair.requests:
            self.requests[code_class] += count
        for bound_ms, count in pair.latency_ms:
            self.buckets[bound_ms / 1000] += count
        self.count += pair.latency_count
        self.sum_s += pair.latency_sum_ms / 1000
        self.sent += pair.bytes_sent
        self.received += pair.bytes_received
        self.connections += pair.connections
        self.errors += pair.errors
        self.refused += pair.refused


def _pairs(answers: Iterable[SidecarFigures]) -> list[Metric]:
    sums: defaultdict[tuple[str, str], _Sum] = defaultdict(_Sum)
    overflow = 0
    for stats in answers:
        # Inbound pairs do not know their source: the callers' sidecars count the same traffic with it.
        for pair in (*stats.outbound, *stats.inbound):
            key = (pair.source, pair.destination)
            if key not in sums and len(sums) >= PAIRS_MAX:
                overflow += 1
                continue
            sums[key].add(pair)
    return [*_pair_metrics(sums), _overflow(overflow)]


def _overflow(count: int) -> Metric:
    text = f"Service pairs beyond {PAIRS_MAX}, which are not shown"
    return GaugeMetricFamily("outrider_mesh_pairs_hidden", text, value=count)


def _pair_metrics(sums: Mapping[tuple[str, str], _Sum]) -> tuple[Metric, ...]:
    prefix = "outrider_mesh_"
    requests = CounterMetricFamily(f"{prefix}requests", "Requests", labels=(*_PAIR_LABELS, "code_class"))
    duration = HistogramMetricFamily(f"{prefix}request_duration_seconds", "Duration of requests", labels=_PAIR_LABELS)
    connections = CounterMetricFamily(f"{prefix}connections", "Connections", labels=_PAIR_LABELS)
    sizes = CounterMetricFamily(f"{prefix}bytes", "Bytes carried", labels=(*_PAIR_LABELS, "direction"))
    errors = CounterMetricFamily(f"{prefix}errors", "Failed connects, resets, no endpoint", labels=_PAIR_LABELS)
    refused = CounterMetricFamily(f"{prefix}refused", "Refused by an intention", labels=_PAIR_LABELS)
    for pair, total in sums.items():
        for code_class, count in total.requests.items():
            requests.add_metric((*pair, code_class), count)
        if total.count:
            buckets = [(f"{bound:g}", float(count)) for bound, count in sorted(total.buckets.items())]
            duration.add_metric(pair, [*buckets, ("+Inf", float(total.count))], sum_value=total.sum_s)
        connections.add_metric(pair, total.connections)
        sizes.add_metric((*pair, "sent"), total.sent)
        sizes.add_metric((*pair, "received"), total.received)
        errors.add_metric(pair, total.errors)
        refused.add_metric(pair, total.refused)
    return requests, duration, connections, sizes, errors, refused
