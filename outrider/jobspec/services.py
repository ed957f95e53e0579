"""`services:` of a group -> `Service` values, with their checks and upstreams."""

from outrider.ids import PortName, ServiceName
from outrider.jobspec.document import Node, Scalar
from outrider.jobspec.fields import Faults, Fields, Path, listed, named, suggestion, text_of
from outrider.jobspec.gateway import implied_upstreams, read_gateway
from outrider.jobspec.traffic import read_traffic
from outrider.jobspec.units import duration_s
from outrider.model.job import Check, CheckKind, Network, Protocol, Service, Upstream

_SERVICE_KEYS = ("name", "port", "protocol", "check", "upstreams", "allow", "traffic", "meta", "gateway", "transparent")
_KINDS = {"http": CheckKind.HTTP, "tcp": CheckKind.TCP, "grpc": CheckKind.GRPC, "command": CheckKind.COMMAND}


def read_services(group: Fields, network: Network, faults: Faults) -> tuple[Service, ...]:
    node = group.node("services")
    if node is None:
        return ()
    path = (*group.path, "services")
    return tuple(_service(item, at, network, faults) for at, item in listed(node, path, faults))


def _service(item: Node, path: Path, network: Network, faults: Faults) -> Service:
    fields = Fields(item, path, faults, _SERVICE_KEYS)
    if not faults.told(path):
        fields.required("name", "web")
    ports = [port.name for port in network.ports]
    port = PortName(fields.text("port", "")) or None
    if port is not None and port not in ports:
        fields.fault("port", f"the group has no port {port!r}; {suggestion(port, ports)}")
    node = fields.node("upstreams")
    upstreams = _upstreams(node, (*path, "upstreams"), faults) if node is not None else ()
    gateway = read_gateway(fields, network, faults)
    return Service(
        name=ServiceName(fields.text("name", "")),
        port=port,
        protocol=fields.choice("protocol", Protocol, Protocol.TCP),
        check=_check(fields, faults),
        upstreams=(*upstreams, *implied_upstreams(gateway, upstreams)),
        allow=tuple(ServiceName(caller) for caller in fields.texts("allow")),
        traffic=read_traffic(fields, fields.text("name", ""), faults),
        meta=_meta(fields, faults),
        gateway=gateway,
        transparent=fields.flag("transparent", default=False),
    )


def _meta(service: Fields, faults: Faults) -> dict[str, str]:
    node, path = service.node("meta"), (*service.path, "meta")
    found = named(node, path, faults) if node is not None else ()
    return {key: text for key, value in found if (text := text_of(value, (*path, key), faults)) is not None}


def _upstreams(node: Node, path: Path, faults: Faults) -> tuple[Upstream, ...]:
    found = (_upstream(item, at, faults) for at, item in listed(node, path, faults))
    return tuple(upstream for upstream in found if upstream.service)


def _upstream(node: Node, path: Path, faults: Faults) -> Upstream:
    if isinstance(node, Scalar):
        return Upstream(service=ServiceName(text_of(node, path, faults) or ""))
    fields = Fields(node, path, faults, ("service", "port"))
    fields.required("service", "api")
    service = ServiceName(fields.text("service", ""))
    return Upstream(service=service, port=fields.integer("port", 0) if "port" in fields else None)


def _check(service: Fields, faults: Faults) -> Check | None:
    node = service.node("check")
    if node is None:
        return None
    path = (*service.path, "check")
    fields = Fields(node, path, faults, (*_KINDS, "interval", "timeout"))
    kinds = [key for key in _KINDS if key in fields]
    if len(kinds) != 1:
        if not faults.told(path):
            faults.add(path, f"expected exactly one of {', '.join(_KINDS)}, found {' and '.join(kinds) or 'none'}")
        return None
    kind = _KINDS[kinds[0]]
    default = Check(kind=kind)
    if kind is CheckKind.TCP and not fields.flag("tcp", default=True):
        fields.fault("tcp", "write `tcp: true`, or leave the check out")
    return Check(
        kind=kind,
        path=fields.text(kinds[0], "") if kind in {CheckKind.HTTP, CheckKind.GRPC} else "",
        command=fields.texts("command", "write [sh, -c, ...] for a shell") if kind is CheckKind.COMMAND else (),
        interval_s=fields.quantity("interval", duration_s, default.interval_s),
        timeout_s=fields.quantity("timeout", duration_s, default.timeout_s),
    )
