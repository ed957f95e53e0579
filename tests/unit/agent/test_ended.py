"""Logs of what is over are kept, the newest of them, and nothing but logs."""

import os
from pathlib import Path

import pytest

from agent.core.events import AllocRecord
from agent.ended import EndedLogs
from agent.held import sandbox_directory
from agent.sandbox import logs
from agent.store import Store
from outrider.ids import AllocId, GroupName, JobName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import Group, Task, TaskRole

TASKS = (Task(name=TaskName("fetch"), role=TaskRole.INIT), Task(name=TaskName("main")))


def alloc(number: int) -> AllocId:
    return AllocId(f"{number:010x}")


def ended(store: Store, number: int, text: str = "said\n") -> AllocId:
    """An allocation that has run, and is forgotten."""
    group = Group(name=GroupName("web"), tasks=TASKS)
    assignment = Assignment(alloc=alloc(number), job=JobName("shop"), job_version=1, group=group, index=0)
    store.save(AllocRecord(assignment=assignment))
    sandbox = store.allocation_directory(alloc(number)) / "main"
    (sandbox / "bundle").mkdir(parents=True)
    (sandbox / "bundle" / "config.json").write_text("TOKEN=hush")
    (sandbox / "log").write_text(text)
    os.link(sandbox / "log", sandbox / "log.held")
    store.forget(alloc(number))
    return alloc(number)


def kept(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "ended").iterdir())


def test_the_logs_outlive_the_allocation_and_nothing_else_does(tmp_path: Path) -> None:
    store = Store(tmp_path, "n1")
    one = ended(store, 1)
    assert store.tasks(one) == ()
    assert not store.allocation_directory(one).exists()
    assert [(task.name, task.role) for task in store.ended.tasks(one)] == [("fetch", "init"), ("main", "main")]
    files = sorted(str(path.relative_to(tmp_path / "ended" / one)) for path in (tmp_path / "ended" / one).rglob("*"))
    assert files == ["main", "main/log", "main/log.held", "tasks.json"]
    assert (tmp_path / "ended" / one / "main/log").read_text() == "said\n"


def test_only_the_newest_are_kept_over_restarts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.ended.KEPT_MAX", 3)
    store = Store(tmp_path, "n1")
    for number in range(3):
        directory = tmp_path / "ended" / ended(store, number)
        os.utime(directory, (number, number))
    again = Store(tmp_path, "n1")
    ended(again, 3)
    assert kept(tmp_path) == [alloc(number) for number in (1, 2, 3)]


def test_their_bytes_are_bounded_and_a_file_of_two_names_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.ended.BYTES_MAX", 2500)
    store = Store(tmp_path, "n1")
    for number in range(3):
        ended(store, number, "x" * 1000)
    assert len(kept(tmp_path)) == 2


def test_what_never_said_anything_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, "n1")
    store.forget(alloc(9))
    assert kept(tmp_path) == []
    assert EndedLogs(tmp_path / "ended").tasks(alloc(9)) == ()


async def test_they_are_read_like_those_of_what_runs(tmp_path: Path) -> None:
    store = Store(tmp_path, "n1")
    one = ended(store, 1, "2026-11-26T12:00:00.0Z stdout F first\n2026-11-26T12:00:01.0Z stderr F second\n")
    read = logs.read(str(sandbox_directory(store.ended.directory(one), TaskName("main"))))
    assert [(piece.stream, piece.data) async for piece in read] == [("stdout", b"first\n"), ("stderr", b"second\n")]
