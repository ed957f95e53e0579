"""Envoy's admin interface over its unix socket, as far as the agent needs it. Reached by the agent alone."""

from pathlib import Path

import aiohttp

from outrider.errors import PeerError
from outrider.ids import AllocId

_DEADLINE_S = 2.0


class Admin:
    """One Envoy's admin socket. Every call has a deadline and raises PeerError."""

    def __init__(self, alloc: AllocId, socket: Path) -> None:
        self._alloc, self._socket = alloc, socket

    async def workers_started(self, listeners: int) -> bool:
        """Whether Envoy accepts connections on `listeners` listeners; False also while it is not up yet."""
        if not self._socket.exists():
            return False
        try:
            text = await self._call("GET", "/stats?filter=^listener_manager")
        except PeerError:
            return False
        figures = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        return (
            figures.get("listener_manager.workers_started") == "1"
            and figures.get("listener_manager.total_listeners_warming") == "0"
            and int(figures.get("listener_manager.total_listeners_active", "0")) >= listeners
        )

    async def drain(self) -> None:
        await self._call("POST", "/healthcheck/fail")
        await self._call("POST", "/drain_listeners?graceful&inboundonly")

    async def figures(self) -> str:
        """In Prometheus' text form; sidecar.stats reads it."""
        # Envoy merges its workers' histograms after a read, not before: the second sees what the first asked for.
        await self._call("GET", "/stats?filter=^$")
        return await self._call("GET", "/stats/prometheus?usedonly")

    async def _call(self, method: str, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=_DEADLINE_S)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(path=str(self._socket)), timeout=timeout
                ) as session,
                session.request(method, f"http://envoy{path}") as response,
            ):
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PeerError(
                f"sidecar of {self._alloc}: its Envoy does not answer {path}: {error}; see its log"
            ) from error
        if response.status != 200:
            raise PeerError(f"sidecar of {self._alloc}: its Envoy answered {path} with {response.status}: {text[:200]}")
        return text
