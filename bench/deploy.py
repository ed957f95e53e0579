"""Bare hosts to a healthy fleet over SSH, and an upgrade of it under a load of requests through the mesh.

Hosts are real sshd instances on this machine, each in namespaces of its own (tests/integration/ssh_hosts): what is
measured is the work of all hosts on this machine's cores together. There is no peer to run beside it.
"""

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.figure import emit
from tests.integration.ssh_hosts import SshHosts

HOSTS_AT = {10: 10, 5: 5, 1: 2}  # so many at once -> so many in all; the controller's host is one of them
UPGRADE_HOSTS = 3
_DEPLOY_S = 1200.0
_SOCKET = "unix:/run/outrider/controller/operator.sock"
_ROOT = Path(__file__).parents[1]

_SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""
# Nobody tries twice: what fails is told, with the totals, after every request that failed and every 50.
_CLIENT = """
import time, urllib.request
done = failed = 0
while True:
    try:
        urllib.request.urlopen("http://web.mesh", timeout=5).read(); done += 1
    except OSError as error:
        failed += 1; print("failure", time.strftime("%X"), error, flush=True)
    if (done + failed) % 50 == 0:
        print("total", done, failed, flush=True)
    time.sleep(0.01)
"""
LOAD_JOB = {
    "job": "load",
    "groups": {
        "web": {
            "count": 2,
            "network": {"ports": {"http": {"to": 8080}}},
            "services": [{
                "name": "web", "port": "http", "protocol": "http", "check": {"http": "/"}, "allow": ["client"],
            }],
            "tasks": {"server": {"command": ["python3", "-u", "-c", _SERVER]}},
        },
        "client": {
            "depends_on": ["web"],
            "services": [{"name": "client", "upstreams": ["web"]}],
            "tasks": {"client": {"command": ["python3", "-u", "-c", _CLIENT]}},
        },
    },
}  # fmt: skip


def run() -> None:
    for parallel, count in HOSTS_AT.items():
        with SshHosts(count) as hosts:
            took_s = deploy(hosts, hosts.inventory("bench"), "--parallel", str(parallel))
            if count == 10:
                emit("deploy.ten_hosts_s", took_s, "s")
            emit(f"deploy.host_s_at_{parallel}", took_s / count, "s")
    with SshHosts(UPGRADE_HOSTS) as hosts:
        done, failed, lost = upgrade_under_load(hosts)
        emit("deploy.upgrade_requests", done, "requests")
        emit("deploy.upgrade_failed_requests", failed, "requests")
        emit("deploy.upgrade_lost_workloads", len(lost), "workloads")


def deploy(hosts: SshHosts, file: Path, *words: str, source: Path | None = None) -> float:
    """Seconds. The bundle is there already: its making is not the hosts' work."""
    options = ["--source", str(source)] if source is not None else []
    hosts.outrider("deploy", "-f", str(file), "--dry-run", *options, timeout_s=_DEPLOY_S)
    began_s = time.monotonic()
    done = hosts.outrider("deploy", "-f", str(file), *options, *words, timeout_s=_DEPLOY_S)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began_s


def upgrade_under_load(hosts: SshHosts) -> tuple[int, int, Sequence[str]]:
    """Requests that were answered during an upgrade of every host, those that failed, and workloads that are others."""
    file = hosts.inventory("bench")
    deploy(hosts, file)
    job = hosts.path(hosts.addresses[0], "/var/tmp/load.yaml")  # noqa: S108 - the host's own
    job.write_text(yaml.safe_dump(LOAD_JOB))
    outrider(hosts, "job", "run", "/var/tmp/load.yaml")  # noqa: S108
    before = _allocations(hosts)
    done_before, failed_before = _until_total(hosts, 50)
    deploy(hosts, file, "--upgrade", source=_newer(hosts.directory / "newer"))
    done, failed = _until_total(hosts, _total(hosts)[0] + 100)
    return done - done_before, failed - failed_before, sorted(before - _allocations(hosts))


def outrider(hosts: SshHosts, *words: str) -> str:
    done = hosts.inside(
        hosts.addresses[0], "/opt/outrider/current/bin/outrider", "--address", _SOCKET, *words, timeout_s=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _newer(directory: Path) -> Path:
    """This checkout, one version further."""
    for package in ("outrider", "agent", "controller", "sidecar"):
        shutil.copytree(_ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    init = directory / "outrider/__init__.py"
    init.write_text(re.sub(r'(__version__ = "[0-9.]+)"', r'\1.1"', init.read_text()))
    return directory


def _allocations(hosts: SshHosts) -> set[str]:
    """With how often each was restarted: one that came back is another."""
    status = json.loads(outrider(hosts, "job", "status", "load", "--json"))
    return {
        f"{each['id']} {[task['restarts'] for task in each['report']['tasks']]}"
        for each in status["allocations"]
        if each["status"] == "running" and each["report"] is not None
    }


def _total(hosts: SshHosts) -> tuple[int, int]:
    (client,) = (
        each["id"] for each in json.loads(outrider(hosts, "alloc", "ls", "--json")) if each["group"] == "client"
    )
    totals = re.findall(r"total (\d+) (\d+)", outrider(hosts, "alloc", "logs", client))
    return (int(totals[-1][0]), int(totals[-1][1])) if totals else (0, 0)


def _until_total(hosts: SshHosts, wanted: int) -> tuple[int, int]:
    end_s = time.monotonic() + 120
    while (now := _total(hosts))[0] < wanted:
        assert time.monotonic() < end_s, f"{wanted} requests are not done: {now}"
        time.sleep(0.5)
    return now
