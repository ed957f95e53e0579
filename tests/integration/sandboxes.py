"""What the tests of sandboxes share: a host on which crun works, a network namespace, a runtime that cleans up."""

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.sandbox import mounts
from agent.sandbox.cgroup import ROOT, Version, detect

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
