"""What the agent keeps on disk: what it acknowledged, and a record of each allocation.

    DATA/agent.json                     Generation acknowledged
    DATA/allocations/ID/state.json      AllocRecord, the core's
    DATA/allocations/ID/...             the sandboxes' directories: bundles, exit statuses, logs
    DATA/ended/...                      logs of allocations that are forgotten (`ended`)

Every write is whole or not at all: a new file, fsync, rename, fsync of the directory. A file that cannot be read is
set aside under `*.damaged` and told of; the agent goes on with what the host itself shows. Owns no thread: the caller
brings one, always the same.
"""

import os
import shutil
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.core.events import AllocRecord
from agent.ended import EndedLogs
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.allocation import Generation
from outrider.model.job import Task, Value

V = TypeVar("V", bound=msgspec.Struct)

_STATE = "state.json"


class AgentRecord(Value, frozen=True, kw_only=True):
    node: str
    acknowledged: Generation = Generation()


class Loaded(Value, frozen=True, kw_only=True):
    """What was on disk. `damaged`: files that were set aside, as their new paths."""

    acknowledged: Generation
    records: tuple[AllocRecord, ...]
    damaged: tuple[Path, ...]


class Store:
    def __init__(self, data: Path, node: str) -> None:
        """Raises HostError where `data` is another node's or cannot be used."""
        self._data = data
        self._node = node
        self._allocations = data / "allocations"
        self.ended = EndedLogs(data / "ended")
        try:
            self._allocations.mkdir(mode=0o711, parents=True, exist_ok=True)
            self.ended.open()
        except OSError as error:
            raise HostError(str(data), step=f"make the directory: {error.strerror}") from error

    def allocation_directory(self, alloc: AllocId) -> Path:
        return self._allocations / alloc

    def tasks(self, alloc: AllocId) -> tuple[Task, ...]:
        """The tasks of a recorded allocation, ended or not; () where there is no record."""
        try:
            record = msgspec.json.decode((self.allocation_directory(alloc) / _STATE).read_bytes(), type=AllocRecord)
        except (OSError, msgspec.DecodeError):
            return ()
        return record.assignment.group.tasks

    def directories(self) -> dict[AllocId, Path]:
        """Of all allocations there is anything of, recorded or not."""
        return {AllocId(path.name): path for path in self._allocations.iterdir() if path.is_dir()}

    def load(self) -> Loaded:
        damaged: list[Path] = []
        agent = self._read(self._data / "agent.json", AgentRecord, damaged) or AgentRecord(node=self._node)
        if agent.node != self._node:
            hint = f"give each node a `data` directory of its own; this agent is {self._node}"
            raise HostError(str(self._data), step=f"it belongs to node {agent.node}", hint=hint)
        records = []
        for path in sorted(self._allocations.iterdir()):
            record = self._read(path / _STATE, AllocRecord, damaged)
            if record is not None and record.assignment.alloc == path.name:
                records.append(record)
        return Loaded(acknowledged=agent.acknowledged, records=tuple(records), damaged=tuple(damaged))

    def save(self, record: AllocRecord) -> None:
        """Durable on return. Raises HostError."""
        directory = self.allocation_directory(record.assignment.alloc)
        try:
            if not directory.exists():
                directory.mkdir(mode=0o711)
                _sync_directory(self._allocations)
            _write(directory / _STATE, record)
        except OSError as error:
            raise HostError(str(directory), step=f"write the allocation's record: {error.strerror}") from error

    def acknowledge(self, generation: Generation) -> None:
        """Durable on return. Raises HostError."""
        try:
            _write(self._data / "agent.json", AgentRecord(node=self._node, acknowledged=generation))
        except OSError as error:
            raise HostError(str(self._data), step=f"write agent.json: {error.strerror}") from error

    def forget(self, alloc: AllocId) -> None:
        """Record and all, but for the newest logs. What cannot be removed now is removed when it is found again."""
        directory = self.allocation_directory(alloc)
        self.ended.keep(alloc, self.tasks(alloc), directory)
        (directory / _STATE).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    def remove_unrecorded(self, known: frozenset[AllocId]) -> None:
        """Directories that belong to no allocation: of one whose forgetting was cut short."""
        for path in self._allocations.iterdir():
            if path.name not in known and not (path / _STATE).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, path: Path, kind: type[V], damaged: list[Path]) -> V | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            damaged.append(aside)
            return None


def _write(path: Path, value: msgspec.Struct) -> None:
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.write(msgspec.json.encode(value))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
