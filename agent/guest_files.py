"""One file out of a guest, or into it, through the QEMU guest agent: each a conversation, as a program's is.

Holds the file open in the guest until its end. Nothing is buffered here: the guest's pace is the copy's.
"""

import asyncio
import base64
from pathlib import Path
from typing import TypeVar

from qemu.qmp import ExecuteError

from agent.operation import Operation
from agent.qmp.guest_agent import GuestAgents, decoded
from outrider.errors import HostError, OutriderError, RefusedError

A = TypeVar("A")

_BLOCK_BYTES = 64 * 1024


class GuestFile:
    """`line`: the emulator's socket to its guest's agent."""

    def __init__(self, agents: GuestAgents, line: Path, path: str) -> None:
        self._agents = agents
        self._line = line
        self._path = path
        self._handle: int | None = None

    async def open(self, mode: str) -> None:
        """Raises RefusedError where the guest objects, or has no agent."""
        answer = await self._ask("guest-file-open", {"path": self._path, "mode": mode}, answers=int)
        self._handle = answer

    async def read(self) -> bytes:
        """b"" at its end."""
        answer = await self._ask("guest-file-read", {"handle": self._handle, "count": _BLOCK_BYTES}, answers=dict)
        data = answer.get("buf-b64")
        return decoded(self._line, data) if isinstance(data, str) else b""

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), _BLOCK_BYTES):
            block = base64.b64encode(data[at : at + _BLOCK_BYTES]).decode()
            await self._ask("guest-file-write", {"handle": self._handle, "buf-b64": block}, answers=dict)

    async def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            await self._ask("guest-file-close", {"handle": handle}, answers=dict)

    async def _ask(self, command: str, arguments: dict[str, object], *, answers: type[A]) -> A:
        try:
            answer = await self._agents.call(self._line, command, arguments)
        except ExecuteError as error:
            raise RefusedError("not-copied", f"{self._path}: the guest says: {error}") from error
        if not isinstance(answer, answers):
            raise HostError(f"guest agent at {self._line}", step=f"{command} answered {answer!r:.80}")
        return answer


class Download(Operation):
    def __init__(self, file: GuestFile) -> None:
        self._file = file

    async def read(self) -> tuple[str, bytes] | None:
        data = await self._file.read()
        return ("stdout", data) if data else None

    async def __aexit__(self, *exc_info: object) -> None:
        await _close(self._file)


class Upload(Operation):
    """What goes wrong is said at the end: `read` waits for it."""

    def __init__(self, file: GuestFile) -> None:
        self._file = file
        self._over = asyncio.Event()
        self._failure: OutriderError | None = None

    async def write(self, data: bytes) -> None:
        if self._failure is None:
            try:
                await self._file.write(data)
            except OutriderError as error:
                self._failure = error
                self._over.set()

    def close_stdin(self) -> None:
        self._over.set()

    async def read(self) -> tuple[str, bytes] | None:
        await self._over.wait()
        if self._failure is not None:
            raise self._failure
        await self._file.close()
        return None

    async def __aexit__(self, *exc_info: object) -> None:
        await _close(self._file)


async def _close(file: GuestFile) -> None:
    try:
        await file.close()
    except OutriderError:
        return  # the guest has ended, or its agent: nothing is open there any more
