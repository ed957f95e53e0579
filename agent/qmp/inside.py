"""What a guest says of itself: its memory through the balloon's driver, its processors' time through its agent.

Either may be absent in a guest: then so is its figure.
https://www.qemu.org/docs/master/interop/virtio-balloon-stats.html; guest-get-cpustats of qemu-ga-ref.
"""

from pathlib import Path

from qemu.qmp import ExecuteError, QMPError

from agent.qmp import conversation
from agent.qmp.guest_agent import GuestAgents
from outrider.errors import HostError, RefusedError
from outrider.model.job import Value

BALLOON = "balloon"  # the device's name
_PATH = f"/machine/peripheral/{BALLOON}"
_ASKED_EVERY_S = 2
_UNKNOWN = (1 << 64) - 1
_DEADLINE_S = 1.0
_BUSY = ("user", "nice", "system", "irq", "softirq")


class InsideUsage(Value, frozen=True, kw_only=True):
    memory_bytes: int | None = None  # that it can use, and what of it is not available to a new program
    memory_used_bytes: int | None = None
    cpu_s: float | None = None


async def inside(control: Path, agent: Path, agents: GuestAgents) -> InsideUsage:
    """`control`, `agent`: the emulator's sockets. What is not known within a second is left out."""
    total, available = await _memory(control)
    used = total - available if total is not None and available is not None else None
    return InsideUsage(memory_bytes=total, memory_used_bytes=used, cpu_s=await _cpu_s(agent, agents))


async def _memory(control: Path) -> tuple[int | None, int | None]:
    try:
        async with conversation(control, _DEADLINE_S) as client:
            # Again and again: an emulator that was just started, or took a guest over, does not ask yet.
            interval = {"path": _PATH, "property": "guest-stats-polling-interval", "value": _ASKED_EVERY_S}
            await client.execute("qom-set", interval)
            answer = await client.execute("qom-get", {"path": _PATH, "property": "guest-stats"})
    except (HostError, QMPError):
        return None, None
    stats = answer.get("stats") if isinstance(answer, dict) else None
    if not isinstance(stats, dict):
        return None, None
    return _number(stats.get("stat-total-memory")), _number(stats.get("stat-available-memory"))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < _UNKNOWN else None


async def _cpu_s(agent: Path, agents: GuestAgents) -> float | None:
    try:
        answer = await agents.call(agent, "guest-get-cpustats", {}, deadline_s=_DEADLINE_S)
    except (HostError, RefusedError, ExecuteError):
        return None
    if not isinstance(answer, list):
        return None
    milliseconds = [each.get(key, 0) for each in answer if isinstance(each, dict) for key in _BUSY]
    return sum(found for found in milliseconds if isinstance(found, int)) / 1000
