"""What Prometheus finds by file is what there is to scrape, whole at every moment."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from controller.config import Config
from controller.discovery import TargetGroup, keep_targets
from outrider.log import Log
from tests.integration.processes import until


def group(at: str) -> TargetGroup:
    return TargetGroup(targets=(at,), labels={"component": "agent"})


async def test_the_file_follows_the_targets_and_waits_for_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.discovery._LOOK_S", 0.01)
    found = [group("10.0.0.1:1")]
    blocked = tmp_path / "prometheus"
    blocked.write_text("a file where a directory is wanted")
    path = blocked / "outrider.json"
    task = asyncio.create_task(keep_targets(path, lambda: tuple(found), Log("test")))

    def held() -> list[Any]:
        with contextlib.suppress(OSError):
            return list(json.loads(path.read_text()))
        return []

    try:
        await asyncio.sleep(0)
        blocked.unlink()
        await until(lambda: [each["targets"] for each in held()] == [["10.0.0.1:1"]], "the file is there")
        found.append(group("10.0.0.2:1"))
        await until(lambda: len(held()) == 2, "the file has the new target too")
        assert held()[1]["labels"] == {"component": "agent"}
    finally:
        task.cancel()


def test_a_file_without_figures_of_the_controllers_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets_file: needs `metrics_listen`"):
        Config(
            cluster="c", data=tmp_path, listen="127.0.0.1:0", join_listen="127.0.0.1:0",
            operator_socket=tmp_path / "o.sock", targets_file=tmp_path / "t.json",
        )  # fmt: skip
