"""A task's files that must never reach a disk: a small file system in memory, written by the agent, read by the task.

    RUN/belongings/ALLOC/TASK/secrets/...    mounted at /secrets
    RUN/belongings/ALLOC/TASK/guest/...      what a guest's emulator shows it; `guest_memory` leads there
    RUN/belongings/ALLOC/TASK/given.json     what the task was given last; for the agent itself

Owns these directories. The task cannot write to them, so no link in there is anybody else's.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import msgspec

from agent.sandbox import mounts
from agent.sandbox.spec import StartError
from outrider.errors import HostError
from outrider.ids import AllocId, SecretName, TaskName
from outrider.model.job import MIB, Value

_BYTES = 8 * MIB
_GUEST_BYTES = 32 * MIB  # its files, and an image made of them
BELONGINGS, _GUEST = "belongings", "guest"
_GIVEN = "given.json"


class Given(Value, frozen=True, kw_only=True):
    """What a task was given: it tells what changed since, for an agent started again too."""

    owner: int  # the host's uid and gid that may read it
    secrets: Mapping[SecretName, int] = {}


class TaskMemory:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self, owner: int, *, guest: bool = False) -> None:
        """An earlier run's is emptied. Raises HostError."""
        self.clear()
        try:
            if not self._directory.is_mount():
                self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
                mounts.mount_tmpfs(self._directory, size_bytes=_GUEST_BYTES if guest else _BYTES, uid=0, mode=0o711)
            self._give(Given(owner=owner))
            if guest:
                self.part(_GUEST)
        except OSError as error:
            raise HostError(str(self._directory), step=f"prepare: {error.strerror}") from error

    def part(self, name: str) -> Path:
        """The directory of one kind of belongings."""
        path = self._directory / name
        path.mkdir(mode=0o755, exist_ok=True)
        return path

    def given(self) -> Given | None:
        try:
            return msgspec.json.decode((self._directory / _GIVEN).read_bytes(), type=Given)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def files(self, *parts: str) -> Mapping[str, bytes]:
        """All of `parts`: "PART/PATH" -> content."""
        paths = (path for part in parts for path in (self._directory / part).rglob("*"))
        return {str(path.relative_to(self._directory)): path.read_bytes() for path in paths if path.is_file()}

    def holds(self, part: str, path: str, content: bytes) -> bool:
        target = self._directory.joinpath(part, *inner_path(path).parts)
        return target.is_file() and target.read_bytes() == content

    def write(self, part: str, path: str, content: bytes, mode: int = 0o400) -> bool:
        """Whole or not at all. Whether it changed. Raises StartError where it does not fit."""
        given = self.given()
        assert given is not None, "`make` comes first"
        if self.holds(part, path, content):
            return False
        target = self.part(part).joinpath(*inner_path(path).parts)
        try:
            for parent in reversed(target.relative_to(self._directory / part).parents[:-1]):
                (self._directory / part / parent).mkdir(mode=0o755, exist_ok=True)
            unfinished = target.with_name(f".{target.name}.new")
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chown(unfinished, given.owner, given.owner)
            unfinished.chmod(mode)
            unfinished.replace(target)
        except OSError as error:
            raise StartError(f"/{part}/{path}: {error.strerror}; all of a task's together may have {_BYTES}") from error
        return True

    def note(self, secrets: Mapping[SecretName, int]) -> None:
        given = self.given()
        assert given is not None, "`make` comes first"
        self._give(msgspec.structs.replace(given, secrets=secrets))

    def clear(self) -> None:
        """Nothing is left in it; the task has ended."""
        if self._directory.is_mount():
            for path in self._directory.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _give(self, given: Given) -> None:
        unfinished = self._directory / f"{_GIVEN}.new"
        unfinished.write_bytes(msgspec.json.encode(given))
        unfinished.chmod(0o600)
        unfinished.replace(self._directory / _GIVEN)


def guest_memory(run: Path, alloc: AllocId, task: TaskName) -> Path:
    """What its emulator shows a guest and no disk may hold: made with the task's memory, gone with it."""
    return run / BELONGINGS / alloc / task / _GUEST


def remove(directory: Path) -> None:
    """Of an allocation, or of all: unmounted and removed; gone already is fine."""
    mounts.unmount_below(directory)
    shutil.rmtree(directory, ignore_errors=True)


def inner_path(text: str) -> PurePosixPath:
    """Raises StartError for one that leads out."""
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise StartError(f"{text[:80]!r} is no path inside; write one without a leading / or ..")
    return path
