"""Volumes: where they are, who has them, whether a group may have them. Owns these questions; changes nothing.

The scheduler asks `where`; `State` keeps who has what (`VolumeEntry.claims`), by serial, from placement to end.
"""

from dataclasses import dataclass

import numpy as np

from controller.core.groups import GroupEntry, VolumeKey
from controller.core.state import State
from controller.core.stored import VolumeEntry
from controller.core.table import Bools
from outrider.ids import DEFAULT_NAMESPACE, JobName, NodeId
from outrider.model.belongings import Access, Volume, VolumeInfo
from outrider.model.job import Group, Job, JobType, is_guest


@dataclass(slots=True)
class Where:
    """Where the volumes of a group let it be placed now."""

    allowed: Bools | None = None  # None: anywhere
    reason: str = ""  # why nowhere
    note: str = ""  # for whoever wonders why nowhere else


def where(state: State, group: GroupEntry, claimed: set[VolumeKey]) -> Where:
    """`claimed`: volumes for one allocation that the plan in the making has given away."""
    found = Where()
    for key in group.volumes:
        entry = state.stored.volumes.get(key)
        if entry is None:
            return Where(reason=f"volume {key[1]} was deleted; `outrider volume create` makes it")
        volume = entry.volume
        if volume.access is Access.SINGLE and (entry.claims or key in claimed):
            holder = next(iter(entry.claims), None)
            whose = f"allocation {state.alloc_id(holder)}" if holder is not None else "another allocation"
            return Where(reason=f"volume {volume.name} is for one at a time: {whose} has it")
        here = np.zeros(len(state.nodes), np.bool_)
        ref = state.nodes.reference.get(volume.node)
        if ref is not None:
            here[ref] = True
        found.allowed = here if found.allowed is None else found.allowed & here
        found.note = f"volume {volume.name} is on {volume.node}"
    return found


def single(state: State, group: GroupEntry) -> set[VolumeKey]:
    """Those of its volumes that one allocation alone may have."""
    return {
        key
        for key in group.volumes
        if (entry := state.stored.volumes.get(key)) is not None and entry.volume.access is Access.SINGLE
    }


def refusal(state: State, job: Job) -> str:
    """Why `job` cannot have the volumes that it names; "" where it can."""
    for group in job.groups:
        nodes = {}
        for task in group.tasks:
            for use in task.volumes:
                at = f"group {group.name}: task {task.name}"
                entry = state.stored.volumes.get((job.namespace, use.volume))
                if entry is None:
                    flag = "" if job.namespace == DEFAULT_NAMESPACE else f" --namespace {job.namespace}"
                    made = f"`outrider volume create {use.volume}{flag} --size 1Gi` makes it"
                    return f"{at}: no volume {use.volume!r} in namespace {job.namespace}; {made}"
                volume = entry.volume
                nodes[volume.node] = volume.name
                if problem := _unfit(job, group, volume, vm=is_guest(task)):
                    return f"{at}: {problem}"
        if len(nodes) > 1:
            each = ", ".join(f"{name} on {node}" for node, name in sorted(nodes.items()))
            return f"group {group.name}: its volumes are on different nodes: {each}"
    return ""


def holders(state: State, entry: VolumeEntry) -> tuple[JobName, ...]:
    """Jobs that are not stopped and name it in their newest version."""
    volume = entry.volume
    return tuple(
        name
        for name, job in sorted(state.jobs.items())
        if not job.stopped
        and job.job.namespace == volume.namespace
        and any(use.volume == volume.name for group in job.job.groups for task in group.tasks for use in task.volumes)
    )


def of_group(state: State, group: GroupEntry) -> tuple[Volume, ...]:
    """For its agent."""
    return tuple(state.stored.volumes[key].volume for key in group.volumes if key in state.stored.volumes)


def roomiest(state: State, size_bytes: int) -> NodeId:
    """The ready node with the most room for one. "" where none has enough."""
    size = len(state.nodes)
    free = np.where(state.ready_nodes[:size], state.nodes.disk_free[:size], -1)
    ref = int(np.argmax(free)) if size else -1
    return state.nodes.nodes[ref].id if ref >= 0 and free[ref] >= size_bytes else NodeId("")


def info(state: State, entry: VolumeEntry) -> VolumeInfo:
    return VolumeInfo(
        volume=entry.volume,
        created_at_s=entry.created_at_s,
        snapshots=tuple(entry.snapshots.values()),
        allocations=tuple(state.alloc_id(serial) for serial in sorted(entry.claims)),
        jobs=holders(state, entry),
    )


def _unfit(job: Job, group: Group, volume: Volume, *, vm: bool) -> str:
    if job.type is JobType.SYSTEM:
        return f"volume {volume.name} is on {volume.node} alone, and a system job runs on every node"
    if volume.access is Access.SINGLE and group.count > 1:
        return (
            f"volume {volume.name} is for one allocation at a time, and the group has several copies; "
            "make it with `--access many`, or let count be 1"
        )
    if vm and volume.path:
        return f"volume {volume.name} is a directory of its node, and a vm takes disks; make one without --path"
    if vm and volume.access is Access.MANY:
        return f"volume {volume.name} is for many at a time, and a vm must have its disk alone"
    return ""
