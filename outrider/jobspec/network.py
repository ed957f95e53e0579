"""`network:` of a group -> `Network`: ports, egress, and external services."""

from outrider.ids import PortName, ServiceName
from outrider.jobspec.document import Mapping, Node, Scalar
from outrider.jobspec.fields import Faults, Fields, Path, listed, named
from outrider.jobspec.tasks import FilesBudget
from outrider.jobspec.units import size_bytes
from outrider.model.external import External, ExternalPort, ExternalTls
from outrider.model.job import Network, Port
from outrider.validate_external import is_address

_EVERYWHERE = ("0.0.0.0/0",)
_DIGITS_MAX = 12


def read_network(group: Fields, budget: FilesBudget, faults: Faults) -> Network:
    node = group.node("network")
    if node is None:
        return Network()
    fields = Fields(node, (*group.path, "network"), faults, ("ports", "egress", "external", "bandwidth"))
    ports, external = fields.node("ports"), fields.node("external")
    path, outside = (*fields.path, "ports"), (*fields.path, "external")
    return Network(
        ports=tuple(_port(name, inner, (*path, name), faults) for name, inner in named(ports, path, faults))
        if ports is not None
        else (),
        egress=_egress(fields),
        external=tuple(
            _external(name, inner, (*outside, name), budget, faults) for name, inner in named(external, outside, faults)
        )
        if external is not None
        else (),
        bandwidth_bytes=fields.quantity("bandwidth", size_bytes, 0),
    )


def _port(name: str, node: Node, path: Path, faults: Faults) -> Port:
    if isinstance(node, Scalar) and node.empty:  # `http:` alone is `http: {}`
        return Port(name=PortName(name))
    fields = Fields(node, path, faults, ("static", "to", "dynamic"))
    to = fields.quantity("to", _inner_number, None if "to" not in fields else 1)
    return Port(
        name=PortName(name),
        static=fields.integer("static", 1) if "static" in fields else None,
        to=to,
        dynamic=fields.flag("dynamic", default=False),
        from_image="to" in fields and to is None,
    )


def _inner_number(text: str) -> int | None:
    """None: the image's own."""
    if text == "image":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        raise ValueError(f"{text[:80]!r} is neither a port's number nor `image`, which is the port that it exposes")
    return int(text)


def _egress(fields: Fields) -> tuple[str, ...]:
    node = fields.node("egress")
    if isinstance(node, Scalar):
        if node.text in {"deny", "allow"}:
            return _EVERYWHERE if node.text == "allow" else ()
        fields.fault("egress", f"{node.text[:80]!r} is neither deny, allow nor a list of networks like [10.0.0.0/8]")
        return ()
    return fields.texts("egress")


def _external(name: str, node: Node, path: Path, budget: FilesBudget, faults: Faults) -> External:
    fields = Fields(node, path, faults, ("hosts", "ports", "tls"))
    fields.required("hosts", "[api.example.org]")
    ports, tls = fields.required("ports", "[443]"), fields.node("tls")
    hosts = tuple(host.lower() for host in fields.texts("hosts"))
    return External(
        name=ServiceName(name),
        hosts=hosts,
        ports=tuple(_external_port(item, at, faults) for at, item in listed(ports, (*path, "ports"), faults))
        if ports is not None
        else (),
        tls=_tls(tls, (*path, "tls"), hosts, budget, faults) if tls is not None else None,
    )


def _external_port(node: Node, path: Path, faults: Faults) -> ExternalPort:
    if isinstance(node, Mapping):
        fields = Fields(node, path, faults, ("port", "to"))
        fields.required("port", "80")
        port = fields.integer("port", 1)
        return ExternalPort(port=port, to=fields.integer("to", 1) if "to" in fields else port)
    if not isinstance(node, Scalar) or not (node.plain and node.text.isascii() and node.text.isdigit()):
        faults.add(path, "expected a port's number, or {port: 80, to: 443}", node.mark)
        return ExternalPort(port=1, to=1)
    return ExternalPort(port=int(node.text[:6]), to=int(node.text[:6]))


def _tls(node: Node, path: Path, hosts: tuple[str, ...], budget: FilesBudget, faults: Faults) -> ExternalTls:
    fields = Fields(node, path, faults, ("server_name", "ca"))
    only = hosts[0] if len(hosts) == 1 and not is_address(hosts[0]) else ""
    pem, file = "", fields.text("ca", "")
    if file:
        try:
            pem = budget.read("ca", file).content.decode("ascii")
        except UnicodeDecodeError:
            fields.fault("ca", f"{file}: no PEM file: it holds more than ASCII text")
        except ValueError as error:
            fields.fault("ca", str(error))
        else:
            if not pem.strip():
                fields.fault("ca", f"{file}: is empty")
    return ExternalTls(server_name=fields.text("server_name", "").lower() or only, ca_pem=pem)
