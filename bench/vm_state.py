"""What a guest's state costs: to go on from a snapshot instead of booting, to carry it as a file, to move under load.

Part of `bench.vm`, which has the fleet: the peer of a warm start is the boot of the same run, of a file `cp`.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.figure import emit, percentile
from bench.fleet import Fleet
from bench.start import until
from outrider.ids import GroupName, JobName, ServiceName, TaskName
from outrider.model.job import Group, Job, Protocol, Service, Task, Upstream
from outrider.v1 import operator_pb2

ROUNDS = 3
MOVES = 4

# Asks as fast as it is answered, a new connection each time; says every half second how it fared so far.
LOADER = """
import http.client, json, time
asked = failed = 0
longest_s, told_s = 0.0, time.monotonic()
while True:
    began_s = time.monotonic()
    connection = http.client.HTTPConnection("target.mesh", timeout=10)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        failed += answer.status != 200
        answer.read()
    except (OSError, http.client.HTTPException):
        failed += 1
    finally:
        connection.close()
    asked += 1
    longest_s = max(longest_s, time.monotonic() - began_s)
    if time.monotonic() > told_s + 0.5:
        told_s = time.monotonic()
        print(json.dumps({"asked": asked, "failed": failed, "longest_ms": 1000 * longest_s}), flush=True)
"""


def measure(fleet: Fleet, target: Job, changes: Iterator[str], *, boot_s: float, directory: Path) -> None:
    fleet.submit(target)
    until(changes, "up")
    _outrider(fleet, "vm", "snapshot", "target", "warm")
    fleet.stop("target")
    warm = []
    for _ in range(ROUNDS):
        until(changes, "down")
        submitted_s = time.time()
        fleet.submit(_from_snapshot(target))
        warm.append(until(changes, "up") - submitted_s)
        fleet.stop("target")
    warm_s = percentile(warm, 0.5)
    emit("vm.snapshot_start_ms_p50", warm_s * 1000, "ms", peer="boot", peer_value=boot_s * 1000)
    emit("vm.snapshot_start_ratio", warm_s / boot_s, "x")
    _carry(fleet, directory)
    until(changes, "down")
    fleet.submit(target)
    until(changes, "up")
    _move(fleet)
    fleet.stop("target")


def _carry(fleet: Fleet, directory: Path) -> None:
    exported, copied = directory / "warm.snapshot", directory / "copy"
    began_s = time.monotonic()
    _outrider(fleet, "vm", "export", "warm", str(exported))
    export_s = time.monotonic() - began_s
    size_mb = exported.stat().st_size / 1_000_000
    began_s = time.monotonic()
    subprocess.run(["cp", "--reflink=never", str(exported), str(copied)], check=True)
    copy_s = time.monotonic() - began_s
    nodes = fleet.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=10).nodes
    node = next(each.node.id for each in nodes if "warm" not in each.node.fingerprint.snapshots)
    began_s = time.monotonic()
    _outrider(fleet, "vm", "import", str(exported), "--node", node, "--name", "carried")
    import_s = time.monotonic() - began_s
    emit("vm.export_mb_s", size_mb / export_s, "MB/s", peer="cp", peer_value=size_mb / copy_s)
    emit("vm.import_mb_s", size_mb / import_s, "MB/s", peer="cp", peer_value=size_mb / copy_s)
    exported.unlink()
    copied.unlink()


def _move(fleet: Fleet) -> None:
    """To and fro, while a process asks without a pause."""
    fleet.submit(_loader())
    (loader,) = fleet.healthy("loader", 1)
    told = fleet.logs(loader, follow=True)
    next(told)
    downtimes = []
    for _ in range(MOVES):
        said = _outrider(fleet, "vm", "migrate", "target")
        found = re.search(r"paused for (\d+) ms", said)
        assert found is not None, said
        downtimes.append(float(found[1]))
    now_s = time.time()
    last = {"asked": 0, "failed": 0, "longest_ms": 0.0}
    for line in told:
        last = json.loads(line)
        if time.time() > now_s + 2:
            break
    emit("vm.migration_downtime_ms", percentile(downtimes, 0.5), "ms")
    emit("vm.migration_failed_requests", last["failed"], "requests")
    emit("vm.migration_requests", last["asked"], "requests")
    emit("vm.migration_longest_request_ms", last["longest_ms"], "ms")
    fleet.stop("loader")


def _from_snapshot(target: Job) -> Job:
    (group,) = target.groups
    (task,) = group.tasks
    image = msgspec.structs.replace(task.image, start_from="warm")
    group = msgspec.structs.replace(group, tasks=(msgspec.structs.replace(task, image=image),))
    return msgspec.structs.replace(target, groups=(group,))


def _loader() -> Job:
    task = Task(name=TaskName("loader"), command=("/usr/bin/python3", "-c", LOADER))
    upstream = Upstream(service=ServiceName("target"))
    service = Service(name=ServiceName("loader"), protocol=Protocol.TCP, upstreams=(upstream,))
    return Job(name=JobName("loader"), groups=(Group(name=GroupName("loader"), tasks=(task,), services=(service,)),))


def _outrider(fleet: Fleet, *words: str) -> str:
    """What it tells people."""
    program = shutil.which("outrider", path=str(Path(sys.executable).parent))
    assert program is not None, "it is installed beside this interpreter"
    address = f"unix:/run/outrider/{fleet.name}/operator.sock"
    argv = [program, "--address", address, *words]
    done = subprocess.run(argv, check=False, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, timeout=180)
    if done.returncode != 0:
        raise RuntimeError(f"outrider {' '.join(words)}: {done.stderr}")
    return done.stderr
