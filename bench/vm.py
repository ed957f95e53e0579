"""A guest from submission to its first byte through the mesh, beside bare QEMU with the same kernel, initrd and disk.

Interleaved, in the same run: the bare one has the job's files on a disk as well, and answers on a port forwarded by
QEMU's own user network. Memory is the proportional share of the emulator and of what watches over it. Then the same
from a snapshot, the snapshot as a file beside `cp`, and moves between two nodes under a load of requests: what
`bench.vm_state` measures.
"""

import contextlib
import http.client
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import vm_state
from bench.figure import emit, percentile
from bench.fleet import Fleet, dev_fleet
from bench.start import prober, until
from examples.vm import guest
from outrider.ids import GroupName, JobName, PortName, ServiceName
from outrider.jobspec.reader import read_job
from outrider.model.job import Check, CheckKind, Group, Job, Network, Port, Protocol, Service

ROUNDS = 4
_BARE_S = 60.0


def run() -> None:
    built = guest.build()
    ours, bare, ours_mb, bare_mb = [], [], [], []
    with dev_fleet(nodes=2) as fleet, tempfile.TemporaryDirectory() as directory:
        seed = _seed(built, Path(directory))
        fleet.submit(prober())
        changes = fleet.logs(fleet.healthy("prober", 1)[0], follow=True)
        for _ in range(ROUNDS):
            until(changes, "down")
            submitted_s = time.time()
            fleet.submit(target(built))
            ours.append(until(changes, "up") - submitted_s)
            ours_mb.append(_sandbox_mb(fleet))
            fleet.stop("target")
            with _bare(built, seed, Path(directory)) as (took_s, pid):
                bare.append(took_s)
                bare_mb.append(_share_mb(pid))
        ours_s, bare_s = percentile(ours, 0.5), percentile(bare, 0.5)
        emit("vm.boot_ms_p50", ours_s * 1000, "ms", peer="bare qemu-system-x86_64", peer_value=bare_s * 1000)
        emit("vm.boot_ratio", ours_s / bare_s, "x")
        more_mb = percentile(ours_mb, 0.5) - percentile(bare_mb, 0.5)
        emit("vm.overhead_mb", more_mb, "MB", peer="bare qemu-system-x86_64", peer_value=percentile(bare_mb, 0.5))
        vm_state.measure(fleet, target(built), changes, boot_s=ours_s, directory=Path(directory))


def target(built: Path) -> Job:
    """The example's guest under the name that the prober calls."""
    example = next(group for group in read_job(built / "vm.yaml").groups if group.name == "guest")
    service = Service(
        name=ServiceName("target"),
        port=PortName("http"),
        protocol=Protocol.HTTP,
        check=Check(kind=CheckKind.HTTP, path="/", timeout_s=1.0),
        allow=(ServiceName("prober"), ServiceName("loader")),
    )
    network = Network(ports=(Port(name=PortName("http")),))
    group = Group(name=GroupName("target"), tasks=example.tasks, services=(service,), network=network)
    return Job(name=JobName("target"), groups=(group,))


def _seed(built: Path, directory: Path) -> Path:
    """The example's files, as the fleet gives them to its guest."""
    page = directory / "seed" / "www" / "index.html"
    page.parent.mkdir(parents=True)
    shutil.copy(built / "guest.html", page)
    image = directory / "seed.iso"
    argv = ["genisoimage", "-quiet", "-J", "-R", "-V", "cidata", "-o", str(image), str(directory / "seed")]
    subprocess.run(argv, check=True)
    return image


@contextlib.contextmanager
def _bare(built: Path, seed: Path, directory: Path) -> Iterator[tuple[float, int]]:
    """Seconds to its first answer, and its pid. It is killed afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    # As `agent.drivers.vm` has it, but for the network.
    argv = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none"]
    argv += ["-machine", "pc-q35-7.2,usb=off,graphics=off", "-cpu", "max", "-smp", "1", "-m", "size=128M"]
    argv += ["-accel", "tcg,tb-size=64", "-kernel", str(built / "vmlinux"), "-initrd", str(built / "initrd")]
    argv += ["-append", "console=ttyS0 panic=-1", "-device", "virtio-rng-pci"]
    argv += ["-drive", f"file={built / 'disk.qcow2'},if=virtio,snapshot=on"]
    argv += ["-drive", f"file={seed},if=virtio,format=raw,read-only=on"]
    argv += ["-netdev", f"user,id=mesh,hostfwd=tcp:127.0.0.1:{port}-:8080"]
    argv += ["-device", "virtio-net-pci,netdev=mesh,romfile=", "-serial", f"file:{directory / 'console'}"]
    started_s = time.time()
    emulator = subprocess.Popen(argv)
    try:
        while not _answers(port):
            if time.time() > started_s + _BARE_S:
                raise RuntimeError(f"the bare guest did not answer within {_BARE_S:g} s")
            time.sleep(0.005)
        yield time.time() - started_s, emulator.pid
    finally:
        emulator.kill()
        emulator.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _sandbox_mb(fleet: Fleet) -> float:
    """The emulator, the init before it and the monitor beside it."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            ours = f"/{fleet.name}/".encode() in command and b".machine" in command
            inside = b"qemu-system-x86_64" in command and f"/{fleet.name}/" in (path / "cgroup").read_text()
            if ours or inside:
                total += _share_mb(int(path.name))
    return total


def _share_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
