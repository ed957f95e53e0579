"""A task's own directory: of limited size, writable by its workload alone, with the job's `files:` in it.

An edge. Owns the directory and a mark beside it. Writes only before the workload has ever run: later the workload could
have put links there for the agent, which is root, to follow.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from agent.sandbox import mounts
from outrider.errors import InputError
from outrider.model.job import File


def prepare(directory: Path, *, files: Iterable[File], size_bytes: int, owner: int) -> None:
    """Make `directory` and fill it; what a restarted task left there is kept. `owner`: the host's uid, and gid.

    Raises InputError for a path outside of it, or files that do not fit; HostError where the host refuses the mount.
    """
    mark = directory.with_name(f"{directory.name}.filled")
    if directory.is_mount() and mark.exists():
        return
    paths = [(safe_path(file.path), file) for file in files]
    mark.unlink(missing_ok=True)
    mounts.unmount(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mounts.mount_tmpfs(directory, size_bytes=size_bytes, uid=owner, mode=0o755)
    for path, file in paths:
        try:
            _write(directory, path, file, owner)
        except OSError as error:
            mounts.unmount(directory)
            raise InputError(f"files: {file.path}: {error.strerror} (the task's disk is {size_bytes} bytes)") from error
    mark.touch()


def remove(directory: Path) -> None:
    """Unmount all that is mounted at or below `directory`, and remove it; gone already is fine."""
    mounts.unmount_below(directory)
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
    directory.with_name(f"{directory.name}.filled").unlink(missing_ok=True)


def safe_path(text: str) -> PurePosixPath:
    """`text` as a path below the task's directory. Raises InputError for any other."""
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise InputError(f"files: {text!r} is no path inside the task's directory; write one without a leading / or ..")
    return path


def _write(directory: Path, path: PurePosixPath, file: File, owner: int) -> None:
    parent = directory
    for part in path.parts[:-1]:
        parent /= part
        if not parent.exists():
            parent.mkdir(mode=0o755)
            os.chown(parent, owner, owner)
    target = parent / path.name
    target.write_bytes(file.content)
    target.chmod(file.mode & 0o777)
    os.chown(target, owner, owner)
