"""What one allocation of a group takes from its node, sidecar and emulator included."""

from collections.abc import Mapping

from outrider.model.hugepages import counted
from outrider.model.job import EMULATOR, SIDECAR, SIDECAR_SHARE, Group, Resources, Task, TaskRole, has_guest, is_guest
from outrider.model.sidecar import SidecarKind


def group_resources(group: Group) -> Resources:
    """The sum, but for what init tasks give back."""
    parts = [_at_once(group.tasks)]
    if group.services:
        parts.append(SIDECAR_SHARE if group.sidecar is SidecarKind.SHARED else SIDECAR)
    if has_guest(group):
        parts.append(EMULATOR)
    return Resources(
        cpu_millis=sum(part.cpu_millis for part in parts),
        memory_bytes=sum(part.memory_bytes for part in parts),
        # A process has a directory and a /tmp; a guest has a disk.
        disk_bytes=sum((1 if is_guest(task) else 2) * task.resources.disk_bytes for task in group.tasks)
        + sum(disk.size_bytes for task in group.tasks for disk in task.sticky),
        pids_max=sum(part.pids_max for part in parts),
        devices=_devices(parts),
    )


def _at_once(tasks: tuple[Task, ...]) -> Resources:
    """The most that `tasks` have of each at a time: init tasks are over when the others begin."""
    first = [task.resources for task in tasks if task.role is TaskRole.INIT]
    then = [task.resources for task in tasks if task.role is not TaskRole.INIT]

    return Resources(
        cpu_millis=max(sum(part.cpu_millis for part in then), *(part.cpu_millis for part in first), 0),
        memory_bytes=max(sum(part.memory_bytes for part in then), *(part.memory_bytes for part in first), 0),
        pids_max=max(sum(part.pids_max for part in then), *(part.pids_max for part in first), 0),
        devices=_devices([*first, *then]),
    )


def _devices(parts: list[Resources]) -> Mapping[str, int]:
    """Hugepages among them: from here on each is one more thing to count."""
    counts: dict[str, int] = {}
    for part in parts:
        for name, count in (*part.devices.items(), *counted(part.hugepages).items()):
            counts[name] = counts.get(name, 0) + count
    return counts
