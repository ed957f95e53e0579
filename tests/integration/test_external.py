"""Services outside of the mesh as a workload meets them: by name, through its sidecar, at the listed ports, and with
TLS that the sidecar makes and verifies. A real agent, a real Envoy, a real TLS server on another host."""

import json
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.sandbox.logs import last_lines
from outrider.ids import AllocId, GroupName, JobName, ServiceName, TaskName
from outrider.model.allocation import AllocStatus, Assignment
from outrider.model.external import External, ExternalPort, ExternalTls
from outrider.model.job import File, Group, Network, Service, Task
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.certificates import Authority
from tests.integration.network_lab import OTHER_HOST, SERVER_PORT, Lab, node
from tests.integration.sidecar_mesh import until

__all__ = ["node"]
pytestmark = pytest.mark.host

ALLOC = AllocId("00000000e1")
METRICS = 9464  # in the node's own namespace
TLS_PORT = 8443
HOST = "api.payments.example"
# Serves TLS with the certificate of argv[1]; answers a line with itself and the name that it was asked for.
SERVER = """
import socket, ssl, sys
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(sys.argv[1])
asked = []
context.sni_callback = lambda socket, name, context: asked.append(name)
listening = socket.create_server((sys.argv[2], int(sys.argv[3])))
print("serving", flush=True)
while True:
    client, _ = listening.accept()
    client.settimeout(10)
    try:
        with context.wrap_socket(client, server_side=True) as secure:
            secure.sendall(secure.recv(100).strip() + b" for " + asked[-1].encode())
    except OSError:
        client.close()
"""
# Each attempt is [name, port, name to verify or ""]; a line of JSON says what came of all.
WORKLOAD = """
import json, socket, ssl, sys, time
def attempt(host, port, name):
    try:
        with socket.create_connection((host, port), timeout=20) as opened:
            if name:
                context = ssl.create_default_context(cafile=sys.argv[1])
                opened = context.wrap_socket(opened, server_hostname=name)
            opened.sendall(b"hello\\n")
            return opened.recv(1000).decode()
    except OSError as error:
        return type(error).__name__
print(json.dumps([attempt(*each) for each in json.loads(sys.argv[2])]), flush=True)
time.sleep(600)
"""


@pytest.fixture
async def fleet(node: Lab) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - it is where this thread then lives
    async with agent_fleet(metrics_listen=f"127.0.0.1:{METRICS}") as made:
        yield made


async def test_what_is_named_is_reached_and_verified_and_nothing_else_is(
    fleet: AgentFleet, node: Lab, tmp_path: Path
) -> None:
    ours, other = Authority("ours", "dc1"), Authority("other", "dc1")
    leaf = ours.leaf("outside", host=HOST)
    (tmp_path / "server.pem").write_text(leaf.certificate_pem + leaf.key_pem)
    node.run_on_other_host(sys.executable, "-c", SERVER, str(tmp_path / "server.pem"), OTHER_HOST, str(TLS_PORT))
    secure = (ExternalPort(port=80, to=TLS_PORT),)

    def tls(name: str, server_name: str, ca_pem: str) -> External:
        return External(
            name=ServiceName(name),
            hosts=(OTHER_HOST,),
            ports=secure,
            tls=ExternalTls(server_name=server_name, ca_pem=ca_pem),
        )

    externals = (
        tls("payments", HOST, ours.certificate_pem),
        tls("wrong-name", "api.other.example", ours.certificate_pem),
        tls("wrong-authority", HOST, other.certificate_pem),
        tls("world", HOST, ""),
        External(
            name=ServiceName("plain"),
            hosts=(OTHER_HOST,),
            ports=(ExternalPort(port=SERVER_PORT, to=SERVER_PORT), ExternalPort(port=443, to=TLS_PORT)),
        ),
        # What cannot be found delays nobody and is refused.
        External(name=ServiceName("gone"), hosts=("gone.invalid",), ports=(ExternalPort(port=443, to=443),)),
    )
    attempts: list[tuple[str, int, str]] = [
        ("payments.mesh", 80, ""),
        ("plain.mesh", 443, HOST),
        ("plain.mesh", SERVER_PORT, ""),
        # From here on: refused.
        ("wrong-name.mesh", 80, ""),
        ("wrong-authority.mesh", 80, ""),
        ("world.mesh", 80, ""),
        ("gone.invalid", 443, ""),
        ("plain.mesh", 22, ""),
        ("plain.mesh", 15001, ""),
        (OTHER_HOST, SERVER_PORT, ""),
        ("nowhere.example", 443, ""),
    ]
    await fleet.start()
    fleet.controller.mesh()
    fleet.controller.assign(assignment(externals, attempts, ours.certificate_pem), full=True)
    await until(lambda: fleet.controller.status(ALLOC) is AllocStatus.RUNNING, 30)
    directory = fleet.data / "allocations" / ALLOC
    said = await until(lambda: last_lines(str(directory / "server"), 1), 60)
    payments, through, plain, *refused = json.loads(said)
    assert (payments, through) == (f"hello for {HOST}", f"hello for {HOST}")
    assert json.loads(plain)["own"] == [OTHER_HOST, SERVER_PORT]
    assert set(refused[:-2]) <= {"", "ConnectionResetError"}, refused
    assert refused[-2:] == ["ConnectionRefusedError", "gaierror"]

    figures = await until(lambda: counted('outrider_mesh_errors_total{destination="plain",source="shop"} 2.0'), 30)
    assert 'outrider_workload_refused_packets_total{alloc="00000000e1",group="web",job="shop"} 1.0' in figures
    assert 'outrider_mesh_connections_total{destination="payments",source="shop"} 1.0' in figures

    def logged() -> list[dict[str, Any]]:
        lines = last_lines(str(directory / "sidecar"), 100).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    # The log is written some time after: nine connections came to it.
    lines = await until(lambda: found if len(found := logged()) >= 9 else None, 30)
    of = {(line["upstream"], line["asked"]): line for line in lines}
    assert of["payments", 80]["peer"] == HOST
    for name in ("wrong-name", "wrong-authority", "world"):
        assert "CERTIFICATE_VERIFY_FAILED" in of[name, 80]["connect_error"], name
    assert of["plain", 22]["flags"] == "UH"


def assignment(externals: tuple[External, ...], attempts: list[tuple[str, int, str]], ca_pem: str) -> Assignment:
    files = (File(path="call.py", content=WORKLOAD.encode()), File(path="ca.pem", content=ca_pem.encode()))
    command = ("python3", "-u", "${task.dir}/call.py", "${task.dir}/ca.pem", json.dumps(attempts))
    group = Group(
        name=GroupName("web"),
        tasks=(Task(name=TaskName("server"), command=command, files=files),),
        network=Network(external=externals),
        services=(Service(name=ServiceName("shop")),),
    )
    return Assignment(alloc=ALLOC, job=JobName("shop"), job_version=1, group=group, index=0)


def counted(expected: str) -> str:
    """The node's figures once they have `expected`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text if expected in text else ""
