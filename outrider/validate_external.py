"""What is wrong with a group's `network: external:`. Yields paths below the group, and messages."""

import base64
import binascii
import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from outrider.ids import is_name
from outrider.model.external import External
from outrider.model.job import Group
from outrider.model.mesh import EXTERNALS_MAX, GUEST_GATEWAY, GUEST_PREFIX, MESH_DOMAIN, VIRTUAL_NETWORK

Path = tuple[str | int, ...]
HOSTS_MAX, PORTS_MAX = 16, 16
CA_BYTES_MAX = 64 * 1024
_HOST = re.compile(r"^(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*\Z")
_DIGITS = re.compile(r"^[0-9.]+\Z")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s+(.*?)-----END CERTIFICATE-----", re.DOTALL)
# What is inside an allocation, or nowhere.
_INSIDE = tuple(
    IPv4Network(network, strict=False)
    for network in (VIRTUAL_NETWORK, f"{GUEST_GATEWAY}/{GUEST_PREFIX}", "0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")
)


def external_findings(group: Group) -> Iterator[tuple[Path, str]]:
    externals = group.network.external
    path: Path = ("network", "external")
    if externals and not group.services:
        yield path, "a sidecar leads there, and a group without services has none; `services: [{name: NAME}]` is enough"
    if len(externals) > EXTERNALS_MAX:
        yield path, f"{len(externals)} external services; at most {EXTERNALS_MAX}"
    called = {upstream.service for service in group.services for upstream in service.upstreams}
    owners: dict[str, str] = {}
    for one in externals:
        at: Path = (*path, one.name)
        if not is_name(one.name):
            yield at, f"{one.name[:80]!r} is no name; lower-case letters, digits and dashes"
        if one.name in called:
            yield at, f"{one.name}.{MESH_DOMAIN} is an upstream of the group already; take another name"
        yield from _hosts(at, one, owners)
        yield from _ports(at, one)
        yield from _tls(at, one)


def is_address(host: str) -> bool:
    """Rather than a name; of a host that has passed."""
    return _DIGITS.match(host) is not None


def outside(address: IPv4Address) -> bool:
    """Whether a sidecar may be led to it."""
    return not any(address in network for network in _INSIDE)


def _hosts(at: Path, one: External, owners: dict[str, str]) -> Iterator[tuple[Path, str]]:
    if not 1 <= len(one.hosts) <= HOSTS_MAX:
        yield (*at, "hosts"), f"{len(one.hosts)} hosts; from 1 to {HOSTS_MAX}"
    for index, host in enumerate(one.hosts):
        where: Path = (*at, "hosts", index)
        if is_address(host):
            yield from ((where, message) for message in _wrong_address(host))
        elif "*" in host:
            yield where, f"{host[:80]!r} names no one host; a sidecar connects to hosts, so list each"
        elif not _HOST.match(host):
            yield where, f"{host[:80]!r} is no host: a name, such as api.example.org, or an IPv4 address"
        elif host.rsplit(".", 1)[-1] == MESH_DOMAIN:
            yield where, f"{host[:80]!r} is a name of the mesh; put it under `upstreams` of a service"
        owner = owners.setdefault(host, one.name)
        if owner != one.name or one.hosts.index(host) != index:
            yield where, f"{host[:80]!r} is a host of {owner} already; put its ports together there"


def _wrong_address(host: str) -> Iterator[str]:
    try:
        address = IPv4Address(host)
    except ValueError:
        yield f"{host[:80]!r} is no IPv4 address"
        return
    if not outside(address):
        yield f"{host} is nowhere outside: an address of the allocation itself, or of none"


def _ports(at: Path, one: External) -> Iterator[tuple[Path, str]]:
    if not 1 <= len(one.ports) <= PORTS_MAX:
        yield (*at, "ports"), f"{len(one.ports)} ports; from 1 to {PORTS_MAX}"
    seen: set[int] = set()
    for index, port in enumerate(one.ports):
        where: Path = (*at, "ports", index)
        for number in dict.fromkeys((port.port, port.to)):
            if not 1 <= number <= 65535:
                yield where, f"{number} is not within 1 and 65535"
        if port.port in seen:
            yield where, f"port {port.port} stands here twice"
        seen.add(port.port)


def _tls(at: Path, one: External) -> Iterator[tuple[Path, str]]:
    if one.tls is None:
        return
    where: Path = (*at, "tls")
    name = one.tls.server_name
    if not name:
        message = "missing: several hosts, or an address, do not say which name the certificate has; "
        yield (*where, "server_name"), message + "for example `server_name: api.example.org`"
    elif is_address(name) or not _HOST.match(name):
        yield (
            (*where, "server_name"),
            f"{name[:80]!r} is no name that a certificate could have; such as api.example.org",
        )
    if one.tls.ca_pem:
        yield from (((*where, "ca"), message) for message in _wrong_certificates(one.tls.ca_pem))


def _wrong_certificates(pem: str) -> Iterator[str]:
    if len(pem) > CA_BYTES_MAX:
        yield f"{len(pem)} bytes; at most {CA_BYTES_MAX}: name the authorities of this service, not all there are"
    if "PRIVATE KEY" in pem:
        yield "holds a private key, which travels nowhere; give the authority's certificates alone"
    blocks = _PEM.findall(pem)
    if not blocks:
        yield "holds no certificate; a PEM file with -----BEGIN CERTIFICATE----- is expected"
    for block in blocks:
        try:
            der = base64.b64decode("".join(block.split()), validate=True)
        except binascii.Error:
            der = b""
        if not der.startswith(b"\x30\x82"):
            yield "holds a certificate that is cut or garbled"
