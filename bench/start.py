"""From submission to the workload's first instruction, and to its first answer through both sidecars.

Beside it, in the same run and interleaved: bare `crun run` of the same first instruction, and `docker run`.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.docker import engine, root_files
from bench.figure import emit, percentile
from bench.fleet import Fleet, dev_fleet
from outrider.ids import GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.job import Check, CheckKind, File, Group, Job, Network, Port, Protocol, Service, Task, Upstream

ROUNDS = 30

# Asks over and over, a new connection each time, and says when the first good answer after a bad one came.
_PROBER = """
import http.client, time
good = True
while True:
    try:
        connection = http.client.HTTPConnection("target.mesh", timeout=2)
        connection.request("GET", "/")
        now = connection.getresponse().status == 200
        connection.close()
    except OSError:
        now = False
    if now != good:
        print("up" if now else "down", time.time(), flush=True)
        good = now
    time.sleep(0.005)
"""


def run() -> None:
    with (
        dev_fleet(nodes=3) as fleet,
        engine() as docker,
        _crun() as crun,
        tempfile.TemporaryDirectory() as directory,
    ):
        running, healthy, bare, docked = [], [], [], []
        bundle = _bundle(Path(directory))
        fleet.submit(prober())
        changes = fleet.logs(fleet.healthy("prober", 1)[0], follow=True)
        for _ in range(ROUNDS):
            until(changes, "down")
            submitted_s = time.time()
            fleet.submit(_target())
            healthy.append(until(changes, "up") - submitted_s)
            target = fleet.healthy("target", 1)[0]
            running.append(float(next(fleet.logs(target))) - submitted_s)
            fleet.stop("target")
            bare.append(_stamped([*crun, "run", "--bundle", str(bundle), f"bench-{time.time_ns()}"]))
            docked.append(_stamped([*docker, "run", "--rm", "--network", "none", "bench", "/usr/bin/date", "+%s.%N"]))
        command_line = [_command_line(fleet, Path(directory)) for _ in range(5)]
    for name, values in (("running", running), ("healthy", healthy)):
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            peer_ms = percentile(docked, share) * 1000
            emit(
                f"start.{name}_ms_{label}",
                percentile(values, share) * 1000,
                "ms",
                peer="docker run",
                peer_value=peer_ms,
            )
    emit("start.crun_run_ms_p50", percentile(bare, 0.5) * 1000, "ms")
    emit("start.cli_job_run_ms_p50", percentile(command_line, 0.5) * 1000, "ms")


def _target() -> Job:
    """Stamps its first instruction, then serves."""
    script = "date +%s.%N; exec busybox httpd -f -p ${port.http} -h ${task.dir}"
    return _job(
        "target",
        Task(
            name=TaskName("server"),
            command=("/bin/sh", "-c", script),
            files=(File(path="index.html", content=b"here\n"),),
        ),
        Service(
            name=ServiceName("target"),
            port=PortName("http"),
            protocol=Protocol.HTTP,
            check=Check(kind=CheckKind.TCP),
            allow=(ServiceName("prober"),),
        ),
        ports=(Port(name=PortName("http")),),
    )


def prober() -> Job:
    return _job(
        "prober",
        Task(name=TaskName("prober"), command=("/usr/bin/python3", "-c", _PROBER)),
        Service(name=ServiceName("prober"), upstreams=(Upstream(service=ServiceName("target")),)),
    )


def _job(name: str, task: Task, service: Service, *, ports: tuple[Port, ...] = ()) -> Job:
    group = Group(name=GroupName(name), tasks=(task,), services=(service,), network=Network(ports=ports))
    return Job(name=JobName(name), groups=(group,))


def until(changes: Iterator[str], word: str) -> float:
    """The wall-clock second at which the prober saw `word`."""
    for line in changes:
        said, at_s = line.split()
        if said == word:
            return float(at_s)
    raise RuntimeError(f"the prober's log ended before it said {word!r}")


def _stamped(command: list[str]) -> float:
    """Seconds from here to the stamp that the command's workload prints."""
    started_s = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) - started_s


def _bundle(directory: Path) -> Path:
    """An OCI bundle as Outrider's sandboxes have it, less what is Outrider's own: all namespaces, no capabilities."""
    root = directory / "rootfs"
    for name, source in root_files().items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        target.chmod(0o755)
    subprocess.run(["crun", "spec"], cwd=directory, check=True)
    spec = json.loads((directory / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": ["/usr/bin/date", "+%s.%N"], "capabilities": {}}
    spec["process"]["user"] = {"uid": 1000, "gid": 1000}
    spec["linux"]["cgroupsPath"] = "/outrider-bench-crun/one"
    (directory / "config.json").write_text(json.dumps(spec))
    return directory


@contextlib.contextmanager
def _crun() -> Iterator[list[str]]:
    """The words that begin each crun command: inside a mount namespace where it works on a hybrid cgroup host too."""
    script = "! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified; echo; exec cat"
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "crun"]
    finally:
        holder.communicate(timeout=10)
        for cgroup in Path("/sys/fs/cgroup").glob("*/outrider-bench-crun"):
            cgroup.rmdir()


def _command_line(fleet: Fleet, directory: Path) -> float:
    """Wall time of `outrider job run`, from the shell to the prompt after a healthy rollout."""
    file = directory / "target.yaml"
    file.write_text(
        "job: quick\ngroups:\n  quick:\n    tasks:\n      one: {driver: process, command: [/bin/sleep, '1000']}\n"
    )
    command = [
        str(Path(sys.executable).with_name("outrider")),
        "--address",
        f"unix:/run/outrider/{fleet.name}/operator.sock",
    ]
    started_s = time.monotonic()
    subprocess.run([*command, "job", "run", str(file)], check=True, stdout=subprocess.DEVNULL)
    took_s = time.monotonic() - started_s
    fleet.stop("quick")
    return took_s
