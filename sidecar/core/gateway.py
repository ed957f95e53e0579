"""A gateway's own part of a sidecar: listeners for callers outside of the mesh, and ways to its upstreams. Pure.

Each way leads to the upstream's own outbound listener in the same sidecar: splits, retries, identity and figures are
those of every call.
"""

from collections.abc import Mapping

from outrider.ids import SecretName, ServiceName
from outrider.model.gateway import GatewayRoute
from outrider.model.job import Value
from outrider.model.mesh import VIRTUAL_PORT, MeshService
from sidecar.core.intent import SidecarGateway, SidecarService, SidecarSpec


class GatewayCluster(Value, frozen=True, kw_only=True):
    name: str
    address: str
    port: int


class GatewayListener(Value, frozen=True, kw_only=True):
    """Its certificate comes by name: a listener never changes."""

    name: str
    service: ServiceName
    address: str
    port: int
    to: ServiceName | None  # None: HTTP, by routes of the listener's name
    secret: str  # names it; "" is in the clear
    traced_percent: float | None = None


class GatewayRoutes(Value, frozen=True, kw_only=True):
    name: str
    service: ServiceName
    routes: tuple[GatewayRoute, ...]  # the longest prefix first


class GatewayCertificate(Value, frozen=True, kw_only=True):
    name: str
    pem: str  # certificates and key


GatewayResource = GatewayCluster | GatewayListener | GatewayRoutes | GatewayCertificate


class GatewayParts(Value, frozen=True, kw_only=True):
    clusters: tuple[GatewayCluster, ...] = ()
    listeners: tuple[GatewayListener, ...] = ()
    routes: tuple[GatewayRoutes, ...] = ()
    certificates: tuple[GatewayCertificate, ...] = ()
    missing: tuple[str, ...] = ()


def gateway_parts(
    spec: SidecarSpec,
    service: SidecarService,
    services: Mapping[ServiceName, MeshService],
    pems: Mapping[SecretName, str],
) -> GatewayParts:
    """`services`: the view's. An upstream that it does not have is told of as missing where upstreams are."""
    called = [to for one in service.gateway for to in (one.to, *(route.to for route in one.routes)) if to is not None]
    secrets = dict.fromkeys(one.secret for one in service.gateway if one.secret is not None)
    return GatewayParts(
        clusters=tuple(
            GatewayCluster(name=gateway_cluster(to), address=services[to].virtual_address, port=VIRTUAL_PORT)
            for to in dict.fromkeys(called)
            if to in services
        ),
        listeners=tuple(_listener(spec, service.service, one) for one in service.gateway),
        routes=tuple(
            GatewayRoutes(
                name=_name(service.service, one),
                service=service.service,
                routes=tuple(sorted(one.routes, key=lambda route: (route.host, -len(route.prefix), route.prefix))),
            )
            for one in service.gateway
            if one.routes
        ),
        certificates=tuple(
            GatewayCertificate(name=_certificate(secret), pem=pems[secret]) for secret in secrets if secret in pems
        ),
        missing=tuple(f"the gateway's certificate, secret {secret}" for secret in secrets if secret not in pems),
    )


def gateway_cluster(to: ServiceName) -> str:
    return f"gateway/{to}"


def _listener(spec: SidecarSpec, service: ServiceName, one: SidecarGateway) -> GatewayListener:
    return GatewayListener(
        name=_name(service, one),
        service=service,
        address=spec.local_address,
        port=one.port,
        to=one.to,
        secret=_certificate(one.secret) if one.secret is not None else "",
        traced_percent=spec.traces.percent if spec.traces is not None else None,
    )


def _name(service: ServiceName, one: SidecarGateway) -> str:
    return f"gateway/{service}/{one.port}"


def _certificate(secret: SecretName) -> str:
    return f"gateway/{secret}"
