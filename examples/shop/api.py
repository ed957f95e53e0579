"""Counts visits in Redis, spoken to over a plain socket: its sidecar makes that mTLS."""

import json
import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_TIMEOUT_S = 10.0


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        said: dict[str, object] = {"api": os.environ["OUTRIDER_ALLOC_ID"]}
        status = 200
        if self.path == "/visit":
            try:
                said["visits"] = _count("visits")
            except OSError as error:
                status, said["error"] = 502, f"redis: {error}"
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Quiet: the sidecar's log has every request."""


def _count(key: str) -> int:
    """One more visit. Raises OSError where Redis is away, or says anything but a number."""
    with socket.create_connection(("redis.mesh", 6379), timeout=_TIMEOUT_S) as connection:
        connection.sendall(f"*2\r\n$4\r\nINCR\r\n${len(key)}\r\n{key}\r\n".encode())
        with connection.makefile("rb") as answers:
            answer = answers.readline()
    if not answer.startswith(b":"):
        raise OSError(f"unexpected answer {answer[:80]!r}")
    return int(answer[1:])


class Server(ThreadingHTTPServer):
    request_queue_size = 128


Server(("", int(os.environ["PORT_HTTP"])), Api).serve_forever()
