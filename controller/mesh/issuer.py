"""Who makes workloads' certificates: the embedded catalog's CA, or Consul's (DESIGN, decision 3).

Whether an agent may have a leaf is decided before: by the node authorizer. Keys are never logged, nor kept.
"""

import asyncio
from datetime import UTC, datetime
from typing import Final, Protocol

from cryptography import x509

from controller.catalog.ca import ConnectCa
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.shapes import ConsulLeaf, ConsulRoots
from outrider.errors import InputError, PeerError
from outrider.ids import ServiceName, is_name
from outrider.model.mesh import Leaf

_WAIT_S: Final = 1
_WAITS_AT_ONCE: Final = 32  # Consul refuses more than 200 of one address, the watcher's among them


class Issuer(Protocol):
    """The one place with two implementations."""

    def saw_roots(self, roots: ConsulRoots) -> None:
        """The mesh's watch of them has answered."""
        ...

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        """A leaf for `service`. Raises InputError for a bad request, PeerError where Consul is away."""
        ...


class EmbeddedIssuer:
    """Signs the agent's own request: the key never leaves the node. Agents renew at half life."""

    def __init__(self, ca: ConnectCa, datacenter: str) -> None:
        assert ca.datacenter == datacenter, "the CA names leaves after the datacenter"
        self._ca = ca

    def saw_roots(self, roots: ConsulRoots) -> None:
        """It signs with the active one in any case."""

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        return self._ca.sign(service, csr_pem, datetime.now(UTC))


class ConsulIssuer:
    """Fetches Consul's leaf, key included: one key per service, handed over mTLS, in memory only.

    Consul's agent answers with the leaf that it has, even one of an old root or at its end, and makes another only
    while a blocking query waits for it: within half a minute of a new root, and between 60 and 90 % of a leaf's life.
    So whatever is of an old root, or past half of its life, is asked for in that way. Consul's agent goes on for ten
    minutes after such a query: it need not be a long one.
    """

    def __init__(self, consul: ConsulAdapter) -> None:
        self._consul = consul
        self._signing_key: str | None = None  # of the active root, in hexadecimal; "" where Consul tells none
        self._waits = asyncio.Semaphore(_WAITS_AT_ONCE)

    def saw_roots(self, roots: ConsulRoots) -> None:
        found = next((root.signing_key_id for root in roots.roots if root.active), "")
        self._signing_key = found.replace(":", "").lower()

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:  # noqa: ARG002 -- Consul makes the key itself
        if not is_name(service):
            raise InputError(f"service {service!r}: not a name")
        if self._signing_key is None:
            raise PeerError("Consul has not told its roots yet")
        found = await self._consul.leaf(service)
        superseded = self._superseded(found)
        # Where too many wait already, the agent that asks for it asks again.
        if (superseded or _is_past_half(found)) and not self._waits.locked():
            async with self._waits:
                found = await self._consul.leaf(service, index=found.modify_index, wait_s=_WAIT_S)
            superseded = self._superseded(found)
        return Leaf(
            service=service,
            certificate_pem=found.cert_pem,
            key_pem=found.private_key_pem,
            expires_at_s=_time(found, found.valid_before).timestamp(),
            serial=found.serial_number,
            superseded=superseded,
        )

    def _superseded(self, leaf: ConsulLeaf) -> bool:
        """Not signed with the active root's key, or that of its intermediate: as Consul's agent itself tells."""
        try:
            certificate = x509.load_pem_x509_certificate(leaf.cert_pem.encode())
            signed_with = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        except (ValueError, x509.ExtensionNotFound) as error:
            raise PeerError(f"Consul's leaf for {leaf.service}: {error}") from error
        return bool(self._signing_key) and (signed_with.key_identifier or b"").hex() != self._signing_key


def _is_past_half(leaf: ConsulLeaf) -> bool:
    begins, ends = _time(leaf, leaf.valid_after), _time(leaf, leaf.valid_before)
    return datetime.now(UTC) > begins + (ends - begins) / 2


def _time(leaf: ConsulLeaf, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise PeerError(f"Consul's leaf for {leaf.service}: valid until or from {text[:80]!r}") from error
