"""One Envoy as the ADS server and the agent see it: whose configuration it has, its stream, and what it refused.

An allocation's own, or the one that several share: then each of them is a part, by names that begin with its id, and
what one of them has or lacks is nothing to the others.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from outrider.ids import AllocId
from sidecar.admin import Admin
from sidecar.ads import Stream
from sidecar.core.resources import Kind, Pair
from sidecar.core.scope import alloc_of
from sidecar.core.subscription import Rejection, Versions
from sidecar.sidecar import Rendered, Sidecar

V = TypeVar("V")


class Progress:
    """Wakes all who wait for a condition that a sidecar's answer may have made true."""

    def __init__(self) -> None:
        self._beat = asyncio.Event()

    def beat(self) -> None:
        self._beat.set()
        self._beat = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._beat.wait()


class Envoy:
    """The ADS server's `Client`."""

    def __init__(self, name: AllocId, token: str, admin: Admin, *, shared: bool) -> None:
        self.name, self.token, self.admin, self.shared = name, token, admin, shared
        self.parts: dict[AllocId, Sidecar] = {}
        # Served before this agent began, and not known here again: what the Envoy has of them stays as it is.
        self.awaited: set[AllocId] = set()
        self.progress = Progress()
        self.stream: Stream | None = None
        self.rendered: Rendered = {}
        self.versions: Versions = {}
        self.complete = False
        self._rejection: tuple[Rejection, Mapping[str, str]] | None = None

    def refresh(self) -> None:
        """After something in its parts changed, or one came or went."""
        ready = [part for part in self.parts.values() if part.complete]
        self.awaited -= {part.alloc for part in ready}
        if self.shared:
            self.rendered = _together([part.rendered for part in ready])
            self.versions = _together([part.versions for part in ready])
            self.complete = True  # as far as it goes: nobody waits for another's
        else:
            self.complete = bool(ready)
            for part in ready:
                self.rendered, self.versions = part.rendered, part.versions
        if self.stream is not None:
            self.stream.changed.set()
        self.progress.beat()

    def connected(self, stream: Stream) -> None:
        self.stream = stream
        stream.changed.set()

    def disconnected(self, stream: Stream) -> None:
        if self.stream is stream:
            self.stream = None
            self.progress.beat()

    def answered(self, rejection: Rejection | None) -> None:
        if rejection is not None:
            versions = {name: self.versions.get(rejection.kind, {}).get(name, "") for name in rejection.names}
            self._rejection = (rejection, versions)
        self.progress.beat()

    def kept(self, name: str) -> bool:
        return self.shared and alloc_of(name) in self.awaited

    def whose(self, log: str) -> AllocId:
        return alloc_of(log) if self.shared else self.name

    def forget(self) -> None:
        """Removed: nobody waits for it any more."""
        self.stream = None
        self.progress.beat()

    def behind(self) -> bool:
        """One that has nothing yet, or no Envoy, sends traffic nowhere: it is not waited for."""
        return self.complete and self.stream is not None and not self.settled()

    async def caught_up(self) -> None:
        await self.progress.until(lambda: not self.behind())

    def settled(self) -> bool:
        return self.complete and self.stream is not None and self.stream.subscription.settled(self.versions)

    def serves(self, part: Sidecar) -> bool:
        """Whether all that the part should have was answered for."""
        return part.complete and self.settled()

    @property
    def tapped(self) -> Pair | None:
        return next((part.tapped for part in self.parts.values() if part.tapped is not None), None)

    def rejected(self, part: Sidecar) -> str:
        if self._rejection is None:
            return ""
        rejection, versions = self._rejection
        now = part.versions.get(rejection.kind, {})
        ours = (name for name in versions if not self.shared or alloc_of(name) == part.alloc)
        still = [name for name in ours if now.get(name, "") == versions[name]]
        if not still:
            return ""  # all of it has been replaced since
        return f"{', '.join(still)}: {rejection.error}"

    def why_not(self, part: Sidecar) -> str:
        if part.missing:
            return f"the controller has not sent {', '.join(part.missing)}"
        if rejected := self.rejected(part):
            return f"Envoy refused {rejected}"
        if self.stream is None:
            return "its Envoy has not connected; see `outrider alloc logs ALLOC sidecar`"
        return "its Envoy has not opened all listeners; see `outrider alloc logs ALLOC sidecar`"


def _together(parts: list[Mapping[Kind, Mapping[str, V]]]) -> dict[Kind, dict[str, V]]:
    found: dict[Kind, dict[str, V]] = {kind: {} for kind in Kind}
    for part in parts:
        for kind, by_name in part.items():
            found[kind].update(by_name)
    return found
