"""Spans by OTLP from real Envoys to a collector, and W3C trace contexts that pass both sidecars."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import msgspec
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action
from sidecar.core.intent import Traces
from tests.integration.sidecar_mesh import Mesh, calling, endpoint, get, served, until

pytestmark = pytest.mark.host

API, WEB = AllocId("00000000e1"), AllocId("00000000e2")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(grpc.GenericRpcHandler):  # type: ignore[type-arg,misc]  # as grpcio's stubs have it
    """Keeps the spans that it is sent: (service, trace, parent)."""

    def __init__(self) -> None:
        self.spans: set[tuple[str, str, str]] = set()

    def service(self, details: grpc.HandlerCallDetails) -> object:
        if details.method != "/opentelemetry.proto.collector.trace.v1.TraceService/Export":
            return None
        return grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
            response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
        )

    async def _export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for each in request.resource_spans:
            names = {one.key: one.value.string_value for one in each.resource.attributes}
            for scope in each.instrumentation_library_spans:  # their name before they were scopes
                for span in scope.spans:
                    self.spans.add((names["service.name"], span.trace_id.hex(), span.parent_span_id.hex()))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, int]]:
    collector, server = Collector(), grpc.aio.server()
    server.add_generic_rpc_handlers((collector,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield collector, port
    await server.stop(None)


@pytest.fixture
async def workload() -> AsyncIterator[tuple[list[str], int]]:
    """The trace contexts that it was called with, and its port."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("traceparent", ""))
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield seen, runner.addresses[0][1]
    await runner.cleanup()


@pytest.mark.parametrize("traced", [True, False])
async def test_a_trace_context_passes_both_sidecars_and_where_asked_each_adds_its_span(
    collector: tuple[Collector, int], workload: tuple[list[str], int], traced: bool
) -> None:
    seen, called = workload
    known, port = collector
    traces = Traces(address="127.0.0.1", port=port, percent=0.0) if traced else None
    async with Mesh() as mesh:
        api = mesh.spec(API, served("api", called, Protocol.HTTP))
        service = mesh.service("api", Protocol.HTTP, endpoint(api))
        mesh.intend("api", ("web", Action.ALLOW))
        mesh.publish()
        callers = mesh.spec(WEB, calling("web", ("api", None)))
        await mesh.start(*(msgspec.structs.replace(spec, traces=traces) for spec in (api, callers)))
        url = f"http://{service.virtual_address}:15001/"
        given = f"00-{TRACE}-{SPAN}-01"
        assert (await get(url, headers={"traceparent": given}))[0] == 200
        version, trace, parent, flags = seen[-1].split("-")
        assert (version, trace, flags) == ("00", TRACE, "01")
        if not traced:
            assert seen[-1] == given
            assert (await get(url))[0] == 200
            assert seen[-1] == ""
            return
        await until(lambda: {name for name, _, _ in known.spans} == {"web", "api"}, 30)
        assert {trace for _, trace, _ in known.spans} == {TRACE}
        assert ("web", TRACE, SPAN) in known.spans, "the caller's span is the first sidecar's parent"
        assert parent not in (SPAN, "")
