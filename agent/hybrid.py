"""A mount namespace of the agent's own on hosts whose control groups are hybrid (DESIGN, decision 9).

crun refuses such hosts ("hybrid mode not supported") while the v2 tree is mounted beside the v1 ones. So the agent's
first act is to re-execute itself in a namespace without that mount, where conmon, crun and every later agent live too.
Never touches the machine's own mounts; does nothing on v1 and v2 hosts.

Owns `RUN/namespace`: a mount point with private propagation (a namespace cannot be pinned below a shared one) and in it
`mnt`, the pinned namespace. Each run directory has its own, so that agents of several fleets do not meet.

What propagates: the namespace is a slave of the host's, so mounts made later on the host under a shared mount point
appear inside (systemd makes / shared); where the host's are private, as in many containers, they do not. Mounts made
inside never reach the host. So whatever this agent mounts (the namespaces of its allocations, task directories) it must
mount and use inside, and a namespace that somebody else makes for it must be entered before `enter`, or exist when this
one is first made, or be reached as /proc/PID/ns/net. Files and sockets under /run are the same on both sides.
"""

import fcntl
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from agent.sandbox import mounts
from agent.sandbox.cgroup import ROOT, Version, detect
from agent.sandbox.process import program
from outrider.errors import HostError

_MARKER = "OUTRIDER_MOUNT_NAMESPACE"  # the inode of the namespace that this process was sent into
_STEP_S_MAX = 10.0


def enter(run_directory: Path, argv: Sequence[str]) -> None:
    """Return where crun works; elsewhere replace this process by `argv` inside the run directory's namespace.

    To be called before any thread is started. Raises HostError where the namespace cannot be made.
    """
    if detect() is not Version.HYBRID:
        return
    if os.environ.get(_MARKER) == str(Path("/proc/self/ns/mnt").stat().st_ino):
        mounts.unmount(ROOT / "unified")
        return
    pin = _found_or_made(run_directory)
    environment = {**os.environ, _MARKER: str(pin.stat().st_ino)}
    nsenter = program("nsenter")
    os.execve(nsenter, [nsenter, f"--mount={pin}", f"--wd={Path.cwd()}", "--", *argv], environment)  # noqa: S606 - no shell wanted


def remove(run_directory: Path) -> None:
    """Unpin the namespace; it ends with the last process inside. To be called from outside it; none there is fine."""
    mounts.unmount_below(run_directory.absolute() / "namespace")


def _found_or_made(run_directory: Path) -> Path:
    holder = run_directory.absolute() / "namespace"
    holder.mkdir(parents=True, exist_ok=True)
    pin = holder / "mnt"
    with (run_directory / "namespace.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mounted = mounts.mount_points()
        if str(pin) in mounted:
            return pin
        if str(holder) not in mounted:
            _step("mount", "--bind", str(holder), str(holder))
        _step("mount", "--make-private", str(holder))
        pin.touch()
        _step("unshare", f"--mount={pin}", "--propagation", "slave", "true")
    return pin


def _step(*argv: str) -> None:
    done = subprocess.run(
        [program(argv[0]), *argv[1:]], capture_output=True, text=True, timeout=_STEP_S_MAX, check=False
    )
    if done.returncode != 0:
        raise HostError(
            "hybrid control groups",
            step=f"{' '.join(argv)}: {done.stderr.strip()}",
            hint="the agent must be root, with CAP_SYS_ADMIN",
        )
