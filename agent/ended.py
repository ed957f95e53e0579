"""The logs of allocations that the controller has let go of: kept for a while, for people who come later.

    DATA/ended/ID/tasks.json            its tasks
    DATA/ended/ID/TASK/log...           as `sandbox.logs` reads them

Owns how many are kept, the newest of them, and nothing of an allocation that lives. Only `keep` and `open` change
anything; they are for one thread.
"""

import shutil
from collections import deque
from pathlib import Path

import msgspec

from agent.sandbox.conmon import Directory
from outrider.ids import AllocId, TaskName
from outrider.model.job import Task, TaskRole, Value

KEPT_MAX = 200
BYTES_MAX = 256 * 1024 * 1024
_TASKS = "tasks.json"


class EndedTask(Value, frozen=True, kw_only=True):
    name: TaskName
    role: TaskRole = TaskRole.MAIN


class EndedLogs:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: deque[tuple[AllocId, int]] = deque()  # the oldest first, with their bytes
        self._bytes = 0

    def open(self) -> None:
        """What an agent before this one kept."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        found = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in found:
            self._count(AllocId(path.name), path)
        self._prune()

    def keep(self, alloc: AllocId, tasks: tuple[Task, ...], directory: Path) -> None:
        """Take the logs out of the allocation's `directory`, which is about to go. What cannot be kept is let go."""
        target = self._directory / alloc
        try:
            for sandbox in [path for path in directory.iterdir() if path.is_dir()]:
                self._take(sandbox, target / sandbox.name)
            if target.exists():
                named = [EndedTask(name=task.name, role=task.role) for task in tasks]
                (target / _TASKS).write_bytes(msgspec.json.encode(named))
                self._count(alloc, target)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
        self._prune()

    def tasks(self, alloc: AllocId) -> tuple[EndedTask, ...]:
        """() where nothing of it is kept."""
        try:
            content = (self._directory / alloc / _TASKS).read_bytes()
            return msgspec.json.decode(content, type=tuple[EndedTask, ...])
        except (OSError, msgspec.DecodeError):
            return ()

    def directory(self, alloc: AllocId) -> Path:
        return self._directory / alloc

    def _take(self, sandbox: Path, target: Path) -> None:
        """Its logs alone: beside them stands what the workload was given."""
        before = Directory(str(sandbox))
        for log in (before.log, before.log_held, before.log_older):
            if log.exists():
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
                log.replace(target / log.name)

    def _count(self, alloc: AllocId, path: Path) -> None:
        statuses = [file.stat() for file in path.rglob("*") if file.is_file()]
        files = {(status.st_dev, status.st_ino): status.st_size for status in statuses}
        size = sum(files.values())  # one that has two names counts once
        self._kept.append((alloc, size))
        self._bytes += size

    def _prune(self) -> None:
        while len(self._kept) > KEPT_MAX or self._bytes > BYTES_MAX:
            alloc, size = self._kept.popleft()
            self._bytes -= size
            shutil.rmtree(self._directory / alloc, ignore_errors=True)
