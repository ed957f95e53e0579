"""`network:` of a group -> `Network`: ports and egress."""

from outrider.ids import PortName
from outrider.jobspec.document import Node, Scalar
from outrider.jobspec.fields import Faults, Fields, Path, named
from outrider.jobspec.units import size_bytes
from outrider.model.job import Network, Port

_EVERYWHERE = ("0.0.0.0/0",)
_DIGITS_MAX = 12


def read_network(group: Fields, faults: Faults) -> Network:
    node = group.node("network")
    if node is None:
        return Network()
    fields = Fields(node, (*group.path, "network"), faults, ("ports", "egress", "bandwidth"))
    ports = fields.node("ports")
    path = (*fields.path, "ports")
    return Network(
        ports=tuple(_port(name, inner, (*path, name), faults) for name, inner in named(ports, path, faults))
        if ports is not None
        else (),
        egress=_egress(fields),
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
