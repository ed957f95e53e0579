"""A real Consul for tests: `agent -dev` on loopback with ports and data of its own, ended by its handle."""

import contextlib
import http.client
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.integration.processes import free_port

_FETCH = Path(__file__).parents[2] / "scripts/tools/consul.sh"
_READY_S = 20.0


class RealConsul:
    """In memory: what is started again begins empty, on the same ports."""

    def __init__(self, directory: Path) -> None:
        found = subprocess.run([_FETCH], check=True, stdout=subprocess.PIPE, text=True, timeout=120)
        self.program = found.stdout.strip()
        self._directory = directory
        self._ports = [free_port() for _ in range(4)]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        web, server, lan, wan = map(str, self._ports)
        command = [self.program, "agent", "-dev", "-node", "real", "-bind", "127.0.0.1", "-client", "127.0.0.1"]
        command += ["-http-port", web, "-server-port", server, "-serf-lan-port", lan, "-serf-wan-port", wan]
        command += ["-dns-port", "-1", "-grpc-port", "-1", "-log-level", "warn"]
        with (self._directory / "consul.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory)
        deadline_s = time.monotonic() + _READY_S
        while not self._ready():
            assert self._process.poll() is None, (self._directory / "consul.log").read_text()
            assert time.monotonic() < deadline_s, "Consul found no leader"
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ready(self) -> bool:
        """It leads, its own node is registered, and Connect has its CA."""
        try:
            for path in ("health/node/real", "connect/ca/roots"):
                connection = http.client.HTTPConnection("127.0.0.1", self._ports[0], timeout=1)
                with contextlib.closing(connection):
                    connection.request("GET", f"/v1/{path}")
                    answer = connection.getresponse()
                    if answer.status != 200 or answer.read().strip() in (b"[]", b"null"):
                        return False
        except (OSError, http.client.HTTPException):
            return False
        return True


@contextlib.contextmanager
def real_consul(directory: Path) -> Iterator[RealConsul]:
    consul = RealConsul(directory)
    consul.start()
    try:
        yield consul
    finally:
        consul.stop()
