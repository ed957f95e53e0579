"""An image from submission to its first instruction: pulled, there already, and twenty copies at once.

Beside `podman run` with the same image from the same registry (TLS, a password), interleaved, on the same node's
network. Podman joins that network as it is; Outrider makes each copy a network of its own.
"""

import base64
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from bench.docker import root_files
from bench.figure import emit, percentile
from bench.fleet import Fleet, dev_fleet
from outrider.cli.dev.layout import CONTROL_ADDRESS, Layout
from outrider.ids import GroupName, JobName, NodeId, TaskName
from outrider.model.job import MIB, Group, Image, ImageKind, Job, Resources, Task

ROUNDS = 3
COPIES = 20
_FILLER_BYTES = 24 * MIB
_PORT = 5000
_HOST = f"{CONTROL_ADDRESS}:{_PORT}"
_SAYS_WHEN = "/usr/bin/date +%s.%N"
_CREDENTIALS = "bench:s3cret"
_PASSWORD_FILE = "bench:$2b$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n"  # noqa: S105 - of this run alone
_MOUNTS = "! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified; echo; exec sleep infinity"
_DEADLINE_S = 60.0


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="outrider-bench-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        config = _write_access(directory)
        with dev_fleet(nodes=1, agent_config=config) as fleet:
            layout = Layout(name=fleet.name, node_count=1)
            with _registry(directory, layout), _podman(directory, layout) as podman:
                _measure(fleet, podman, [_push(directory, layout, number) for number in range(ROUNDS + 1)])


def _measure(fleet: Fleet, podman: list[str], images: list[str]) -> None:
    cold: list[tuple[float, float]] = []
    warm: list[tuple[float, float]] = []
    for number, image in enumerate(images[:ROUNDS]):
        cold.append((_ours(fleet, f"cold{number}", image), _theirs(podman, image)))
        warm.append((_ours(fleet, f"warm{number}", image), _theirs(podman, image)))
    many = _ours(fleet, "many", images[ROUNDS], COPIES), _theirs(podman, images[ROUNDS], COPIES)
    for figure, pairs in (("cold", cold), ("warm", warm)):
        ours, theirs = (percentile([pair[side] for pair in pairs], 0.5) for side in (0, 1))
        emit(f"image.{figure}_ms_p50", ours * 1000, "ms", peer="podman run", peer_value=theirs * 1000)
        emit(f"image.{figure}_ratio", ours / theirs, "x")
    emit(f"image.{COPIES}_at_once_ms", many[0] * 1000, "ms", peer=f"{COPIES} podman run", peer_value=many[1] * 1000)


def _ours(fleet: Fleet, name: str, image: str, count: int = 1) -> float:
    """Seconds from submission until the last copy's first instruction."""
    task = Task(
        name=TaskName("app"),
        command=("/bin/busybox", "sh", "-c", f"{_SAYS_WHEN}; exec /bin/busybox sleep 1000"),
        kill_timeout_s=0.1,
        image=Image(kind=ImageKind.OCI, reference=image),
        resources=Resources(cpu_millis=10, memory_bytes=16 * MIB, disk_bytes=MIB),
    )
    group = Group(name=GroupName("app"), tasks=(task,), count=count)
    submitted_s = time.time()
    fleet.submit(Job(name=JobName(name), groups=(group,)))
    began_s = max(float(next(iter(fleet.logs(alloc, follow=True)))) for alloc in fleet.healthy(name, count))
    fleet.stop(name)
    return began_s - submitted_s


def _theirs(podman: list[str], image: str, count: int = 1) -> float:
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]  # it may not raise them here
    started_s = time.time()
    argv = [*podman, "run", "--rm", "-q", "--network=host", *limits, image, "/bin/busybox", "sh", "-c", _SAYS_WHEN]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [process.communicate(timeout=_DEADLINE_S * 5)[0].split() for process in running]
    assert all(process.returncode == 0 for process in running), "podman run failed"
    return max(float(words[-1]) for words in said) - started_s


def _write_access(directory: Path) -> Path:
    """A certificate, a password, and what the agents' configuration says of both."""
    trusted = directory / "certificates" / _HOST
    trusted.mkdir(parents=True)
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    argv += ["-subj", "/CN=bench", "-addext", f"subjectAltName=IP:{CONTROL_ADDRESS}"]
    argv += ["-keyout", str(directory / "key"), "-out", str(trusted / "ca.crt")]
    subprocess.run(argv, check=True, capture_output=True)
    auth = base64.b64encode(_CREDENTIALS.encode()).decode()
    (directory / "auth.json").write_text(json.dumps({"auths": {_HOST: {"auth": auth}}}))
    (directory / "htpasswd").write_text(_PASSWORD_FILE)
    images = {"auth_file": str(directory / "auth.json"), "certificates": str(directory / "certificates")}
    config = directory / "agent.yaml"
    config.write_text(yaml.safe_dump({"images": images}))
    return config


@contextlib.contextmanager
def _registry(directory: Path, layout: Layout) -> Iterator[None]:
    """Where the fleet's controller is."""
    tls = {"certificate": str(directory / "certificates" / _HOST / "ca.crt"), "key": str(directory / "key")}
    config = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": _HOST, "tls": tls},
        "auth": {"htpasswd": {"realm": "bench", "path": str(directory / "htpasswd")}},
    }
    (directory / "registry.yml").write_text(yaml.safe_dump(config))
    inside = ["nsenter", f"--net={layout.control_namespace}"]
    server = subprocess.Popen(
        [*inside, "docker-registry", "serve", str(directory / "registry.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    probe = f"import socket; socket.create_connection(('{CONTROL_ADDRESS}', {_PORT}), 1)"
    until_s = time.time() + _DEADLINE_S
    try:
        while subprocess.run([*inside, sys.executable, "-c", probe], check=False, capture_output=True).returncode:
            if time.time() > until_s:
                raise RuntimeError("the registry does not listen")
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _podman(directory: Path, layout: Layout) -> Iterator[list[str]]:
    """The words that begin each `podman` command: on the node's network, its storage in `directory`."""
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()  # its mounts are as they should be
    environment = {
        "SSL_CERT_FILE": str(directory / "certificates" / _HOST / "ca.crt"),
        "REGISTRY_AUTH_FILE": str(directory / "auth.json"),
    }
    namespace = layout.namespace(NodeId("n1"))
    words = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", f"--net={namespace}", "env"]
    words += [f"{name}={value}" for name, value in environment.items()]
    words += ["podman", "--root", str(directory / "podman"), "--runroot", str(directory / "podman-run")]
    words += ["--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--events-backend=none", "--runtime=crun"]
    try:
        yield words
    finally:
        subprocess.run([*words, "system", "reset", "--force"], check=False, capture_output=True)
        holder.kill()
        holder.wait()


def _push(directory: Path, layout: Layout, number: int) -> str:
    """The reference of an image that nobody has seen: date, its libraries, and something to carry."""
    made = directory / f"layout{number}"
    tree = directory / f"tree{number}"
    for name, path in root_files().items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        target.chmod(0o755)
    half = os.urandom(_FILLER_BYTES // 2)
    (tree / "filler").write_bytes(half + bytes(_FILLER_BYTES // 2))
    for words in (
        f"umoci init --layout {made}",
        f"umoci new --image {made}:bench",
        f"umoci insert --image {made}:bench {tree} /",
        f"umoci config --image {made}:bench --config.user 1000",
    ):
        subprocess.run(shlex.split(words), check=True, capture_output=True)
    reference = f"{_HOST}/bench/app:{number}"
    argv = ["nsenter", f"--net={layout.control_namespace}", "skopeo", "--insecure-policy", "copy", "-q"]
    argv += ["--authfile", str(directory / "auth.json"), "--dest-cert-dir", str(directory / "certificates" / _HOST)]
    subprocess.run([*argv, f"oci:{made}:bench", f"docker://{reference}"], check=True)
    return reference
