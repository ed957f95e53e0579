"""Programs run inside a guest through the QEMU guest agent, where the guest has one: `qemu-guest-agent` on Debian.

https://qemu-project.gitlab.io/qemu/interop/qemu-ga-ref.html. There is one line to it: every request has it to itself
for as long as its answer takes. It has no terminal and takes no input, and a program's output comes at its end.
"""

import asyncio
import base64
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

from qemu.qmp import ExecuteError, QMPClient

from agent.qmp import BROKEN, connect, hang_up
from outrider.errors import HostError, RefusedError

_ANSWER_S = 10.0  # of a guest on a busy node, whose processors are emulated
_POLL_S = 0.1
_POLL_S_MAX = 1.0


class _Client(QMPClient):
    """One conversation, whose requests no other one ever made.

    What was asked while the guest booted, or was busy, is answered later, to whoever is connected by then: also after
    the guest moved to another node. The library counts from 0 in each conversation, and would take that for its own.
    """

    def _get_exec_id(self) -> str:
        return secrets.token_hex(8)


class GuestAgents:
    """The lines to all guests of this node, each used by one request at a time, which waits `answer_s` at most."""

    def __init__(self, answer_s: float = _ANSWER_S) -> None:
        self._answer_s = answer_s
        self._lines: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()

    async def start(self, path: Path, argv: Sequence[str], *, given: bytes = b"") -> "GuestProgram":
        """`path`: the emulator's socket; `given`: the program's input.

        Raises RefusedError where the guest has no agent, or no such program.
        """
        arguments: dict[str, object] = {"path": argv[0], "arg": [*argv[1:]], "capture-output": True}
        if given:
            arguments["input-data"] = base64.b64encode(given).decode()
        try:
            answer = await self.ask(path, "guest-exec", arguments)
        except ExecuteError as error:
            raise RefusedError("not-started", f"{argv[0]}: the guest says: {error}") from error
        pid = answer.get("pid")
        if not isinstance(pid, int):
            raise HostError(f"guest agent at {path}", step="guest-exec answered without a pid")
        return GuestProgram(self, path, pid)

    async def ask(self, path: Path, command: str, arguments: Mapping[str, object]) -> dict[str, object]:
        """As `call`, of what answers with several values."""
        answer = await self.call(path, command, arguments)
        return answer if isinstance(answer, dict) else {}

    async def call(
        self, path: Path, command: str, arguments: Mapping[str, object], *, deadline_s: float | None = None
    ) -> object:
        """Raises RefusedError where nobody answers, ExecuteError where the guest's agent objects."""
        client = _Client()
        client.await_greeting = client.negotiate = False
        try:
            bound_s = self._answer_s if deadline_s is None else deadline_s
            async with self._lines.setdefault(path, asyncio.Lock()), asyncio.timeout(bound_s):
                try:
                    await client.connect(connect(path))
                    answer = await client.execute(command, {**arguments})
                finally:
                    await hang_up(client)
        except TimeoutError as error:
            hint = "install and start qemu-guest-agent in its image"
            raise RefusedError("no-guest-agent", f"nobody answers inside the guest: {hint}") from error
        except BROKEN as error:
            if isinstance(error, ExecuteError):
                raise
            raise HostError(f"guest agent at {path}", step=str(error)) from error
        return answer


def decoded(path: Path, data: str) -> bytes:
    """Of what the guest behind `path` answered. Raises HostError where it is no base64."""
    try:
        return base64.b64decode(data)
    except ValueError as error:
        raise HostError(f"guest agent at {path}", step=f"what it answered is no base64: {error}") from error


class GuestProgram:
    """As `agent.tunnels.Process` has it."""

    def __init__(self, agents: GuestAgents, path: Path, pid: int) -> None:
        self._agents = agents
        self._path = path
        self._pid = pid
        self._code: int | None = None
        self._pieces: deque[tuple[str, bytes]] = deque()

    async def read(self) -> tuple[str, bytes] | None:
        await self.wait()
        return self._pieces.popleft() if self._pieces else None

    async def wait(self) -> int:
        wait_s = _POLL_S
        while self._code is None:
            status = await self._ask_status()
            if status.get("exited") is not True:
                await asyncio.sleep(wait_s)  # the guest's agent tells only who asks
                wait_s = min(2 * wait_s, _POLL_S_MAX)
                continue
            self._pieces.extend(
                (name, decoded(self._path, data))
                for name, key in (("stdout", "out-data"), ("stderr", "err-data"))
                if isinstance(data := status.get(key), str)
            )
            code, number = status.get("exitcode"), status.get("signal")
            self._code = code if isinstance(code, int) else 128 + number if isinstance(number, int) else 1
        return self._code

    async def _ask_status(self) -> dict[str, object]:
        try:
            return await self._agents.ask(self._path, "guest-exec-status", {"pid": self._pid})
        except ExecuteError as error:
            raise HostError(f"guest agent at {self._path}", step=str(error)) from error

    async def write(self, data: bytes) -> None:
        """Its input is closed: what is typed meets nobody."""

    def close_stdin(self) -> None:
        """It is."""

    def resize(self, rows: int, columns: int) -> None:
        """It has no terminal."""

    def kill(self) -> None:
        """It runs on: the guest's agent ends no program."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing is held between requests."""
