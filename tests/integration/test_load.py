"""A service under constant load while everything around it changes: whoever calls it sees no failed request."""

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(600)]

# One request after the other on each of four connections; nobody tries twice. Tells every moment how it goes.
_CALLER = """
import http.client, json, threading, time

counts, why, lock = {"done": 0, "failed": 0}, [], threading.Lock()

def call():
    connection = None
    while True:
        try:
            connection = connection or http.client.HTTPConnection("target.mesh", timeout=10)
            connection.request("GET", "/")
            answer = connection.getresponse()
            text = answer.read().decode()
            problem = "" if answer.status == 200 else f"{answer.status} {text}"
        except (OSError, http.client.HTTPException) as error:
            connection, problem = None, repr(error)
        with lock:
            counts["done"] += 1
            counts["failed"] += bool(problem)
            why.append(problem) if problem else None
        time.sleep(0.005)

for _ in range(4):
    threading.Thread(target=call, daemon=True).start()
while True:
    time.sleep(0.2)
    with lock:
        print(json.dumps({**counts, "why": why[:3]}), flush=True)
"""
_TARGET = """
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = os.environ["VERSION"].encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass

ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT_HTTP"])), Page).serve_forever()
"""
_TARGET_JOB = """
job: target
groups:
  main:
    count: 3
    update: {{min_healthy: 200ms, healthy_deadline: 60s}}
    network: {{ports: {{http: {{}}}}}}
    services: [{{name: target, port: http, protocol: http, check: {{http: /, interval: 500ms}}, allow: [{allowed}]}}]
    tasks:
      main:
        command: [python3, "${{task.dir}}/target.py"]
        files: {{target.py: ./target.py}}
        env: {{VERSION: "{version}"}}
"""
_CALLER_JOB = """
job: load
groups:
  main:
    constraints: [node.id = n3]
    services: [{name: load, upstreams: [target]}]
    tasks: {main: {command: [python3, -u, "${task.dir}/load.py"], files: {load.py: ./load.py}}}
"""


class Load:
    def __init__(self, fleet: DevFleet, directory: Path) -> None:
        self._fleet, self._directory = fleet, directory
        for name, text in (("load.py", _CALLER), ("target.py", _TARGET), ("load.yaml", _CALLER_JOB)):
            (directory / name).write_text(textwrap.dedent(text))

    def begin(self) -> None:
        self.target("1")
        self.outrider("job", "run", str(self._directory / "load.yaml"))
        self.goes_on()

    def target(self, version: str, *callers: str) -> None:
        job = self._directory / "target.yaml"
        job.write_text(_TARGET_JOB.format(version=version, allowed=", ".join(("load", *callers))))
        self.outrider("job", "run", str(job))

    def outrider(self, *words: str) -> None:
        done = self._fleet.outrider(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def counted(self) -> tuple[int, int, list[str]]:
        lines = self._fleet.outrider("logs", "load", "--tail", "1").stdout.splitlines()
        if not lines or "{" not in lines[-1]:
            return 0, 0, []
        told = json.loads(lines[-1][lines[-1].index("{") :])
        return told["done"], told["failed"], told["why"]

    def goes_on(self) -> None:
        """Until some more requests were answered, after whatever has just been done."""
        before = self.counted()[0]
        eventually(lambda: self.counted()[0] > before + 50, "more requests")

    def while_(self, what: str, change: Callable[[], None]) -> None:
        change()
        self.goes_on()
        done, failed, why = self.counted()
        assert failed == 0, f"while {what}: {failed} of {done} failed: {why}"


@pytest.fixture
def load(fleet: DevFleet, tmp_path: Path) -> Iterator[Load]:
    load = Load(fleet, tmp_path)
    load.begin()
    yield load
    for job in ("load", "target"):
        load.outrider("job", "stop", job)


def test_no_request_fails_while_versions_roll_rights_change_and_a_node_is_drained(load: Load) -> None:
    load.while_("a new version rolls", lambda: load.target("2"))
    load.while_("another caller is allowed", lambda: load.target("2", "stranger"))
    load.while_(
        "an intention is made by hand", lambda: load.outrider("intention", "create", "nobody", "target", "--deny")
    )
    load.while_("it is taken away", lambda: load.outrider("intention", "delete", "nobody", "target"))
    load.while_("another caller loses its right", lambda: load.target("2"))
    load.while_("the root is rotated", lambda: load.outrider("mesh", "rotate-root"))
    load.while_("a node is drained", lambda: load.outrider("node", "drain", "n1"))
    load.while_("it is opened again", lambda: load.outrider("node", "eligibility", "n1", "--enable"))
    load.while_("copies are restarted", lambda: load.outrider("job", "restart", "target"))
