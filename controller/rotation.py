"""The change of the fleet's CA while everything runs: who is told, who is behind, when the old one can go.

Owns the order of it: files, the other controllers, this one's own certificates, then the agents. `ca` makes what is
needed. No task of its own; one change at a time.
"""

import asyncio
from collections.abc import Awaitable, Callable

from controller.ca import FleetCa, pem_sha256
from controller.core import views
from controller.core.state import State
from controller.sessions import Sessions
from outrider.clock import wall_s
from outrider.errors import HostError, RefusedError
from outrider.log import Log
from outrider.model.access import CaState, NodeBehind
from outrider.v1 import fleet_pb2

_SHOWN_MAX = 5


class Rotation:
    def __init__(
        self,
        *,
        ca: FleetCa,
        sessions: Sessions,
        state: State,
        share: Callable[[], None],
        issue: Callable[[], object],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`share`: what the CA's files hold, to the other controllers; raises PeerError. `issue`: this controller's own
        certificates anew. Both block. `changed`: what else hangs on the CA."""
        self._ca, self._sessions, self._state = ca, sessions, state
        self._share, self._issue, self._changed = share, issue, changed
        self._log = Log("ca")
        self._one = asyncio.Lock()

    def trust(self) -> fleet_pb2.Trust:
        return fleet_pb2.Trust(roots_pem=self._ca.roots, issuer_sha256=self._ca.sha256)

    def told(self) -> CaState:
        trust, rotated_at_s = self.trust(), self._ca.rotated_at_s
        if rotated_at_s is None:
            return CaState(sha256=self._ca.sha256)
        access, now_s = self._state.access, wall_s()
        nodes = (
            found.node.id
            for found in views.node_states(self._state)
            if access.node_keys.get(found.node.id) not in access.revoked_keys
        )
        found = ((node, self._sessions.behind(node, trust)) for node in nodes)
        tokens = [each.token for each in access.tokens.values()]
        return CaState(
            sha256=self._ca.sha256,
            previous_sha256=pem_sha256(self._ca.roots[1]),
            rotated_at_s=rotated_at_s,
            behind=tuple(NodeBehind(node=node, reason=reason) for node, reason in found if reason),
            tokens_before=sum(token.created_at_s < rotated_at_s and token.expires_at_s > now_s for token in tokens),
        )

    async def rotate(self) -> CaState:
        """Said again while two are trusted, it tells everybody again. Raises HostError, PeerError."""
        async with self._one:
            await self._change(self._ca.rotate)
            self._log.warning("the fleet's CA changes", sha256=self._ca.sha256, trusted=len(self._ca.roots))
        return self.told()

    async def retire(self, *, force: bool) -> CaState:
        """Raises RefusedError where nodes are behind and `force` is not, HostError, PeerError."""
        async with self._one:
            behind = self.told().behind
            if behind and not force:
                shown = "; ".join(f"{each.node}: {each.reason}" for each in behind[:_SHOWN_MAX])
                more = f" and {len(behind) - _SHOWN_MAX} more" if len(behind) > _SHOWN_MAX else ""
                text = f"{len(behind)} nodes would be shut out: {shown}{more}; with --force they must join again"
                raise RefusedError("behind", text)
            await self._change(self._ca.retire)
            self._log.warning("the fleet's CA before is trusted no longer", sha256=self._ca.sha256)
        return self.told()

    async def _change(self, change: Callable[[], bool]) -> None:
        def on_disk() -> None:
            try:
                change()
                self._share()
                self._issue()
            except OSError as error:
                raise HostError("ca", step=f"write its files: {error}", hint="make room, and say it again") from error

        await asyncio.to_thread(on_disk)
        self._sessions.trust(self.trust())
        await self._changed()
