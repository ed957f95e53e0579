"""When a controller was heard last, for an agent that starts anew: `run/heard`, void after the host's next boot."""

import contextlib
from pathlib import Path

import msgspec

from outrider.clock import uptime_s

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Heard(msgspec.Struct, frozen=True):
    boot: str
    at_s: float


class LastHeard:
    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "heard"
        self._boot = _BOOT_ID.read_text().strip()

    def remember(self, at_s: float) -> None:
        """`at_s` of the host's uptime."""
        unfinished = self._path.with_name("heard.new")
        with contextlib.suppress(OSError):  # a full disk: the next agent counts from the time before, and stops sooner
            unfinished.write_bytes(msgspec.json.encode(_Heard(boot=self._boot, at_s=at_s)))
            unfinished.replace(self._path)

    def at_s(self) -> float | None:
        """None: not since this boot, or nobody knows."""
        try:
            heard = msgspec.json.decode(self._path.read_bytes(), type=_Heard)
        except (OSError, msgspec.DecodeError):
            return None
        return heard.at_s if heard.boot == self._boot and heard.at_s <= uptime_s() else None
