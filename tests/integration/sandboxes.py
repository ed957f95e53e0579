"""What the tests of sandboxes share: a host on which crun works, a network namespace, a runtime that cleans up."""

import asyncio
import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.sandbox import mounts
from agent.sandbox.cgroup import ROOT, Version, detect
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import DirectoryRoot, HostRoot, Limits, Mount, SandboxSpec, Tmpfs
from outrider.log import Log
from outrider.model.job import MIB

LIMITS = Limits(cpu_millis=100, memory_bytes=64 * MIB, pids_max=64)

PRIVATE = Tmpfs(target="/tmp", size_bytes=MIB)  # noqa: S108 - the target inside

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def private_mounts() -> Iterator[None]:
    """A mount namespace for this thread and those it starts, without the v2 tree that crun refuses on hybrid hosts."""
    original = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    cwd = Path.cwd()
    try:
        _check(_libc.unshare(_CLONE_NEWNS))
        _check(_libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
        if detect() is Version.HYBRID:
            mounts.unmount(ROOT / "unified")
        yield
    finally:
        _check(_libc.unshare(_CLONE_FS))  # threads started meanwhile share it, and setns wants it alone
        _check(_libc.setns(original, _CLONE_NEWNS))
        os.close(original)
        os.chdir(cwd)


@contextmanager
def network_namespace(directory: Path) -> Iterator[str]:
    """A network namespace with loopback alone, pinned at a path below `directory`."""
    pin = directory / f"net-{secrets.token_hex(4)}"
    pin.touch()
    subprocess.run(["unshare", f"--net={pin}", "ip", "link", "set", "lo", "up"], check=True)
    try:
        yield str(pin)
    finally:
        mounts.unmount(pin)
        pin.unlink()


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Sandboxes:
    """A place for sandboxes: its runtime may be made again, as a restarted agent would."""

    uid_first = (1 << 31) + (secrets.randbelow(1 << 14) << 16)

    def __init__(self, directory: Path, namespace: str) -> None:
        self.directory = directory
        self.namespace = namespace
        self.cgroup = f"outrider-test-{secrets.token_hex(4)}"
        self._count = 0

    def runtime(self) -> SandboxRuntime:
        return SandboxRuntime(run_directory=self.directory / "run", cgroup=self.cgroup, log=Log("test"))

    def spec(
        self,
        *argv: str,
        limits: Limits = LIMITS,
        image: Path | None = None,
        mounts: tuple[Mount, ...] = (),
        log_bytes_max: int = 10 * MIB,
    ) -> SandboxSpec:
        self._count += 1
        name = f"alloc.task{self._count}"
        return SandboxSpec(
            id=name,
            argv=argv,
            env={"PATH": "/usr/bin:/bin"},
            root=HostRoot() if image is None else DirectoryRoot(path=str(image)),
            mounts=mounts,
            tmpfs=(PRIVATE,),
            network_namespace=self.namespace,
            uid_first=self.uid_first,
            limits=limits,
            directory=str(self.directory / "sandboxes" / name),
            log_bytes_max=log_bytes_max,
        )


@contextmanager
def sandboxes(directory: Path) -> Iterator[Sandboxes]:
    """A place for sandboxes; nothing of it is left on the host, whatever happens."""
    with private_mounts(), network_namespace(directory) as namespace:
        place = Sandboxes(directory, namespace)
        try:
            yield place
        finally:
            asyncio.run(place.runtime().remove_all())
        assert [*ROOT.glob(f"*/{place.cgroup}*")] == []
