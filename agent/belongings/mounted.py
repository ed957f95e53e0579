"""Trees of this node shown to one sandbox, their owners as its own: RUN/mounted/ALLOC/TASK/NAME.

Owns these mounts, which stay until their allocation is cleaned; nothing of what they show.
"""

import asyncio
import shutil
from pathlib import Path

from agent.sandbox import idmap, mounts
from agent.sandbox.spec import UID_RANGE
from outrider.ids import AllocId, TaskName


class Mounted:
    def __init__(self, run: Path) -> None:
        self._directory = run / "mounted"

    async def show(self, source: Path, alloc: AllocId, task: TaskName, name: str, *, uid_first: int) -> str:
        """A file or a directory, at the path that is returned; an earlier one of that name goes. Raises HostError."""
        return await asyncio.to_thread(self._show, source, self._directory / alloc / task / name, uid_first)

    def release(self, alloc: AllocId) -> None:
        _remove(self._directory / alloc)

    def remove_all(self) -> None:
        _remove(self._directory)

    def _show(self, source: Path, point: Path, uid_first: int) -> str:
        mounts.unmount(point)
        if source.is_dir():
            point.mkdir(mode=0o711, parents=True, exist_ok=True)
        else:
            point.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            point.touch()
        idmap.bind(source, point, uid_first=uid_first, uids=UID_RANGE)
        return str(point)


def _remove(directory: Path) -> None:
    mounts.unmount_below(directory)
    shutil.rmtree(directory, ignore_errors=True)
