"""InsightService: what the mesh does and why a call fails, put together from the journal's state, the catalog, agents.

Owns no task but those that ask nodes at the same time. Nothing is kept.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from cryptography import x509

from controller.audit import AuditLog
from controller.callers import Callers
from controller.catalog.catalog import Catalog
from controller.core import insight as core
from controller.core import views
from controller.parts import Parts
from controller.people import PeopleEdge
from controller.permissions import service_namespace
from controller.rpc import Context, duplex, unary, within, write
from outrider import codec
from outrider.clock import wall_s
from outrider.errors import InputError, OutriderError, PeerError, RefusedError
from outrider.ids import NodeId, ServiceName, is_name
from outrider.log import Log
from outrider.model.access import Capability
from outrider.model.allocation import Allocation
from outrider.model.insight import (
    CallExplanation,
    CallPart,
    Finding,
    LeafState,
    MeshCertificates,
    MeshGraph,
    PairFigures,
    ProbeOutcome,
    RootState,
)
from outrider.model.job import Protocol
from outrider.model.mesh import MeshService
from outrider.v1 import fleet_pb2, insight_pb2, insight_pb2_grpc

OVER_S_DEFAULT, OVER_S_MAX = 2.0, 60.0
MESH_TIMEOUT_S = 10.0
TRUSTED_S = 20.0  # for all sidecars to take a new root up
ANSWER_S = 10.0  # of one node, beyond the time that it counts
WRITE_TIMEOUT_S = 60.0
TAPPED_MAX = 16  # sidecars at a time
PATH_CHARS_MAX = 1024


class InsightService(PeopleEdge, insight_pb2_grpc.InsightServiceServicer):
    def __init__(self, parts: Parts, *, callers: Callers, audit: AuditLog, catalog: Catalog | None) -> None:
        """`catalog`: the embedded one; None where a Consul signs."""
        super().__init__(parts, callers=callers, audit=audit, log=Log("insight"))
        self._catalog = catalog
        self._mesh = parts.mesh
        self._sessions = parts.sessions
        self._tunnels = parts.tunnels

    @unary
    async def GetMeshGraph(self, request: insight_pb2.GetMeshGraphRequest, context: Context) -> insight_pb2.MeshGraph:
        over_s = request.over_s or OVER_S_DEFAULT
        if not 0.1 <= over_s <= OVER_S_MAX:
            raise InputError(f"over: {over_s:g} s; from 0.1 to {OVER_S_MAX:g}")
        query = insight_pb2.MeshQuery(figures=insight_pb2.FiguresQuery(over_s=over_s))
        answers, silent = await self._ask_all(query, over_s + ANSWER_S)
        figures = [codec.from_wire(answer.pair, PairFigures) for answer in answers]
        pairs = {(one.source, one.destination) for one in figures} | set(core.declared(self.state))
        seen = {pair: self._sees_service(pair[0]) or self._sees_service(pair[1]) for pair in pairs}
        graph = MeshGraph(seconds=over_s, edges=core.edges(self.state, figures, seen=seen), silent=silent)
        return codec.to_wire(graph, insight_pb2.MeshGraph)

    @unary
    async def ListCertificates(
        self, request: insight_pb2.ListCertificatesRequest, context: Context
    ) -> insight_pb2.MeshCertificates:
        query = insight_pb2.MeshQuery(certificates=insight_pb2.CertificatesQuery())
        answers, silent = await self._ask_all(query, ANSWER_S)
        leaves = sorted(
            (codec.from_wire(answer.leaf, LeafState) for answer in answers),
            key=lambda leaf: (leaf.service, leaf.node),
        )
        roots = self._mesh.roots()
        found = MeshCertificates(
            trust_domain=roots.trust_domain,
            datacenter=roots.datacenter,
            roots=tuple(_root(pem, active=at == 0) for at, pem in enumerate(roots.certificates_pem)),
            leaves=tuple(leaf for leaf in leaves if self._sees_service(leaf.service)),
            silent=silent,
        )
        return codec.to_wire(found, insight_pb2.MeshCertificates)

    @unary
    async def RotateRoot(
        self, request: insight_pb2.RotateRootRequest, context: Context
    ) -> insight_pb2.RotateRootResponse:
        if self._catalog is None:
            text = "Consul signs here: `consul connect ca set-config` rotates its root, and sidecars follow"
            raise RefusedError("unsupported", text)
        for each in views.node_states(self.state):
            if each.allocations:  # one that does not hear of the root would trust nobody
                self._sessions.check(each.node.id)
        root = await self._catalog.offer_root()
        try:
            async with asyncio.timeout(TRUSTED_S):
                await self._mesh.until_trusted(root)
        except TimeoutError as error:
            text = f"not every sidecar trusts the new root after {TRUSTED_S:g} s; the old one signs on: try again"
            raise PeerError(text) from error
        await self._catalog.sign_with_next_root()
        serial = _root(root, active=True).serial
        self.call.changes = (f"root {serial} signs",)
        return insight_pb2.RotateRootResponse(serial=serial)

    @unary
    async def ExplainCall(
        self, request: insight_pb2.ExplainCallRequest, context: Context
    ) -> insight_pb2.CallExplanation:
        source, destination = _ends(request.source, request.destination)
        for service in (source, destination):
            self.require(Capability.READ, service_namespace(self.state, service), f"service {service}")
        path = request.path or "/"
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or len(path) > PATH_CHARS_MAX:
            raise InputError(f"path: {path[:80]!r} is none: it begins with / and is plain text")
        if " " in path:
            raise InputError(f"path: {path[:80]!r} has a space; write %20")
        findings = [finding async for finding in self._findings(source, destination, path)]
        explanation = CallExplanation(source=source, destination=destination, findings=tuple(findings))
        return codec.to_wire(explanation, insight_pb2.CallExplanation)

    @duplex
    async def TapCalls(self, request: insight_pb2.TapCallsRequest, context: Context) -> None:
        source, destination = _ends(request.source, request.destination)
        capability = Capability.EXEC if request.headers else Capability.READ  # headers hold what opens other doors
        self.require(capability, service_namespace(self.state, source), f"requests of service {source}")
        if not 0 < request.percent <= 100:
            raise InputError(f"sample: {request.percent:g} %; more than 0, at most 100")
        if not self._named(source, destination):
            raise RefusedError("not-found", core.about_name(self.state, source, destination, "", named=False).text)
        allocations = core.callers(self.state, source)[:TAPPED_MAX]
        if not allocations:
            raise RefusedError("not-running", core.about_caller(self.state, source, ()).text)
        if request.headers:
            self.begun("TapCalls")
        writing = asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._follow(each, request, context, writing), name=f"tap-{each.id}")
                for each in allocations
            ]
        raise tasks[-1].result()  # all have ended; one sidecar's end was not the others'

    async def _follow(
        self, caller: Allocation, request: insight_pb2.TapCallsRequest, context: Context, writing: asyncio.Lock
    ) -> OutriderError:
        """Passes on what one sidecar tells, until it ends: why."""
        assert caller.node is not None, "what runs is somewhere"
        tap = insight_pb2.TapQuery(
            alloc=caller.id,
            source=request.source,
            destination=request.destination,
            percent=request.percent,
            headers=request.headers,
        )
        try:
            async with contextlib.aclosing(self._ask(caller.node, insight_pb2.MeshQuery(tap=tap))) as answers:
                async for answer in answers:
                    async with writing:
                        await write(context, answer.call, WRITE_TIMEOUT_S)
        except OutriderError as error:
            return error
        return PeerError(f"the sidecar of {caller.id} has ended")

    async def _findings(
        self, source: ServiceName, destination: ServiceName, path: str
    ) -> AsyncGenerator[Finding, None]:
        """In the order of CallPart; what hangs on something that is not there is left out."""
        state = self.state
        callers = core.callers(state, source)
        yield core.about_caller(state, source, callers)
        service = self._mesh.service(destination)
        known_name = self._named(source, destination)
        yield core.about_name(state, source, destination, service.virtual_address if service else "", named=known_name)
        if service is not None:
            named = {ServiceName(leg.service) for leg in core.legs(destination, service.traffic)}
            known = {name: self._mesh.service(name) for name in named}
            yield core.about_routes(
                state, service, {name: len(one.endpoints) if one else 0 for name, one in known.items()}
            )
            # Of a service that hands all its calls on, the other's instances count.
            target = service.traffic.target
            met = self._mesh.service(ServiceName(target.service)) if target is not None else service
            yield core.about_endpoints(state, met or service)
        async with within(MESH_TIMEOUT_S, "the catalog"):
            allowed, decided_by = await self._mesh.check(source, destination)
        yield core.about_intention(source, destination, allowed=allowed, decided_by=decided_by)
        if not callers or service is None or not known_name:
            return
        async for finding in self._tried(callers[0], service, source, path):
            yield finding

    async def _tried(
        self, caller: Allocation, service: MeshService, source: ServiceName, path: str
    ) -> AsyncGenerator[Finding, None]:
        """What only the caller's node can say."""
        assert caller.node is not None, "what runs is somewhere"
        certificates = insight_pb2.MeshQuery(certificates=insight_pb2.CertificatesQuery())
        probe = insight_pb2.ProbeQuery(
            alloc=caller.id,
            virtual_address=service.virtual_address,
            http=service.protocol is not Protocol.TCP,
            authority=f"{service.name}.mesh",
            path=path,
        )
        try:
            leaves = [answer.leaf async for answer in self._ask(caller.node, certificates)]
            expires_at_s = next((leaf.expires_at_s for leaf in leaves if leaf.service == source), None)
            yield core.about_certificate(source, caller.node, caller.id, expires_at_s, wall_s())
            async for answer in self._ask(caller.node, insight_pb2.MeshQuery(probe=probe)):
                outcome = codec.from_wire(answer.probe, ProbeOutcome)
                text = f"from {caller.id}: {outcome.text}, after {outcome.duration_ms:.0f} ms"
                yield Finding(part=CallPart.PROBE, good=outcome.reached, text=text)
        except OutriderError as error:
            yield Finding(part=CallPart.PROBE, good=False, text=f"node {caller.node} could not try: {error}")

    async def _ask_all(
        self, query: insight_pb2.MeshQuery, timeout_s: float
    ) -> tuple[list[insight_pb2.MeshAnswer], tuple[NodeId, ...]]:
        """The answers, and which nodes did not give theirs."""
        silent: list[NodeId] = []

        async def one(node: NodeId) -> list[insight_pb2.MeshAnswer]:
            try:
                async with asyncio.timeout(timeout_s):
                    return [answer async for answer in self._ask(node, query)]
            except (OutriderError, TimeoutError):
                silent.append(node)
                return []

        nodes = [each.node.id for each in views.node_states(self.state) if each.allocations]
        found = await asyncio.gather(*(one(node) for node in nodes))
        return [answer for answers in found for answer in answers], tuple(sorted(silent))

    async def _ask(self, node: NodeId, query: insight_pb2.MeshQuery) -> AsyncGenerator[insight_pb2.MeshAnswer, None]:
        """Raises RefusedError with what the node objects to, PeerError where it does not answer."""
        with self._tunnels.open(node) as tunnel:
            self._sessions.open_tunnel(node, fleet_pb2.OpenTunnel(tunnel=tunnel.id, mesh=query))
            async for frame in tunnel.frames():
                if frame.HasField("mesh"):
                    yield frame.mesh
                elif frame.HasField("end") and frame.end.error:
                    raise RefusedError("node-refused", f"node {node}: {frame.end.error}")

    def _named(self, source: ServiceName, destination: ServiceName) -> bool:
        """Whether `source`'s sidecars know `destination`: as an upstream, or because it is transparent and allowed."""
        if (source, destination) in set(core.declared(self.state)):
            return True
        return core.is_transparent(self.state, source) and destination in self._mesh.reach(source)

    def _sees_service(self, service: str) -> bool:
        return self.sees(service_namespace(self.state, service))


def _ends(source: str, destination: str) -> tuple[ServiceName, ServiceName]:
    for end, name in (("source", source), ("destination", destination)):
        if not is_name(name):
            raise InputError(f"{end}: {name[:80]!r} is no service's name")
    return ServiceName(source), ServiceName(destination)


def _root(pem: str, *, active: bool) -> RootState:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return RootState(
        name=certificate.subject.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        expires_at_s=certificate.not_valid_after_utc.timestamp(),
        active=active,
    )
