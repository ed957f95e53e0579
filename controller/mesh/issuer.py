"""Who makes workloads' certificates: the embedded catalog's CA, or Consul's (DESIGN, decision 3).

Whether an agent may have a leaf is decided before: by the node authorizer. Keys are never logged, nor kept.
"""

from datetime import UTC, datetime
from typing import Protocol

from controller.catalog.ca import ConnectCa
from controller.mesh.consul_adapter import ConsulAdapter
from outrider.errors import InputError, PeerError
from outrider.ids import ServiceName, is_name
from outrider.model.mesh import Leaf


class Issuer(Protocol):
    """The one place with two implementations."""

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        """A leaf for `service`. Raises InputError for a bad request, PeerError where Consul is away."""
        ...


class EmbeddedIssuer:
    """Signs the agent's own request: the key never leaves the node. Agents renew at half life."""

    def __init__(self, ca: ConnectCa, datacenter: str) -> None:
        assert ca.datacenter == datacenter, "the CA names leaves after the datacenter"
        self._ca = ca

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        return self._ca.sign(service, csr_pem, datetime.now(UTC))


class ConsulIssuer:
    """Fetches Consul's leaf, key included: one key per service, handed over mTLS, in memory only.

    Consul renews it on its own time: until then the same leaf comes again, and the agent asks again later.
    """

    def __init__(self, consul: ConsulAdapter) -> None:
        self._consul = consul

    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:  # noqa: ARG002 -- Consul makes the key itself
        if not is_name(service):
            raise InputError(f"service {service!r}: not a name")
        found = await self._consul.leaf(service)
        try:
            expires = datetime.fromisoformat(found.valid_before)
        except ValueError as error:
            raise PeerError(f"Consul's leaf for {service}: ValidBefore is {found.valid_before!r}") from error
        return Leaf(
            service=service,
            certificate_pem=found.cert_pem,
            key_pem=found.private_key_pem,
            expires_at_s=expires.timestamp(),
            serial=found.serial_number,
        )
