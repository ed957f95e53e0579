"""Device files of this node, by the names under which jobs count them; and what capabilities it lets tasks have.

    RUN/devices/NAME/INDEX    the allocation that has this one; the INDEX-th file that the configuration lists

Owns these claims. The controller counts; this says which.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from agent.sandbox.spec import Device, StartError
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.job import Task


class Devices:
    """`files`: name -> one character device each. `capabilities`: those that a task may ask for here."""

    def __init__(self, *, run: Path, files: Mapping[str, tuple[Path, ...]], capabilities: tuple[str, ...]) -> None:
        self._run = run / "devices"
        self._files = files
        self._capabilities = frozenset(capabilities)

    def give(self, alloc: AllocId, task: Task) -> tuple[Device, ...]:
        """Those that the task asks for; the same again where it has them. Raises StartError and HostError."""
        denied = [name for name in task.capabilities if name not in self._capabilities]
        if denied:
            message = f"capabilities: this node does not let a task have {', '.join(denied)}"
            raise StartError(f"{message}; its configuration says which under `capabilities`")
        found: list[Device] = []
        for name, count in sorted(task.resources.devices.items()):
            paths = self._files.get(name, ())
            if paths:
                owner = f"{alloc} {task.name}"
                found += [_device(paths[index]) for index in self._claim(name, count, owner, len(paths))]
        return tuple(found)

    def release(self, alloc: AllocId) -> None:
        for claim in self._run.glob("*/*"):
            if claim.read_text().split(" ")[0] == alloc:
                claim.unlink(missing_ok=True)

    def _claim(self, name: str, count: int, owner: str, there_are: int) -> list[int]:
        directory = self._run / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owners = {int(path.name): path.read_text() for path in directory.iterdir()}
        free = [index for index in range(there_are) if owners.get(index, owner) == owner]
        chosen = sorted(free, key=lambda index: owners.get(index) != owner)[:count]
        if len(chosen) < count:
            # The controller has counted: whoever had them is still being cleaned away.
            raise HostError(f"device {name}", step=f"{count} are wanted, {len(chosen)} of {there_are} are free")
        for index in chosen:
            (directory / str(index)).write_text(owner)
        return chosen


def _device(path: Path) -> Device:
    try:
        status = path.stat()
    except OSError as error:
        raise HostError(str(path), step=f"look at the device: {error.strerror}") from error
    if not stat.S_ISCHR(status.st_mode):
        raise HostError(str(path), step="it is no character device", hint="mend `device_files` of the configuration")
    inside = path.relative_to("/dev") if path.is_relative_to("/dev") else Path(path.name)
    return Device(name=str(inside), major=os.major(status.st_rdev), minor=os.minor(status.st_rdev))
