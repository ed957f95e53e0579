"""`gateway:` of a service -> `GatewayListener` values."""

from outrider.ids import PortName, SecretName, ServiceName
from outrider.jobspec.document import Node
from outrider.jobspec.fields import Faults, Fields, Path, listed, suggestion
from outrider.model.gateway import GatewayListener, GatewayRoute
from outrider.model.job import Network, Upstream


def read_gateway(service: Fields, network: Network, faults: Faults) -> tuple[GatewayListener, ...]:
    node = service.node("gateway")
    if node is None:
        return ()
    path = (*service.path, "gateway")
    return tuple(_listener(item, at, network, faults) for at, item in listed(node, path, faults))


def implied_upstreams(gateway: tuple[GatewayListener, ...], named: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
    """What a gateway sends its callers to, it calls."""
    known = {upstream.service for upstream in named}
    wanted = (to for one in gateway for to in (one.to, *(route.to for route in one.routes)) if to)
    return tuple(Upstream(service=service) for service in dict.fromkeys(wanted) if service not in known)


def _listener(node: Node, path: Path, network: Network, faults: Faults) -> GatewayListener:
    fields = Fields(node, path, faults, ("port", "to", "routes", "tls"))
    fields.required("port", "https")
    ports = [port.name for port in network.ports]
    port = PortName(fields.text("port", ""))
    if port and port not in ports:
        fields.fault("port", f"the group has no port {port!r}; {suggestion(port, ports)}")
    routes, tls = fields.node("routes"), fields.node("tls")
    return GatewayListener(
        port=port,
        to=ServiceName(fields.text("to", "")) or None,
        routes=tuple(_route(item, at, faults) for at, item in listed(routes, (*path, "routes"), faults))
        if routes is not None
        else (),
        secret=_secret(tls, (*path, "tls"), faults) if tls is not None else None,
    )


def _route(node: Node, path: Path, faults: Faults) -> GatewayRoute:
    fields = Fields(node, path, faults, ("host", "prefix", "to"))
    fields.required("to", "web")
    default = GatewayRoute(to=ServiceName(""))
    return GatewayRoute(
        to=ServiceName(fields.text("to", "")),
        host=fields.text("host", default.host).lower(),
        prefix=fields.text("prefix", default.prefix),
    )


def _secret(node: Node, path: Path, faults: Faults) -> SecretName | None:
    fields = Fields(node, path, faults, ("secret",))
    fields.required("secret", "edge-tls")
    return SecretName(fields.text("secret", "")) or None
