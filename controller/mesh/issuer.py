"""Who makes workloads' certificates: the embedded catalog's CA, or Consul's (DESIGN, decision 3)."""

from typing import Protocol

from outrider.ids import ServiceName
from outrider.model.mesh import Leaf


class Issuer(Protocol):
    async def issue(self, service: ServiceName, csr_pem: str) -> Leaf:
        """A leaf for `service`. Raises InputError for a bad CSR, PeerError where Consul is away."""
        ...
