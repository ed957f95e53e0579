"""Envoy's admin interface over its unix socket, as far as the agent needs it. Reached by the agent alone."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Collection
from pathlib import Path
from urllib.parse import quote

import h11

from outrider.errors import PeerError
from outrider.ids import AllocId
from sidecar.core.scope import figures_scope

_DEADLINE_S = 2.0
_READ_BYTES = 65_536


class Admin:
    """One Envoy's admin socket. Every call has a deadline and raises PeerError."""

    def __init__(self, alloc: AllocId, socket: Path) -> None:
        self._alloc, self._socket = alloc, socket

    async def accepts(self, listeners: Collection[str]) -> bool:
        """Whether Envoy accepts connections on these, by name; False also while it is not up yet."""
        if not self._socket.exists():
            return False
        try:
            active = {line.rpartition("::")[0] for line in (await self._call("GET", "/listeners")).splitlines()}
            if not active.issuperset(listeners):
                return False
            text = await self._call("GET", "/stats?filter=^listener_manager.workers_started$")
        except PeerError:
            return False
        return text.strip() == "listener_manager.workers_started: 1"

    async def drain(self) -> None:
        await self._call("POST", "/healthcheck/fail")
        await self._call("POST", "/drain_listeners?graceful&inboundonly")

    async def figures(self, scope: str) -> str:
        """In Prometheus' text form; sidecar.stats reads it. `scope`: of the one allocation that is meant, if several
        share this Envoy."""
        # Envoy merges its workers' histograms after a read, not before: the second sees what the first asked for.
        await self._call("GET", "/stats?filter=^$")
        ours = f"&filter={quote(re.escape(figures_scope(scope)))}" if scope else ""
        return await self._call("GET", f"/stats/prometheus?usedonly{ours}")

    async def tap(self, config_id: str) -> AsyncGenerator[bytes, None]:
        """What the tap filter of that id sees, without bodies: JSON, in pieces, until closed."""
        sink = {"format": "JSON_BODY_AS_STRING", "streaming_admin": {}}
        output = {"max_buffered_rx_bytes": 0, "max_buffered_tx_bytes": 0, "sinks": [sink]}
        wanted = {"config_id": config_id, "tap_config": {"match": {"any_match": True}, "output_config": output}}
        body = json.dumps(wanted).encode()
        http = h11.Connection(h11.CLIENT)
        try:
            async with asyncio.timeout(_DEADLINE_S):
                reader, writer = await asyncio.open_unix_connection(self._socket)
        except (OSError, TimeoutError) as error:
            raise PeerError(f"sidecar of {self._alloc}: its Envoy does not answer: {error}; see its log") from error
        try:
            headers = [("Host", "envoy"), ("Content-Length", str(len(body)))]
            writer.write(http.send(h11.Request(method="POST", target="/tap", headers=headers)) or b"")
            writer.write((http.send(h11.Data(data=body)) or b"") + (http.send(h11.EndOfMessage()) or b""))
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(_READ_BYTES))
                elif isinstance(event, h11.Response) and event.status_code != 200:
                    raise PeerError(f"sidecar of {self._alloc}: its Envoy answered /tap with {event.status_code}")
                elif isinstance(event, h11.Data):
                    yield bytes(event.data)
        except (h11.ProtocolError, OSError) as error:
            raise PeerError(f"sidecar of {self._alloc}: its Envoy broke off: {error}") from error
        finally:
            writer.close()

    async def _call(self, method: str, path: str) -> str:
        try:
            async with asyncio.timeout(_DEADLINE_S):
                status, text = await self._exchange(method, path)
        except (h11.ProtocolError, OSError, TimeoutError) as error:
            raise PeerError(
                f"sidecar of {self._alloc}: its Envoy does not answer {path}: {error}; see its log"
            ) from error
        if status != 200:
            raise PeerError(f"sidecar of {self._alloc}: its Envoy answered {path} with {status}: {text[:200]}")
        return text

    async def _exchange(self, method: str, path: str) -> tuple[int, str]:
        http = h11.Connection(h11.CLIENT)
        headers = {"Host": "envoy", "Connection": "close", "Content-Length": "0"}
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(http.send(h11.Request(method=method, target=path, headers=list(headers.items()))) or b"")
            http.send(h11.EndOfMessage())
            status, body = 0, b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(_READ_BYTES))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
            return status, body.decode()
        finally:
            writer.close()
