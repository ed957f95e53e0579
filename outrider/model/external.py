"""Services outside of the mesh that a group's copies may reach, by name and through their sidecar alone."""

import msgspec

from outrider.ids import ServiceName


class ExternalTls(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The sidecar speaks TLS outside, for a workload that speaks in the clear."""

    server_name: str  # asked for by SNI, and what the certificate must say
    ca_pem: str = ""  # whom to trust; "" is whom the node trusts


class ExternalPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    port: int  # the workload's word for it
    to: int  # outside


class External(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Reached as NAME.mesh and by its hosts' own names, at its ports and at no other."""

    name: ServiceName
    hosts: tuple[str, ...]  # names, which the node resolves, or IPv4 addresses; all serve alike
    ports: tuple[ExternalPort, ...]
    tls: ExternalTls | None = None  # None: what the workload sends goes as it is
