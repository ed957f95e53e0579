"""The sidecar library as the agent uses it: an assignment's services, and what they call, as a sidecar's spec."""

from collections.abc import Iterable

import msgspec

from agent.config import TracesConfig
from agent.externals import Externals
from agent.gateways import Gateways
from agent.spares import Files
from outrider.config import host_port
from outrider.ids import AllocId, NodeId
from outrider.model.allocation import Assignment
from outrider.model.job import inner_ports
from outrider.model.mesh import PUBLIC_PORT, shares_sidecar, workload_address
from sidecar.access_log import log_mark
from sidecar.core.intent import SidecarGateway, SidecarService, SidecarSpec, SidecarUpstream, Traces
from sidecar.sidecars import Sidecars


class SidecarLibrary:
    """As `agent.envoys` wants it."""

    def __init__(
        self,
        sidecars: Sidecars,
        *,
        node: NodeId,
        gateways: Gateways,
        externals: Externals,
        traces: TracesConfig | None,
    ) -> None:
        self._sidecars, self._node, self._gateways, self._externals = sidecars, node, gateways, externals
        self._traces: Traces | None = None
        if traces is not None:
            address, port = host_port(traces.otlp)
            self._traces = Traces(address=address, port=port, percent=traces.percent)

    async def add(self, assignment: Assignment, *, uid: int, local_address: str) -> Files:
        spec = sidecar_spec(assignment, node=self._node, uid=uid, local_address=local_address)
        files = await self._sidecars.add(msgspec.structs.replace(spec, traces=self._traces))
        self._gateways.acquire(assignment)
        self._externals.acquire(assignment)
        return files

    async def add_spare(self, name: AllocId, *, uid: int) -> Files:
        return await self._sidecars.add(
            SidecarSpec(alloc=name, node=self._node, uid=uid, local_address="", services=())
        )

    def give(self, name: AllocId, to: AllocId) -> None:
        self._sidecars.give(name, to)

    async def ready(self, alloc: AllocId, deadline_s: float) -> None:
        await self._externals.tried(alloc)
        await self._sidecars.ready(alloc, deadline_s)

    async def drain(self, alloc: AllocId) -> None:
        await self._sidecars.drain(alloc)

    async def inbound_active(self, alloc: AllocId) -> int:
        return sum(pair.connections_active for pair in (await self._sidecars.stats(alloc)).inbound)

    async def inbound_busy(self, alloc: AllocId) -> int:
        """As `inbound_active`, but of HTTP requests instead of connections."""
        inbound = (await self._sidecars.stats(alloc)).inbound
        return sum(pair.requests_active if pair.requests else pair.connections_active for pair in inbound)

    def await_shares(self, allocs: Iterable[AllocId]) -> None:
        self._sidecars.await_shares(allocs)

    def log_mark(self, alloc: AllocId) -> bytes:
        return log_mark(alloc)

    def shared_ended(self) -> None:
        self._sidecars.remove_shared()

    async def remove(self, alloc: AllocId) -> None:
        self._gateways.release(alloc)
        self._externals.release(alloc)
        await self._sidecars.remove(alloc)


def sidecar_spec(assignment: Assignment, *, node: NodeId, uid: int, local_address: str) -> SidecarSpec:
    """What the sidecar of `assignment` fronts and calls."""
    ports = inner_ports(assignment.group.network)
    shared = shares_sidecar(assignment.group)
    return SidecarSpec(
        alloc=assignment.alloc,
        node=node,
        uid=uid,
        local_address=local_address,
        shared=shared,
        services=tuple(
            SidecarService(
                service=service.name,
                public_port=PUBLIC_PORT + index,
                workload_address=local_address if shared else workload_address(assignment.group),
                workload_port=ports[service.port] if service.port is not None else None,
                protocol=service.protocol,
                upstreams=tuple(
                    SidecarUpstream(service=upstream.service, local_port=upstream.port)
                    for upstream in service.upstreams
                ),
                gateway=tuple(
                    SidecarGateway(
                        port=ports[listener.port], to=listener.to, routes=listener.routes, secret=listener.secret
                    )
                    for listener in service.gateway
                ),
            )
            for index, service in enumerate(assignment.group.services)
        ),
        external=assignment.group.network.external,
    )
