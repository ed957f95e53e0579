"""The controller's metrics, all of them, and the plain HTTP listener for Prometheus where it is configured.

Read when scraped: nothing is counted twice and an unscraped controller pays nothing. Label values come from fixed sets.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.core import views
from controller.discovery import TargetGroup
from controller.events import Broker
from controller.parts import Parts
from outrider import __version__
from outrider.config import host_port
from outrider.errors import ConfigError
from outrider.model.node import NodeStatus

_PREFIX = "outrider_controller_"


class ControllerCollector(Collector):
    def __init__(self, parts: Parts, *, catalog_requests: Mapping[tuple[str, int], int], broker: Broker | None) -> None:
        self._parts = parts
        self._catalog_requests = catalog_requests
        self._broker = broker

    def collect(self) -> Iterator[Metric]:
        yield _labelled("info", "What runs here", ("cluster", "version"), {(self._parts.cluster, __version__): 1})
        yield from self._loop()
        yield from self._fleet()
        yield _counted("refused_calls", "Calls that were refused, by code", ("code",), _by_label(self._parts.refused))
        yield _counted(
            "catalog_requests",
            "Requests that the embedded catalog answered",
            ("route", "status"),
            {(route, str(status)): count for (route, status), count in self._catalog_requests.items()},
        )
        yield _gauge(
            "mesh_reachable", "1: Consul or the embedded catalog answered last time", self._parts.mesh.reachable
        )
        yield _gauge("mesh_leading", "1: this controller writes the catalog", self._parts.mesh.leading)
        if self._broker is not None:
            yield _gauge("broker_connected", "1: the MQTT broker is connected", self._broker.connected)
            yield _counter("broker_published", "Events that the broker took", self._broker.published)
            yield _counter("broker_dropped", "Events that were dropped because it was away", self._broker.dropped)

    def _loop(self) -> Iterator[Metric]:
        counts = self._parts.engine.counts
        yield _counter("events", "Events that the core was told", counts.events)
        yield _counter("step_seconds", "Time spent deciding", counts.step_s)
        yield _gauge("step_seconds_max", "The longest that one decision took", counts.step_s_max)
        yield _counter("journal_appends", "Appends that the core asked for", counts.appends)
        yield _counter("journal_records", "Records written", counts.records)
        yield _counter("journal_commits", "Commits, each of one or more appends", counts.commits)
        yield _counter("journal_snapshots", "Times that the journal was rewritten as a snapshot", counts.snapshots)
        yield _counter("journal_commit_seconds", "Time spent in commits", counts.commit_s)

    def _fleet(self) -> Iterator[Metric]:
        state = self._parts.engine.state
        summary = views.fleet_summary(state)
        statuses: Counter[str] = Counter(dict.fromkeys(NodeStatus, 0))
        statuses.update(node.status for node in views.node_states(state))
        yield _labelled("nodes", "Nodes, by status", ("status",), _by_label(statuses))
        yield _gauge("jobs", "Jobs that are not stopped", summary.jobs)
        yield _gauge("allocations", "Allocations that have not ended", summary.allocations)
        yield _gauge("rollout_seconds_max", "The longest that a rollout has gone on", summary.rollout_s_max)
        yield _gauge("sessions", "Agents that are connected", len(self._parts.sessions))
        yield _gauge("tunnels", "Logs and exec calls that run", self._parts.tunnels.running)
        yield _gauge("event_listeners", "Callers that follow the events", self._parts.events.listeners)
        yield _counter(
            "sidecar_refusals", "Refused connections and requests that agents told of", self._parts.refusals.seen
        )


@contextlib.asynccontextmanager
async def http_listener(
    listen: str, collector: ControllerCollector, targets: Callable[[], tuple[TargetGroup, ...]]
) -> AsyncIterator[str]:
    """GET /metrics and /v1/discovery/prometheus. Yields where it really is, host:port."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def discovery(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(targets()), content_type="application/json")

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/v1/discovery/prometheus", discovery)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    host, port = host_port(listen)
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"{host}:{runner.addresses[0][1]}"
    except OSError as error:
        raise ConfigError(f"metrics_listen: {listen} cannot be bound: {error.strerror}") from error
    finally:
        await runner.cleanup()


def exposition(collector: ControllerCollector) -> bytes:
    """The metrics now, as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)


def _by_label(counts: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(str(name),): count for name, count in counts.items()}


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, text, value=float(value))


def _labelled(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counted(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
