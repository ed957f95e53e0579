"""A program started beside a workload, inside its running sandbox.

Owns its descriptors until `wait` or `close`. Nothing is buffered here: a reader that is slow slows the program.
"""

import asyncio
import errno
import fcntl
import os
import signal
import socket
import struct
import termios
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from agent.sandbox import process
from agent.sandbox.descriptors import readable, writable
from agent.sandbox.json_values import Json
from outrider.errors import HostError

_READ_BYTES = 65_536
_TERMINAL_S_MAX = 10.0
_PROCESS_DESCRIPTOR = 3  # as crun has them
_DIRECTORY_DESCRIPTOR = 4


class ExecProcess:
    """With a tty all output comes as stdout; stderr then carries only crun's own complaints."""

    def __init__(self, pid: int, *, stdin: int, outputs: Mapping[str, int], tty: bool) -> None:
        self._pid = pid
        self._stdin: int | None = stdin
        self._outputs = dict(outputs)
        self._tty = tty
        self._code: int | None = None
        for descriptor in (stdin, *outputs.values()):
            os.set_blocking(descriptor, False)

    async def read(self) -> tuple[str, bytes] | None:
        """The next output as ("stdout" or "stderr", bytes); None once both have ended."""
        while self._outputs:
            for name, descriptor in tuple(self._outputs.items()):
                try:
                    data = os.read(descriptor, _READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != errno.EIO:  # how a terminal says that nobody holds its other side
                        raise
                    data = b""
                del self._outputs[name]
                if data:
                    self._outputs[name] = descriptor  # to the end of the line: one must not starve the other
                    return name, data
                os.close(descriptor)
                break
            else:
                await readable(*self._outputs.values())
        return None

    async def write(self, data: bytes) -> None:
        """Give it input; what it no longer reads is dropped."""
        while data and self._stdin is not None:
            try:
                data = data[os.write(self._stdin, data) :]
            except BlockingIOError:
                await writable(self._stdin)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                return

    def close_stdin(self) -> None:
        """End its input. A terminal has no such end: there a user types ^D."""
        if self._stdin is not None and not self._tty:
            os.close(self._stdin)
            self._stdin = None

    def resize(self, rows: int, columns: int) -> None:
        if self._tty and self._stdin is not None:
            fcntl.ioctl(self._stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def kill(self) -> None:
        """End it at once. crun passes no signal on: its child is the program."""
        for child in _children(self._pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code (128 + signal where a signal ended it)."""
        if self._code is None:
            self._code = await process.ended(self._pid) or 0
        return self._code

    def close(self) -> None:
        """Let go of its input and output."""
        for descriptor in (self._stdin, *self._outputs.values()):
            if descriptor is not None:
                os.close(descriptor)
        self._stdin = None
        self._outputs.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._code is None:
            self.kill()
            await self.wait()
        self.close()


async def start(crun: tuple[str, ...], sandbox: str, values: dict[str, Json]) -> ExecProcess:
    """Run `values` (an OCI process) in the sandbox, its streams as pipes."""
    inner_in, stdin = os.pipe()
    stdout, inner_out = os.pipe()
    stderr, inner_err = os.pipe()
    try:
        pid = _spawn(crun, sandbox, values, descriptors={0: inner_in, 1: inner_out, 2: inner_err})
    except OSError:
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        raise
    finally:
        for descriptor in (inner_in, inner_out, inner_err):
            os.close(descriptor)
    return ExecProcess(pid, stdin=stdin, outputs={"stdout": stdout, "stderr": stderr}, tty=False)


async def start_with_terminal(
    crun: tuple[str, ...], sandbox: str, values: dict[str, Json], *, directory: Path, rows: int, columns: int
) -> ExecProcess:
    """The same, behind a terminal made inside the sandbox: crun hands its other side over a socket in `directory`."""
    holder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    stderr, inner_err = os.pipe()
    name = f"exec-{inner_err}.sock"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            # Through the descriptor: a socket's path has 107 characters, and a run directory may be deep.
            (directory / name).unlink(missing_ok=True)
            listener.bind(f"/proc/self/fd/{holder}/{name}")
            listener.listen(1)
            pid = _spawn(
                crun,
                sandbox,
                values,
                descriptors={2: inner_err, _DIRECTORY_DESCRIPTOR: holder},
                options=("--console-socket", f"/proc/self/fd/{_DIRECTORY_DESCRIPTOR}/{name}"),
            )
            terminal = await _terminal(listener, pid)
    finally:
        (directory / name).unlink(missing_ok=True)
        os.close(holder)
        os.close(inner_err)
    if terminal is None:  # it ended before it had one: it says why on stderr
        return ExecProcess(pid, stdin=os.open(os.devnull, os.O_RDWR), outputs={"stderr": stderr}, tty=False)
    exec_process = ExecProcess(pid, stdin=terminal, outputs={"stdout": os.dup(terminal), "stderr": stderr}, tty=True)
    exec_process.resize(rows, columns)
    return exec_process


def _spawn(
    crun: tuple[str, ...],
    sandbox: str,
    values: dict[str, Json],
    *,
    descriptors: Mapping[int, int],
    options: tuple[str, ...] = (),
) -> int:
    described = os.memfd_create("process")
    try:
        os.write(described, msgspec.json.encode(values))
        return process.spawn(
            [*crun, "exec", "--process", f"/proc/self/fd/{_PROCESS_DESCRIPTOR}", *options, sandbox],
            descriptors={**descriptors, _PROCESS_DESCRIPTOR: described},
        )
    finally:
        os.close(described)


async def _terminal(listener: socket.socket, pid: int) -> int | None:
    """The terminal that crun sends; None where it ended without."""
    listener.setblocking(False)
    ended = os.pidfd_open(pid)
    try:
        await _either(listener.fileno(), ended)
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return None
        with connection:
            connection.setblocking(False)
            await _either(connection.fileno(), ended)
            try:
                _, descriptors, _, _ = socket.recv_fds(connection, _READ_BYTES, 1)
            except BlockingIOError:
                return None
            return descriptors[0] if descriptors else None
    finally:
        os.close(ended)


async def _either(descriptor: int, ended: int) -> None:
    try:
        async with asyncio.timeout(_TERMINAL_S_MAX):
            await readable(descriptor, ended)
    except TimeoutError as error:
        raise HostError("crun", step=f"exec: no terminal within {_TERMINAL_S_MAX:g} s") from error


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
