"""Starts programs and learns of their end without forking in-process or blocking the loop.

`posix_spawn` (a vfork: gRPC and a large heap do not mind) and pidfds. Works for processes that are not this agent's
children: a conmon that an earlier agent started. Owns nothing beyond a call.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from agent.sandbox.descriptors import readable
from outrider.errors import HostError
from outrider.model.job import Value

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_PACKAGES = {"qemu-img": "qemu-utils", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs"}  # where the name is another's
_OUTPUT_BYTES_MAX = 65_536
_POLL_S = 0.001
_STARTED_TICKS_FIELD = 19  # of /proc/PID/stat, counted after the closing parenthesis of the command's name


class Finished(Value, frozen=True, kw_only=True):
    code: int
    output: str


@cache
def program(name: str) -> str:
    """The path of a host's program. Raises HostError naming the Debian package to install."""
    path = shutil.which(name, path=_ENVIRONMENT["PATH"])
    if path is None:
        raise HostError(name, step="not installed", hint=f"apt-get install {_PACKAGES.get(name, name)}")
    return path


async def run(argv: Sequence[str], *, timeout_s: float) -> Finished:
    """Run a program to its end; `output` is what it wrote to both streams. Raises HostError when it is late."""
    descriptor = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        pid = spawn(argv, descriptors={1: descriptor, 2: descriptor})
        try:
            async with asyncio.timeout(timeout_s):
                code = await ended(pid)
        except TimeoutError as error:
            os.kill(pid, signal.SIGKILL)
            await ended(pid)
            raise HostError(argv[0], step=f"no end within {timeout_s:g} s of: {' '.join(argv[1:])}") from error
        return Finished(code=code or 0, output=os.pread(descriptor, _OUTPUT_BYTES_MAX, 0).decode(errors="replace"))
    finally:
        os.close(descriptor)


def spawn(argv: Sequence[str], *, descriptors: Mapping[int, int], env: Mapping[str, str] | None = None) -> int:
    """Start a program in a session of its own; its pid. `descriptors`: number in the program -> number here."""
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in range(3) if number not in descriptors
    ]
    # Duplicated above all targets first: a source that is itself a target number would be overwritten.
    spare = max(*descriptors.values(), *descriptors.keys(), 2) + 1 if descriptors else 3
    moved = {number: spare + offset for offset, number in enumerate(descriptors)}
    actions += [(os.POSIX_SPAWN_DUP2, source, moved[number]) for number, source in descriptors.items()]
    actions += [(os.POSIX_SPAWN_DUP2, moved[number], number) for number in descriptors]
    actions += [(os.POSIX_SPAWN_CLOSE, number) for number in moved.values()]
    path = program(argv[0])
    return os.posix_spawn(
        path,
        [path, *argv[1:]],
        {**_ENVIRONMENT, **(env or {})},
        file_actions=actions,
        setsid=True,  # a terminal's Ctrl-C ends the agent, never its workloads
        setsigmask=[],
        setsigdef=[signal.SIGPIPE],  # Python ignores it, and workloads would inherit that
    )


async def ended(pid: int, started_ticks: int | None = None) -> int | None:
    """Wait until process `pid` has ended. Its code (128 + signal) where it is a child of this agent, else None.

    `started_ticks` tells it from a later process of the same number: that one is not waited for.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return _reaped(pid)
    try:
        # Looked up after the descriptor was opened: from there on the number cannot change hands unseen.
        if started_ticks is not None and started_ticks_of(pid) != started_ticks:
            return None
        await readable(descriptor)
    finally:
        os.close(descriptor)
    return _reaped(pid)


def started_ticks_of(pid: int) -> int:
    """When process `pid` was started, in clock ticks since the boot; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[_STARTED_TICKS_FIELD]) if fields else 0


def is_running(pid: int, started_ticks: int) -> bool:
    """Whether process `pid` is still that one, and neither dead nor waiting for its parent to take note."""
    fields = _stat(pid)
    return bool(fields) and int(fields[_STARTED_TICKS_FIELD]) == started_ticks and fields[0] not in ("Z", "X")


async def expecting(pid: int, started_ticks: int, number: int) -> None:
    """Return once process `pid` handles that signal, or has it blocked until it does, or is gone."""
    while is_running(pid, started_ticks) and not _expects(pid, number):  # noqa: ASYNC110 - the kernel tells of no such change
        await asyncio.sleep(_POLL_S)


def send_signal(pid: int, started_ticks: int, number: int) -> bool:
    """Whether process `pid` was there to be signalled; a later process of the same number is left alone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if started_ticks_of(pid) != started_ticks:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def _expects(pid: int, number: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigCgt:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def _reaped(pid: int) -> int | None:
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
