"""Speaks with conmon, the monitor beside each sandbox: it runs crun, captures output, keeps the exit status, and
outlives the agent.

Owns the layout of a sandbox's own directory: `bundle/`, `log`, `log.held`, `log.1` (see `rotation`), `exit/ID`,
`monitor.log` for conmon's own complaints, and what conmon leaves beside them (`oom`, `pidfile-ID`).
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from agent.sandbox import process
from agent.sandbox.descriptors import readable
from agent.sandbox.spec import StartError
from outrider.errors import HostError

_SYNC_BYTES_MAX = 65_536
_SYNC_DESCRIPTOR = 3


class Directory:
    """Where things are in a sandbox's own directory."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.bundle = self.path / "bundle"
        self.log = self.path / "log"
        self.log_held = self.path / "log.held"  # the same file as `log`, or the one before it
        self.log_older = self.path / "log.1"
        self.exits = self.path / "exit"
        self.complaints = self.path / "monitor.log"


class _Sync(msgspec.Struct):
    """What conmon says once crun's create has ended: the pid, or -1 and why."""

    data: int
    message: str = ""


async def create(sandbox: str, directory: Directory, *, crun: tuple[str, ...], log_bytes: int) -> "Starting":
    """Start conmon, which has crun create the container."""
    argv = [
        # It leaves `oom` and a pid file in the directory it was started in.
        *("env", "--chdir", str(directory.path), process.program("conmon")),
        *("--api-version", "1", "--sync", "--cid", sandbox, "--cuuid", sandbox, "--name", sandbox),
        *("--runtime", process.program(crun[0]), *(f"--runtime-arg={argument}" for argument in crun[1:])),
        *("--bundle", str(directory.bundle), "--exit-dir", str(directory.exits)),
        *("--log-path", f"k8s-file:{directory.log}", "--log-size-max", str(log_bytes)),
        *("--full-attach", "--no-sync-log", "--no-new-keyring"),
    ]
    reading, writing = os.pipe()
    complaints = os.open(directory.complaints, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        pid = process.spawn(
            argv,
            descriptors={2: complaints, _SYNC_DESCRIPTOR: writing},
            env={"_OCI_SYNCPIPE": str(_SYNC_DESCRIPTOR)},
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
        os.close(complaints)
    return Starting(pid, reading, directory)


class Starting:
    """A conmon whose crun has not yet reported."""

    def __init__(self, pid: int, reading: int, directory: Directory) -> None:
        self.pid = pid
        self._directory = directory
        self._reading = reading

    async def created(self, *, timeout_s: float) -> int:
        """The pid of the container's first process. Raises StartError with crun's own words."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await _read_line(self._reading)
        except TimeoutError as error:
            raise HostError("crun", step=f"create: no answer within {timeout_s:g} s") from error
        finally:
            os.close(self._reading)
        if not line:
            why = self._directory.complaints.read_text(errors="replace").strip()
            raise HostError("conmon", step=f"ended before its container was created: {why}")
        sync = msgspec.json.decode(line, type=_Sync)
        if sync.data <= 0:
            raise StartError(sync.message.strip())
        return sync.data


def find(directory: Directory) -> list[int]:
    """The pids of monitors and of crun's calls for this bundle: for a start of which nothing was recorded."""
    bundle = os.fsencode(directory.bundle)
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                if bundle in (entry / "cmdline").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


def exit_code(sandbox: str, directory: Directory) -> tuple[int, float] | None:
    """The code and the time (wall clock) at which the sandbox ended; None where conmon did not get to write it."""
    path = directory.exits / sandbox
    with suppress(FileNotFoundError):
        return int(path.read_text()), path.stat().st_mtime
    return None


def inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


async def _read_line(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    received = b""
    while not received.endswith(b"\n") and len(received) < _SYNC_BYTES_MAX:
        await readable(descriptor)
        piece = os.read(descriptor, _SYNC_BYTES_MAX)
        if not piece:
            break
        received += piece
    return received
