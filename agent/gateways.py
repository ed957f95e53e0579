"""The certificates of this node's gateways: secrets of their jobs, asked for until they are there, kept in memory.

Owns one named task for each allocation that is a gateway with TLS, until it has what it needs. A new version of the
secret is another allocation.
"""

import asyncio
from collections.abc import Callable

from agent.belongings.secrets import Ask, SecretsInMemory
from outrider.errors import HostError
from outrider.ids import AllocId, SecretName
from outrider.log import Log
from outrider.model.allocation import Assignment

_RETRY_S, _RETRY_MAX_S = 0.1, 15.0

Give = Callable[[AllocId, SecretName, str], None]


class Gateways:
    """Used by the one event loop."""

    def __init__(self, *, ask: Ask, give: Give, tasks: asyncio.TaskGroup, log: Log) -> None:
        self._secrets = SecretsInMemory(ask)
        self._give = give
        self._tasks = tasks
        self._log = log
        self._asking: dict[AllocId, asyncio.Task[None]] = {}

    def acquire(self, assignment: Assignment) -> None:
        """Its sidecar is known: told what it needs, now or later."""
        wanted = {
            listener.secret
            for service in assignment.group.services
            for listener in service.gateway
            if listener.secret is not None
        }
        if wanted:
            asking = self._ask(assignment, frozenset(wanted))
            self._asking[assignment.alloc] = self._tasks.create_task(asking, name=f"{assignment.alloc}-gateway")

    def release(self, alloc: AllocId) -> None:
        asking = self._asking.pop(alloc, None)
        if asking is not None:
            asking.cancel()
        self._secrets.forget(alloc)

    async def _ask(self, assignment: Assignment, wanted: frozenset[SecretName]) -> None:
        delay_s = _RETRY_S
        while True:
            try:
                values = await self._secrets.of(assignment)
            except HostError as error:
                self._log.warning("no certificate for a gateway", alloc=assignment.alloc, reason=str(error))
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
                continue
            for name in sorted(wanted):
                self._give(assignment.alloc, name, values[name].content.decode(errors="replace"))
            return
