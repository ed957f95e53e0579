"""When a controller was heard last is known to the next agent, and to none after the host's next boot."""

from pathlib import Path

import pytest

from agent import last_heard
from agent.last_heard import LastHeard
from outrider.clock import uptime_s


def test_the_next_agent_knows_it(tmp_path: Path) -> None:
    at_s = uptime_s()
    assert LastHeard(tmp_path).at_s() is None
    LastHeard(tmp_path).remember(at_s)
    assert LastHeard(tmp_path).at_s() == at_s


def test_after_a_reboot_nobody_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LastHeard(tmp_path).remember(uptime_s())
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(last_heard, "_BOOT_ID", boot_id)
    assert LastHeard(tmp_path).at_s() is None


@pytest.mark.parametrize("content", [b"", b"{}", b"12.5", b"\xff"])
def test_what_cannot_be_read_is_nothing_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heard").write_bytes(content)
    assert LastHeard(tmp_path).at_s() is None


def test_what_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    LastHeard(tmp_path / "gone").remember(1.0)
