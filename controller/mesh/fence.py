"""Writes that Consul's transactions do not take (proxies in 1.8, intentions, config entries): when each may be sent.

Only while the lock is this controller's, as Consul itself said at most FENCE_S ago. A config entry is replaced only
where it is as it was read, too. What a process that was stopped in just that moment sends late all the same, the next
leader sees by its watches, and puts right.
"""

from typing import Final

from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.leader import Lock
from outrider.clock import monotonic_s
from outrider.errors import PeerError

FENCE_S: Final = 0.5


class Fence:
    def __init__(self, consul: ConsulAdapter, lock: Lock) -> None:
        self._consul, self._lock = consul, lock
        self._asked_s = -FENCE_S

    async def check(self) -> None:
        """Just before such a write. Raises PeerError where the lock is not this controller's, or nobody can tell."""
        if not self._lock.held:
            raise PeerError("the leader lock is not held")
        if monotonic_s() - self._asked_s >= FENCE_S:
            await self.ask()

    async def ask(self) -> None:
        """Of Consul, now: after the last such write too, so that none is taken for written that may not be."""
        asked_s = monotonic_s()
        if (await self._consul.transact([self._lock.guard()])).errors:
            self.lost()
        self._asked_s = asked_s

    def lost(self) -> None:
        self._lock.lost()
        raise PeerError("the leader lock is lost")
