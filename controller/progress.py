"""Whether this process gets on: a plain HTTP answer for Consul's check, on which the leader's session hangs.

Owns one thread. It answers 200 as long as the event loop came round within STALLED_S: a stopped process answers
nothing, a hung loop answers 503, and one long step is no failure yet. A TCP check would pass in both cases. So does a
leader of no use: one that Consul reaches, and that does not reach Consul.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from outrider.clock import monotonic_s
from outrider.config import host_port
from outrider.errors import ConfigError

STALLED_S: Final = 1.5
_BEAT_S: Final = 0.2
_REQUEST_TIMEOUT_S: Final = 2.0


@contextlib.asynccontextmanager
async def progress_listener(listen: str, of_use: Callable[[], bool]) -> AsyncIterator[str]:
    """Yields the URL to check. `of_use` is asked from another thread."""
    host, port = host_port(listen)
    beaten_s = [monotonic_s()]

    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            behind_s = monotonic_s() - beaten_s[0]
            text = f"the event loop came round {behind_s:.1f} s ago\n".encode()
            self.send_response(200 if behind_s < STALLED_S and of_use() else 503)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_arguments: object) -> None:
            """Once a second is too often to be told."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Whoever asked hung up before the answer: it was asked of a process that had been stopped."""

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise ConfigError(f"progress_listen: {listen} cannot be bound: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="progress", daemon=True)
    thread.start()
    beating = asyncio.create_task(_beat(beaten_s), name="progress-beat")
    try:
        yield f"http://{host}:{server.server_address[1]}/"
    finally:
        beating.cancel()
        server.shutdown()
        server.server_close()


async def _beat(beaten_s: list[float]) -> None:
    while True:
        beaten_s[0] = monotonic_s()
        await asyncio.sleep(_BEAT_S)
