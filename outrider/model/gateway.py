"""What a gateway's sidecar listens on for callers outside of the mesh, and where it sends them."""

import msgspec

from outrider.ids import PortName, SecretName, ServiceName


class GatewayRoute(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Requests for `host` whose path begins with `prefix`; of several that fit the longest prefix decides."""

    to: ServiceName
    host: str = "*"  # or *.example.org
    prefix: str = "/"


class GatewayListener(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A published port of the group: either connections as they are go `to` a service, or requests go by `routes`."""

    port: PortName
    to: ServiceName | None = None
    routes: tuple[GatewayRoute, ...] = ()
    secret: SecretName | None = None  # a PEM with certificates and key, for TLS; None: in the clear
