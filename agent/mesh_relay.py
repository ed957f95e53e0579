"""Takes the mesh's changes from the controller to whoever on this node needs them, and back that they arrived.

Task: `run`, which waits for the sidecars. Nothing queues up: the view is one, and only its newest version is told.
"""

import asyncio
from collections.abc import Awaitable, Callable

from agent.core.mesh_view import updated
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.mesh import MeshUpdate, MeshView

_ACKNOWLEDGED_S = 2.0  # the controller waits no longer before it stops what left the mesh (DESIGN, decision 7)


class MeshRelay:
    def __init__(
        self,
        *,
        show: Callable[[MeshView], None],
        acknowledged: Callable[[float], Awaitable[tuple[AllocId, ...]]],
        applied: Callable[[int], None],
        log: Log,
    ) -> None:
        self._show = show
        self._acknowledged = acknowledged
        self._applied = applied
        self._log = log
        self._view = MeshView()
        self._version = 0
        self._changed = asyncio.Event()

    def take(self, update: MeshUpdate) -> None:
        self._view = updated(self._view, update)
        self._version = update.version
        self._show(self._view)
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            version = self._version
            late = await self._acknowledged(_ACKNOWLEDGED_S)
            if late:
                self._log.warning("sidecars late", version=version, allocs=" ".join(late))
            self._applied(version)
