"""A guest in a whole fleet, by the command line: moved under load, then drained, and not one request fails of it."""

import json
import time
from pathlib import Path

import pytest

from bench.vm_state import LOADER
from examples.vm import guest as example
from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(1200)]

JOB = """
job: machines
groups:
  guest:
    network: {ports: {http: {}}}
    services:
      - {name: target, port: http, protocol: http, check: {http: /, interval: 1s, timeout: 2s}, allow: [caller]}
    tasks:
      machine:
        driver: vm
        image: @image@
        files: {www/index.html: ./guest.html}
        resources: {cpu: 200m, memory: 128Mi, disk: 64Mi}
        kill_timeout: 20s
"""
CALLER = """
job: caller
groups:
  caller:
    services: [{name: caller, upstreams: [target]}]
    tasks:
      caller: {command: [python3, -u, "${task.dir}/load.py"], files: {load.py: ./load.py}}
"""


def run(fleet: DevFleet, text: str, path: Path) -> None:
    path.write_text(text)
    done = fleet.outrider("job", "run", str(path))
    assert done.returncode == 0, done.stderr


def allocations(fleet: DevFleet, job: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = fleet.json("alloc", "ls", "--job", job)
    return found


def asked(fleet: DevFleet) -> tuple[float, float]:
    """How many requests there were so far, and how many failed: of each caller, for one leaves a drained node, too."""
    said = [json.loads(line.partition(" ")[2]) for line in told(fleet).splitlines()]
    return sum(each["asked"] for each in said), sum(each["failed"] for each in said)


def told(fleet: DevFleet) -> str:
    return fleet.outrider("logs", "caller", "--tail", "1").stdout


def test_a_guest_moves_under_load_without_a_failed_request_and_leaves_a_drained_node_so(
    fleet: DevFleet, tmp_path: Path
) -> None:
    built = example.build()
    (tmp_path / "guest.html").write_text("hello\n")
    (tmp_path / "load.py").write_text(LOADER)
    image = (built / "vm.yaml").read_text().partition("image:")[2].partition("files:")[0]
    run(fleet, JOB.replace("@image@", image.rstrip()), tmp_path / "machines.yaml")
    run(fleet, CALLER, tmp_path / "caller.yaml")
    eventually(lambda: bool(told(fleet)), "it calls")
    asked_before, failed_before = asked(fleet)

    (first,) = allocations(fleet, "machines")
    other = next(name for name in ("n1", "n2", "n3") if name != first["node"])
    moved = fleet.outrider("vm", "migrate", "machines", "--to", other)
    assert moved.returncode == 0, moved.stderr
    assert "goes on as" in moved.stderr
    (second,) = allocations(fleet, "machines")
    assert second["node"] == other
    assert second["id"] != first["id"]

    drained = fleet.outrider("node", "drain", other)
    assert drained.returncode == 0, drained.stderr
    eventually(lambda: [each["node"] for each in allocations(fleet, "machines")] not in ([other], []), "it left")
    events = fleet.outrider("events").stdout
    assert events.count("alloc.moved") == 2, events
    text = fleet.outrider("alloc", "logs", str(allocations(fleet, "machines")[0]["id"])).stdout
    assert "guest serves" not in text, "it booted once"

    ended_s = time.monotonic()
    eventually(lambda: asked(fleet)[0] > asked_before and time.monotonic() > ended_s + 2, "it still calls")
    assert asked(fleet)[1] == failed_before
