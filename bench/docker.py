"""A Docker engine for comparison: in namespaces of its own, with an image made of this host's files."""

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CGROUP = "outrider-bench-docker"
_ENGINE = f"""
ip link set lo up
! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
exec dockerd --data-root "$1/data" --exec-root "$1/run" --pidfile "$1/run/docker.pid" --host "unix://$1/docker.sock" \
    --iptables=false --bridge=none --cgroup-parent /{_CGROUP}
"""


@contextlib.contextmanager
def engine() -> Iterator[list[str]]:
    """Yields the words that begin each `docker` command; image `bench` is imported."""
    with tempfile.TemporaryDirectory(prefix="outrider-docker-", ignore_cleanup_errors=True) as directory:
        (Path(directory) / "run").mkdir()
        daemon = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-euc", _ENGINE, "dockerd", directory],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert daemon.stderr is not None
        try:
            for line in daemon.stderr:
                if "API listen on" in line:
                    break
            else:
                raise RuntimeError("dockerd ended before it listened")
            docker = ["docker", "--host", f"unix://{directory}/docker.sock"]
            subprocess.run([*docker, "import", "-", "bench"], input=_image(), check=True, stdout=subprocess.DEVNULL)
            yield docker
        finally:
            daemon.terminate()
            daemon.communicate(timeout=30)
            for cgroup in Path("/sys/fs/cgroup").glob(f"*/{_CGROUP}"):
                cgroup.rmdir()


def root_files() -> dict[str, Path]:
    """Path in a root -> this host's file, for a root that can run date and busybox."""
    date = Path("/usr/bin/date")
    linked = subprocess.run(["ldd", date], check=True, capture_output=True, text=True).stdout.split()
    libraries = [Path(word) for word in linked if word.startswith("/")]
    return {str(path).lstrip("/"): path.resolve() for path in (date, Path("/bin/busybox"), *libraries)}


def _image() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, path in root_files().items():
            archive.add(path, arcname=name)
    return packed.getvalue()
