import asyncio
import json
from pathlib import Path

import pytest

from agent.qmp.guest_agent import GuestAgents
from outrider.errors import RefusedError


class SlowGuest:
    """Answers each request in its turn, late: through whatever connection there is by then, as a guest's port does."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.awake = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(4096):
            self.asked.append(json.loads(request))
            while self.awake and self.asked:
                asked = self.asked.pop(0)
                answer = {"return": {"answers": asked["execute"]}, "id": asked["id"]}
                writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_late_answer_is_taken_for_no_other_request_s(tmp_path: Path, restarted: bool) -> None:
    guest, path = SlowGuest(), tmp_path / "agent"
    agents = GuestAgents(answer_s=0.05)
    async with await asyncio.start_unix_server(guest.serve, path):
        for _ in range(2):
            with pytest.raises(RefusedError, match="nobody answers inside the guest"):
                await agents.ask(path, "early", {})
        guest.awake = True
        if restarted:
            agents = GuestAgents()
        assert await agents.call(path, "late", {}, deadline_s=10) == {"answers": "late"}
