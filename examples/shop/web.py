"""The shop's front: asks the api for every page. Plain HTTP; its sidecar does the rest."""

import http.client
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_TIMEOUT_S = 10.0


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, {"web": os.environ["OUTRIDER_ALLOC_ID"]})
            return
        try:
            status, said = _ask_api()
        except OSError as error:
            self._answer(502, {"web": os.environ["OUTRIDER_ALLOC_ID"], "error": f"api: {error}"})
            return
        self._answer(status, {"web": os.environ["OUTRIDER_ALLOC_ID"], **said})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Quiet: the sidecar's log has every request."""

    def _answer(self, status: int, said: dict[str, object]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _ask_api() -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("api.mesh", timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/visit")
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        return response.status, {"error": f"api: {response.status} {body[:200].decode(errors='replace')}"}
    return 200, json.loads(body)


class Server(ThreadingHTTPServer):
    request_queue_size = 128


Server(("", int(os.environ["PORT_HTTP"])), Page).serve_forever()
