"""Ways to services outside of the mesh: a listener for each, and what is behind each of its ports. Pure.

A connection goes by the port that the workload asked for; one that is not listed comes to a cluster without hosts,
where it is closed and counted. Where hosts are is said by whoever resolves them: endpoints, as of every service.
"""

from collections.abc import Iterator, Mapping

from outrider.ids import ServiceName
from outrider.model.external import External, ExternalTls
from outrider.model.job import Value
from outrider.model.mesh import external_address
from sidecar.core.intent import SidecarSpec

Addresses = Mapping[str, tuple[str, ...]]  # of hosts, by name


class ExternalCluster(Value, frozen=True, kw_only=True):
    """Hosts of a service at one port. Its endpoints have its name."""

    name: str
    source: ServiceName
    service: ServiceName
    nowhere: bool = False  # there are none, and never will be
    tls: ExternalTls | None = None


class ExternalListener(Value, frozen=True, kw_only=True):
    name: str
    source: ServiceName
    service: ServiceName
    address: str
    clusters: tuple[tuple[int, str], ...]  # by the port that was asked for
    otherwise: str  # names the cluster of all other ports


ExternalResource = ExternalCluster | ExternalListener


class ExternalParts(Value, frozen=True, kw_only=True):
    clusters: tuple[ExternalCluster, ...] = ()
    listeners: tuple[ExternalListener, ...] = ()
    endpoints: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()  # of which cluster, and where they are


def external_parts(spec: SidecarSpec, addresses: Addresses) -> ExternalParts:
    source = spec.services[0].service if spec.services else ServiceName("")
    return ExternalParts(
        clusters=tuple(cluster for one in spec.external for cluster in _clusters(source, one)),
        listeners=tuple(_listener(source, index, one) for index, one in enumerate(spec.external)),
        endpoints=tuple(
            # Two hosts may be at one address.
            (_name(one, port), tuple(dict.fromkeys((at, port) for host in one.hosts for at in addresses.get(host, ()))))
            for one in spec.external
            for port in _outer_ports(one)
        ),
    )


def _clusters(source: ServiceName, one: External) -> Iterator[ExternalCluster]:
    for port in _outer_ports(one):
        yield ExternalCluster(name=_name(one, port), source=source, service=one.name, tls=one.tls)
    yield ExternalCluster(name=_nowhere(one), source=source, service=one.name, nowhere=True)


def _listener(source: ServiceName, index: int, one: External) -> ExternalListener:
    return ExternalListener(
        name=f"external/{one.name}",
        source=source,
        service=one.name,
        address=external_address(index),
        clusters=tuple((port.port, _name(one, port.to)) for port in one.ports),
        otherwise=_nowhere(one),
    )


def _outer_ports(one: External) -> tuple[int, ...]:
    """Two of the workload's may lead to one."""
    return tuple(dict.fromkeys(port.to for port in one.ports))


def _name(one: External, port: int) -> str:
    return f"external/{one.name}/{port}"


def _nowhere(one: External) -> str:
    return f"external/{one.name}/other"
