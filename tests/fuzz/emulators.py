"""What an emulator and the agent inside a guest answer: a socket that says what it likes, and the readers of it."""

import asyncio
import json
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

from agent import qmp
from agent.qmp.guest_agent import GuestAgents
from outrider.errors import HostError

_GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}'
_READY = b'{"return": {}, "id": "__qmp#00000"}'
_ASKED = b"of the request"
_REQUEST_BYTES = 4096  # it ends with no line


def emulator_answers() -> list[bytes]:
    answers = (
        b'{"return": {"status": "running", "singlestep": false, "running": true}, "id": "__qmp#00001"}',
        b'{"return": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "id": "__qmp#00001"}',
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": "__qmp#00001"}',
        b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}',
    )
    return [b"\r\n".join((_GREETING, _READY, answer, b"")) for answer in answers]


def guest_agent_answers() -> list[bytes]:
    return [
        b'{"return": {"pid": 812}, "id": "of the request"}\n',
        b'{"return": {"exited": true, "exitcode": 3, "out-data": "aGVsbG8K"}, "id": "of the request"}\n',
        b'{"return": {"exited": true, "signal": 9}, "id": "of the request"}\n',
        b'{"error": {"class": "CommandNotFound", "desc": "no"}, "id": "of the request"}\n',
    ]


class Answers:
    """Says `content` to whoever dials, and hangs up; nothing of it stays after the case."""

    def __init__(self, ask: Callable[[Path], Coroutine[None, None, object]], *, when_asked: bool) -> None:
        self._ask, self._when_asked = ask, when_asked

    def __call__(self, content: bytes) -> None:
        asyncio.run(self._case(content))

    async def _case(self, content: bytes) -> None:
        # The library leaves broken pipes to nobody.
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answer = content
            if self._when_asked:
                asked = json.loads(await reader.read(_REQUEST_BYTES))
                answer = content.replace(_ASKED, asked["id"].encode())
            writer.write(answer)
            writer.close()

        with tempfile.TemporaryDirectory(prefix="outrider-fuzz-") as directory:
            path = Path(directory) / "socket"
            async with await asyncio.start_unix_server(serve, path):
                await self._ask(path)


async def ask_emulator(path: Path) -> None:
    await qmp.status(path)
    await qmp.version(path)


async def run_in_guest(path: Path) -> None:
    """The same answer to being started and to being asked about: one that is right for both is wrong enough."""
    agents = GuestAgents(answer_s=0.02)  # wrong answers are waited out: for what the guest might say yet
    for _ in range(2):
        program = await agents.start(path, ["true"])
        try:
            async with asyncio.timeout(0.01):  # it tells that the program runs on, and would for ever
                await program.wait()
        except TimeoutError as error:
            raise HostError("guest", step="it runs on") from error
