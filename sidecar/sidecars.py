"""The node's sidecars: each one's files, configuration, readiness, drain and figures.

Contract first; the body follows. Used as `async with Sidecars(...) as sidecars`.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from outrider.ids import AllocId
from outrider.model.job import Value
from outrider.model.mesh import Leaf, MeshView, ObservedRefusal
from sidecar.core.intent import SidecarSpec, SidecarStats


class SidecarFiles(Value, frozen=True, kw_only=True):
    """What the sidecar's sandbox needs: bind `directory` (read-write) at `directory_inside`, `binary` (read-only) at
    `binary_inside`, run `argv`. The access log is its standard output."""

    directory: Path
    directory_inside: Path  # /run/outrider/sidecar
    binary: Path
    binary_inside: Path  # /run/outrider/envoy
    argv: tuple[str, ...]


class Sidecars:
    def __init__(self, *, run_directory: Path, now_s: Callable[[], float]) -> None:
        """`run_directory`: volatile, ours alone. `now_s`: the wall clock, stamps refusals."""
        self.refusals: asyncio.Queue[ObservedRefusal] = asyncio.Queue(maxsize=256)

    async def __aenter__(self) -> "Sidecars":
        raise NotImplementedError

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops serving; Envoys keep their configuration, and reconnect to the next agent."""

    async def add(self, spec: SidecarSpec) -> SidecarFiles:
        """Also adopts: the same spec after an agent's restart keeps the running Envoy's token and configuration."""
        raise NotImplementedError

    def set_view(self, view: MeshView) -> None: ...

    def set_leaf(self, leaf: Leaf) -> None: ...

    async def ready(self, alloc: AllocId, deadline_s: float) -> None:
        """Returns once Envoy serves; `deadline_s` is a duration. Raises PeerError that names what is missing."""

    async def acknowledged(self, deadline_s: float) -> tuple[AllocId, ...]:
        """Waits until every connected sidecar acknowledged the newest view; returns those that have not in time."""
        raise NotImplementedError

    async def drain(self, alloc: AllocId) -> None:
        """Inbound health fails, inbound listeners drain (GOAWAY, no new connections); outbound stays."""

    async def remove(self, alloc: AllocId) -> None:
        """Forgets the sidecar and deletes its directory. The sandbox is gone by then."""

    async def stats(self, alloc: AllocId) -> SidecarStats:
        raise NotImplementedError
