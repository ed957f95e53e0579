"""Three real Consul servers on loopback, each of which can be killed, stopped and started again on its own data."""

import asyncio
import contextlib
import http.client
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from tests.integration.processes import free_port, until

_FETCH = Path(__file__).parents[2] / "scripts/tools/consul.sh"
_READY_S = 60.0


class Server:
    def __init__(self, directory: Path, name: str, program: str, address: str = "127.0.0.1") -> None:
        self.name, self.address, self._program, self._directory = name, address, program, directory
        self.http, self.rpc, self.serf, self._wan = (free_port() for _ in range(4))
        self.process: subprocess.Popen[bytes] | None = None
        self._directory.mkdir(parents=True)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http}"

    def start(self, join: list[str]) -> None:
        command = [self._program, "agent", "-server", "-bootstrap-expect", "3", "-node", self.name]
        command += ["-data-dir", str(self._directory / "data"), "-bind", self.address, "-client", self.address]
        command += ["-http-port", str(self.http), "-server-port", str(self.rpc), "-serf-lan-port", str(self.serf)]
        command += ["-serf-wan-port", str(self._wan), "-dns-port", "-1", "-grpc-port", "-1", "-log-level", "warn"]
        # The timers of a Consul on hosts of its own, rather than those that suit the smallest machines.
        command += ["-hcl", "connect { enabled = true } performance { raft_multiplier = 1 } leave_on_terminate = false"]
        for other in join:
            command += ["-retry-join", other, "-retry-interval", "1s"]
        with (self._directory / "consul.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def get(self, path: str) -> object:
        connection = http.client.HTTPConnection(self.address, self.http, timeout=2)
        with contextlib.closing(connection):
            connection.request("GET", f"/v1/{path}")
            return json.load(connection.getresponse())


class ConsulCluster:
    def __init__(self, directory: Path) -> None:
        found = subprocess.run([_FETCH], check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        program = found.stdout.strip()
        self.servers = [Server(directory / f"consul{number}", f"consul{number}", program) for number in (1, 2, 3)]

    async def start(self) -> None:
        for server in self.servers:
            self.start_server(server)
        await until(self.ready, "Consul has a leader, and Connect its CA", _READY_S)

    def start_server(self, server: Server) -> None:
        server.start([f"{other.address}:{other.serf}" for other in self.servers if other is not server])

    async def ready(self) -> bool:
        return await asyncio.to_thread(self._ready)

    def leader(self) -> Server:
        """Raft's; ask while there is one."""
        for server in self.servers:
            if server.process is not None:
                with contextlib.suppress(OSError, ValueError):
                    raft = server.get("operator/raft/configuration")
                    assert isinstance(raft, dict)
                    name = next(each["Node"] for each in raft["Servers"] if each["Leader"])
                    return next(each for each in self.servers if each.name == name)
        raise AssertionError("no Consul server answers")

    def stop(self) -> None:
        for server in self.servers:
            server.kill()

    def _ready(self) -> bool:
        try:
            for server in self.servers:
                assert server.process is not None
                assert server.process.poll() is None, f"{server.name} ended; see its consul.log"
                if not server.get("status/leader") or not server.get(f"health/node/{server.name}"):
                    return False
                if len(server.get("catalog/nodes")) < len(self.servers) or not server.get("connect/ca/roots"):  # type: ignore[arg-type]
                    return False
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True


@contextlib.asynccontextmanager
async def consul_cluster(directory: Path) -> AsyncIterator[ConsulCluster]:
    cluster = ConsulCluster(directory)
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.stop()
