"""Sticky disks: what a task has written there is there again for the copy that takes its place on this node.

    RUN/sticky/JOB.GROUP.INDEX/holder       the allocation that has them; empty once it is cleaned
    RUN/sticky/JOB.GROUP.INDEX/TASK.NUMBER  a file system in memory, of the size that the job says
    RUN/sticky/JOB.GROUP.INDEX/TASK.NUMBER.owner   the first uid of the range that its files belong to

In memory, and gone with a reboot: whoever needs more takes a volume. Owns all of the above. One that nobody took up
again for an hour goes, whenever another allocation comes or goes.
"""

import os
import shutil
import time
from pathlib import Path

from agent.sandbox import mounts
from agent.sandbox.spec import UID_RANGE, Mount
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.allocation import Assignment
from outrider.model.job import Task

_KEPT_S = 3600.0
_HOLDER = "holder"


class StickyDisks:
    def __init__(self, run: Path) -> None:
        self._run = run / "sticky"

    def give(self, assignment: Assignment, task: Task, *, uid_first: int, user: int) -> tuple[Mount, ...]:
        """Before each start of the task. Raises HostError."""
        if not task.sticky:
            return ()
        directory = self._claimed(assignment)
        found = []
        try:
            for number, disk in enumerate(task.sticky):
                point = directory / f"{task.name}.{number}"
                owner = point.with_name(f"{point.name}.owner")
                if point.is_mount():
                    mounts.resize_tmpfs(point, size_bytes=disk.size_bytes)
                    _hand_over(point, int(owner.read_text()), uid_first)
                else:
                    point.mkdir(mode=0o700, exist_ok=True)
                    mounts.mount_tmpfs(point, size_bytes=disk.size_bytes, uid=uid_first + user, mode=0o755)
                owner.write_text(str(uid_first))
                found.append(Mount(source=str(point), target=disk.target, read_only=False))
        except OSError as error:
            raise HostError(str(directory), step=f"prepare the sticky disk: {error.strerror}") from error
        return tuple(found)

    def release(self, alloc: AllocId) -> None:
        """Nothing runs of it. What it leaves is for the next."""
        for holder in self._run.glob(f"*/{_HOLDER}"):
            if holder.read_text() == alloc:
                if holder.parent.name.endswith(f".{alloc}"):
                    _remove(holder.parent)
                else:
                    holder.write_text("")
        self._forget_old()

    def remove_all(self) -> None:
        _remove(self._run)

    def _claimed(self, assignment: Assignment) -> Path:
        """Where it runs beside the copy whose place it takes, it has disks of its own, which go with it."""
        self._forget_old()
        directory = self._run / f"{assignment.job}.{assignment.group.name}.{assignment.index}"
        holder = directory / _HOLDER
        if holder.exists() and holder.read_text() not in ("", assignment.alloc):
            directory = directory.with_name(f"{directory.name}.{assignment.alloc}")
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        (directory / _HOLDER).write_text(assignment.alloc)
        return directory

    def _forget_old(self) -> None:
        for holder in self._run.glob(f"*/{_HOLDER}"):
            if not holder.read_text() and holder.stat().st_mtime < time.time() - _KEPT_S:
                _remove(holder.parent)


def _remove(directory: Path) -> None:
    mounts.unmount_below(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _hand_over(root: Path, before: int, now: int) -> None:
    """Each file to the same user of another range. Nothing runs that could change the tree meanwhile."""
    if before == now:
        return
    paths = [str(root)]
    paths += (f"{at}/{name}" for at, names, files in os.walk(root) for name in (*names, *files))
    for path in paths:
        status = os.lstat(path)
        uid, gid = (
            id_ - before + now if 0 <= id_ - before < UID_RANGE else id_ for id_ in (status.st_uid, status.st_gid)
        )
        os.lchown(path, uid, gid)
