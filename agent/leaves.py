"""The certificates of the services placed on this node: asked for, renewed at half life, handed to the sidecars.

One leaf for each service, shared by its allocations here. Keys are made here and kept in memory only. Owns one named
task for each service, from the first allocation's start to the last one's end; a controller that is away, or whose
Consul has yet to sign with its new root, is asked again, later and later.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from outrider.clock import wall_s
from outrider.errors import InputError, PeerError
from outrider.ids import AllocId, ServiceName
from outrider.log import Log
from outrider.model.mesh import Leaf, TrustRoots, spiffe_id

_RETRY_S, _RETRY_MAX_S = 0.1, 15.0
_RENEW_MIN_S = 1.0

IssueLeaf = Callable[[ServiceName, str], Awaitable[Leaf]]


class Leaves:
    """Used by the one event loop. `issue` raises PeerError where there is no leaf now."""

    def __init__(self, *, issue: IssueLeaf, give: Callable[[Leaf], None], log: Log, rng: random.Random) -> None:
        self._issue = issue
        self._give = give
        self._log = log
        self._rng = rng
        self._roots = TrustRoots()
        self._changed = asyncio.Event()  # of the roots; replaced at each change
        self._holders: dict[ServiceName, set[AllocId]] = {}
        self._tasks: dict[ServiceName, asyncio.Task[None]] = {}
        self._expires_at_s: dict[ServiceName, float] = {}

    def expiries(self) -> dict[ServiceName, float]:
        """Wall-clock time at which each service's present leaf ends."""
        return dict(self._expires_at_s)

    def set_roots(self, roots: TrustRoots) -> None:
        """New roots mean new leaves: the old ones may soon be trusted by nobody."""
        if roots != self._roots:
            self._roots = roots
            self._changed.set()
            self._changed = asyncio.Event()

    def acquire(self, alloc: AllocId, services: Iterable[ServiceName], tasks: asyncio.TaskGroup) -> None:
        for service in services:
            self._holders.setdefault(service, set()).add(alloc)
            if service not in self._tasks:
                self._tasks[service] = tasks.create_task(self._keep(service), name=f"leaf-{service}")

    def release(self, alloc: AllocId) -> None:
        for service in [service for service, holders in self._holders.items() if alloc in holders]:
            self._holders[service].discard(alloc)
            if not self._holders[service]:
                del self._holders[service]
                self._tasks.pop(service).cancel()
                self._expires_at_s.pop(service, None)

    async def _keep(self, service: ServiceName) -> None:
        attempts = 0
        while True:
            changed, roots = self._changed, self._roots
            if not roots.trust_domain:
                await changed.wait()
                continue
            try:
                leaf = await self._obtain(service, roots)
            except (PeerError, InputError) as error:
                delay_s = self._retry_s(attempts)
                attempts += 1
                self._log.warning("no leaf", service=service, reason=str(error), again_in_s=round(delay_s, 2))
            else:
                self._give(leaf)
                self._expires_at_s[service] = leaf.expires_at_s
                if leaf.superseded:
                    delay_s = self._retry_s(attempts)
                    attempts += 1
                else:
                    attempts = 0
                    # Half of its life, a little earlier or not: nodes that joined together do not renew together.
                    life_s = leaf.expires_at_s - wall_s()
                    delay_s = max(life_s / 2 * self._rng.uniform(0.9, 1.0), _RENEW_MIN_S)
            await _wait(changed, delay_s)

    def _retry_s(self, attempts: int) -> float:
        return min(_RETRY_S * 2.0 ** min(attempts, 10), _RETRY_MAX_S) * self._rng.uniform(0.8, 1.2)

    async def _obtain(self, service: ServiceName, roots: TrustRoots) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = await self._issue(
            service, signing_request(key, spiffe_id(roots.trust_domain, roots.datacenter, service))
        )
        if leaf.key_pem:  # made by Consul, together with the certificate
            return leaf
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Leaf(
            service=leaf.service,
            certificate_pem=leaf.certificate_pem,
            key_pem=pem.decode(),
            expires_at_s=leaf.expires_at_s,
            serial=leaf.serial,
        )


def signing_request(key: ec.EllipticCurvePrivateKey, uri: str) -> str:
    """A CSR in PEM with `uri` as its only name."""
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


async def _wait(event: asyncio.Event, delay_s: float) -> None:
    try:
        async with asyncio.timeout(delay_s):
            await event.wait()
    except TimeoutError:
        return
