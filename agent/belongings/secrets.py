"""The secrets of this node's allocations: asked of the controller when a task needs them, kept in memory only.

Owns the values while their allocation lives. Writes nothing: `memory` has the files, a sandbox its environment.
"""

from collections.abc import Awaitable, Callable, Mapping

from outrider.errors import HostError, PeerError
from outrider.ids import AllocId, SecretName
from outrider.model.allocation import Assignment
from outrider.model.job import Value


class SecretValue(Value, frozen=True, kw_only=True):
    version: int
    content: bytes

    def __repr__(self) -> str:  # whatever is logged or raised, the value is not in it
        return f"SecretValue(version={self.version})"


Secrets = Mapping[SecretName, SecretValue]
Ask = Callable[[AllocId], Awaitable[Secrets]]


class SecretsInMemory:
    """`ask` raises PeerError where the controller is away or says no."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[AllocId, Secrets] = {}

    async def of(self, assignment: Assignment) -> Secrets:
        """In the versions that the assignment has, or newer. Raises HostError where they cannot be had now."""
        alloc, wanted = assignment.alloc, assignment.secrets
        known = self._known.get(alloc, {})
        if all(name in known and known[name].version == version for name, version in wanted.items()):
            return known
        try:
            known = self._known[alloc] = await self._ask(alloc)
        except PeerError as error:
            raise HostError("secrets", step=f"ask the controller: {error}") from error
        missing = wanted.keys() - known.keys()
        if missing:
            raise HostError("secrets", step=f"the controller does not have {', '.join(sorted(missing))} any more")
        return known

    def forget(self, alloc: AllocId) -> None:
        self._known.pop(alloc, None)
