"""A Docker engine in namespaces of its own, and images under the names that docker-compose.yml uses, built here.

There is no registry to pull from: one Debian root by mmdebstrap stands for every base image, with this checkout's
dependencies as wheels, and with an `apt-get` that finds all installed. The Dockerfile itself is built for real on it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

from outrider.cli.deploy.bundle import make_bundle, make_wheel

ROOT = Path(__file__).parents[2]
PROJECT = "outrider-compose-test"
COMPOSE = os.environ.get("OUTRIDER_COMPOSE", "docker-compose")  # 1.29.2 of Debian's, or the path of another
_CGROUP = "outrider-compose-docker"
_PACKAGES = (
    "python3", "python3-venv", "crun", "conmon", "catatonit", "nftables", "iproute2", "procps", "ca-certificates",
    "redis-server", "mosquitto", "prometheus", "mount", "util-linux", "netcat-openbsd", "wget", "passwd",
)  # fmt: skip
_ENGINE = f"""
ip link set lo up
! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
exec dockerd --data-root "$1/data" --exec-root "$1/run" --pidfile "$1/run/docker.pid" --host "unix://$1/docker.sock" \\
    --bridge=none --cgroup-parent /{_CGROUP}
"""
_IMAGES = {
    "debian:12.11-slim": "ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels",
    "hashicorp/consul:1.15": 'ENTRYPOINT ["consul"]',
    "eclipse-mosquitto:2.0": 'CMD ["mosquitto", "-c", "/mosquitto/config/mosquitto.conf"]',
    "prom/prometheus:v2.42.0": 'ENTRYPOINT ["prometheus"]\n'
    'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]',
}


class Compose:
    """`docker-compose` of this checkout's file, on an engine of its own."""

    def __init__(self, socket: Path, namespace: int) -> None:
        self._host, self._namespace = f"unix://{socket}", namespace

    def __call__(self, *words: str, timeout_s: float = 300) -> str:
        file = str(ROOT / "docker-compose.yml")  # whoever enters a mount namespace stands at its root
        return self._run(COMPOSE, "--file", file, "--project-name", PROJECT, *words, timeout_s=timeout_s)

    def docker(self, *words: str, text: str = "", timeout_s: float = 300) -> str:
        return self._run("docker", *words, text=text, timeout_s=timeout_s)

    def inside(self, service: str, *words: str, timeout_s: float = 120) -> str:
        return self("exec", "-T", service, *words, timeout_s=timeout_s)

    def health(self) -> dict[str, str]:
        """Of each service's container."""
        ids = self.docker("ps", "--all", "--quiet").split()
        found = json.loads(self.docker("inspect", *ids)) if ids else []
        return {
            each["Config"]["Labels"]["com.docker.compose.service"]: each["State"].get("Health", {}).get("Status", "")
            for each in found
        }

    def _run(self, *words: str, text: str = "", timeout_s: float) -> str:
        own = f"/proc/{self._namespace}/ns"
        settings = {"DOCKER_HOST": self._host, "COMPOSE_HTTP_TIMEOUT": "300", "DOCKER_BUILDKIT": "0"}
        done = subprocess.run(
            ["nsenter", f"--net={own}/net", f"--mount={own}/mnt", "--", *words],
            input=text, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT,
            env={"PATH": os.environ["PATH"], **settings},
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout


@contextlib.contextmanager
def compose() -> Iterator[Compose]:
    """The engine, with the base images. All of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="outrider-compose-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        (directory / "run").mkdir()
        log = (directory / "dockerd.log").open("ab")
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "unshare", "--net", "--mount", "--propagation", "private",
             "sh", "-euc", _ENGINE, "dockerd", name],
            stdout=log, stderr=log,
        )  # fmt: skip
        made = Compose(directory / "docker.sock", daemon.pid)
        try:
            until((directory / "docker.sock").exists, f"dockerd listens; see {directory}/dockerd.log", 60)
            _build_images(made, directory)
            yield made
        finally:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                made("down", "--volumes", "--timeout", "20")
            daemon.terminate()
            daemon.wait(60)
            log.close()
            _remove_groups(f"*/{_CGROUP}")
            _remove_groups("*/outrider/outrider")


def until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.5)


def _build_images(made: Compose, directory: Path) -> None:
    context = directory / "context"
    made.docker("import", str(_debian_root()), "base:stand-in", timeout_s=600)
    (context / "wheels").mkdir(parents=True)
    with tarfile.open(make_bundle(directory / "bundles").path) as bundle:
        for member in bundle.getmembers():
            if member.name.endswith(".whl") and not member.name.startswith("outrider-"):
                content = bundle.extractfile(member)
                assert content is not None, "a file"
                (context / "wheels" / member.name).write_bytes(content.read())
    for name in ("setuptools", "wheel"):
        wheel, packed = make_wheel(distribution(name))
        (context / "wheels" / wheel).write_bytes(packed)
    found = subprocess.run([ROOT / "scripts/tools/consul.sh"], check=True, capture_output=True, text=True, timeout=120)
    shutil.copy(found.stdout.strip(), context / "consul")
    (context / "apt-get").write_text("#!/bin/sh\nexit 0  # all that is asked for is in the root\n")
    (context / "apt-get").chmod(0o755)
    (context / "Dockerfile").write_text(
        "FROM base:stand-in\nCOPY consul apt-get /usr/local/bin/\nCOPY wheels /wheels\n"
        "RUN mkdir -p /mosquitto/config /mosquitto/certs /prometheus\n"
    )
    made.docker("build", "--tag", "base:whole", str(context), timeout_s=600)
    for name, lines in _IMAGES.items():
        made.docker("build", "--tag", name, "-", text=f"FROM base:whole\n{lines}\n")


def _debian_root() -> Path:
    """Made once, and kept with the other tools."""
    root = ROOT / ".tools/compose-root.tar"
    if not root.exists():
        partial = root.with_suffix(".partial")
        sources = [str(path) for path in Path("/etc/apt/sources.list.d").glob("*.sources")]
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar", f"--include={','.join(_PACKAGES)}",
             "bookworm", partial, *(sources or ["/etc/apt/sources.list"])],
            check=True, timeout=1800,
        )  # fmt: skip
        partial.replace(root)
    return root


def _remove_groups(pattern: str) -> None:
    for group in Path("/sys/fs/cgroup").glob(pattern):
        for path in (*sorted((p for p in group.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)), group):
            with contextlib.suppress(OSError):  # still in use: somebody else's
                path.rmdir()
