"""Keeps the node's own certificate valid: renewed at half of its life, for the key that the node joined with, and at
once where the fleet's CA has changed.

Owns one task. The files change whole; a session that is open goes on, the next one shows the new certificate.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from agent.join import certificate_life_s, node_key, write_secret
from agent.leaves import signing_request
from agent.trust import Told, Trusting, told, trust, trusting
from outrider.clock import wall_s
from outrider.errors import PeerError
from outrider.log import Log
from outrider.tls import Identity, TlsFiles

_RETRY_S, _RETRY_S_MAX = 5.0, 600.0
_WAIT_S_MIN = 1.0

Renew = Callable[[str], Awaitable[str]]  # a request -> certificate; raises PeerError


class Renewal:
    def __init__(
        self,
        *,
        files: TlsFiles,
        identity: Identity,
        renew: Renew,
        changed: Callable[[Trusting], None],
        log: Log,
        rng: random.Random,
    ) -> None:
        """`changed` hears of whom the node trusts, and of whom its certificate is, whenever that may have changed."""
        self._files = files
        self._identity = identity
        self._renew = renew
        self._changed = changed
        self._told: Told | None = None  # the newest
        self._wake = asyncio.Event()
        self._log = log
        self._rng = rng
        self.expires_at_s = certificate_life_s(files.certificate)[1]

    async def run(self) -> None:
        """For ever. Nodes that joined together do not renew together; a controller that is away is asked again."""
        retry_s = _RETRY_S
        wait_s = self._due_in_s()
        while True:
            due = not await self._woken(wait_s)
            try:
                if await self._take_up() or due:
                    await self._once()
            except (PeerError, OSError) as error:
                left_s = self.expires_at_s - wall_s()
                self._log.warning("certificate not renewed", reason=str(error), valid_for_s=round(left_s))
                wait_s = retry_s * self._rng.uniform(0.8, 1.2)
                retry_s = min(2 * retry_s, _RETRY_S_MAX)
            else:
                retry_s, wait_s = _RETRY_S, self._due_in_s()

    def tell(self, roots_pem: tuple[str, ...], issuer_sha256: str) -> None:
        """What the controller says of the fleet's CA. Raises InputError where it makes no sense."""
        self._told = told(roots_pem, issuer_sha256)
        self._wake.set()

    async def _woken(self, wait_s: float) -> bool:
        """Whether something was told meanwhile."""
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    async def _take_up(self) -> bool:
        """Whether the certificate is of another issuer than it should be."""
        if self._told is None:
            return False
        if await asyncio.to_thread(trust, self._files, self._told):
            now = await asyncio.to_thread(trusting, self._files)
            self._log.warning("the fleet's CA changes", trusted=len(now.roots_sha256), issuer=self._told.issuer_sha256)
            self._changed(now)
        return (await asyncio.to_thread(trusting, self._files)).issuer_sha256 != self._told.issuer_sha256

    async def _once(self) -> None:
        key = await asyncio.to_thread(node_key, self._files.key)
        certificate = await self._renew(signing_request(key, self._identity.uri))
        await asyncio.to_thread(write_secret, self._files.certificate, certificate.encode(), 0o600)
        self.expires_at_s = certificate_life_s(self._files.certificate)[1]
        self._changed(await asyncio.to_thread(trusting, self._files))
        self._log.info("certificate renewed", valid_for_s=round(self.expires_at_s - wall_s()))

    def _due_in_s(self) -> float:
        since_s, until_s = certificate_life_s(self._files.certificate)
        share = self._rng.uniform(0.45, 0.5)
        return max(since_s + share * (until_s - since_s) - wall_s(), _WAIT_S_MIN)
