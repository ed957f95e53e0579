"""Runs skopeo and what unpacks: bounded in what they write and in how long they may be silent, ended with this agent.

Owns nothing beyond a call.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from agent.pull.complaints import PullError
from agent.sandbox import process
from outrider.model.job import MIB, Value

_POLL_S = 0.05
_SILENT_S_MAX = 60.0
_OUTPUT_BYTES_MAX = 4 * MIB  # more than registries let a manifest have
_INPUT_BYTES_MAX = 65_536  # what a pipe takes at once
_FILES_MAX = 1_000_000
# A proxy is the operator's to set, in the agent's own environment.
_PASSED_ON = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


class Finished(Value, frozen=True, kw_only=True):
    code: int
    stdout: bytes
    stderr: str


async def run(
    argv: Sequence[str],
    *,
    directory: Path,
    bytes_max: int,
    written: Callable[[int], None] | None = None,
    told: asyncio.Future[str] | None = None,
) -> Finished:
    """Run a program to its end. `written` is told now and then how many bytes it has written, to whatever.

    `told`: what it reads, as soon as that is known; it is started, and waits for it.

    Raises PullError where it writes more than `bytes_max`, makes too many files below `directory`, or falls silent.
    """
    stdout, stderr = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr"))
    environment = {name: value for name in _PASSED_ON if (value := os.environ.get(name)) is not None}
    # Its parent's death is its own: nothing writes into the cache behind the next agent's back.
    guarded = ("setpriv", "--pdeathsig", "KILL", process.program(argv[0]), *argv[1:])
    pid = None
    try:
        with _Input(told) as stdin:
            pid = process.spawn(guarded, descriptors={0: stdin.reads, 1: stdout, 2: stderr}, env=environment)
            await stdin.tell()
        code = await _watched(pid, directory, bytes_max, written)
        pid = None
        return Finished(
            code=code,
            stdout=os.pread(stdout, _OUTPUT_BYTES_MAX, 0),
            stderr=os.pread(stderr, _OUTPUT_BYTES_MAX, 0).decode(errors="replace"),
        )
    finally:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await process.ended(pid)
        os.close(stdout)
        os.close(stderr)


class _Input:
    """What a program reads: nothing, or what somebody will know later."""

    def __init__(self, told: asyncio.Future[str] | None) -> None:
        self._told = told
        self.reads, self._writes = os.pipe()  # neither is inherited

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reads)
        os.close(self._writes)

    async def tell(self) -> None:
        if self._told is not None:
            text = (await self._told).encode()
            if len(text) > _INPUT_BYTES_MAX:
                raise PullError("it has too many layers", retry=False)
            os.write(self._writes, text)


async def _watched(pid: int, directory: Path, bytes_max: int, written: Callable[[int], None] | None) -> int:
    loop = asyncio.get_running_loop()
    files_before, last, changed_s = os.statvfs(directory).f_ffree, -1, loop.time()
    while True:
        try:
            async with asyncio.timeout(_POLL_S):
                return await process.ended(pid) or 0
        except TimeoutError:
            pass
        moved, out = _io(pid)
        if moved != last:
            last, changed_s = moved, loop.time()
        if out > bytes_max:
            raise too_large(bytes_max)
        if files_before - os.statvfs(directory).f_ffree > _FILES_MAX:
            raise PullError(f"it has more than {_FILES_MAX} files", retry=False)
        if loop.time() - changed_s > _SILENT_S_MAX:
            raise PullError(f"nothing moved for {_SILENT_S_MAX:g} s", retry=True)
        if written is not None:
            written(out)


def too_large(bytes_max: int) -> PullError:
    return PullError(f"it is larger than the {bytes_max // MIB} MiB that this node has for images", retry=False)


def _io(pid: int) -> tuple[int, int]:
    """Bytes it has read and written, and those written alone; whatever they were read from or written to."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(fields["rchar"]) + int(fields["wchar"]), int(fields["wchar"])
    return 0, 0
