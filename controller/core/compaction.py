"""The state as few records: the start of a compacted journal. Owns their order; what they mean is `State.apply`'s."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from controller.core import table as columns
from controller.core.entries import JobEntry
from controller.core.records import (
    AllocationsSnapshot,
    EpochBegun,
    JobLaunched,
    JobStopped,
    NodeDowned,
    NodeRegistered,
    NodeSteered,
    Record,
    RolloutSteered,
    VirtualAddressAssigned,
)
from outrider.ids import JobName
from outrider.model.fleet import RolloutAction

if TYPE_CHECKING:
    from controller.core.state import State


def snapshot(state: "State") -> Iterator[Record]:
    """Few records that make the same durable state: the start of a compacted journal. Equal for equal states."""
    yield EpochBegun(epoch=state.epoch, salt=state.salt)
    for ref, node in enumerate(state.nodes.nodes):
        yield NodeRegistered(node=node)
        if state.nodes.down[ref]:
            yield NodeDowned(node=node.id)
        if state.nodes.closed[ref]:
            yield NodeSteered(node=node.id, eligible=False, drain=state.nodes.drains.get(ref))
    for service, index in state.virtual.items():
        yield VirtualAddressAssigned(service=service, index=index)
    for name, entry in state.jobs.items():
        for version, added in entry.versions.items():
            yield added
            yield from _steered(name, version, entry)
            if version in entry.outcomes:
                yield entry.outcomes[version]
        if entry.launches or entry.fired_s:
            yield JobLaunched(job=name, number=entry.launches, fired_s=entry.fired_s)
        if entry.stopped:
            yield JobStopped(job=name)
    yield from state.stored.snapshot()
    yield from state.access.snapshot()
    yield from state.skipped
    yield _allocations(state)


def _steered(name: JobName, version: int, entry: JobEntry) -> Iterator[RolloutSteered]:
    """What operators said of the rollout of the newest version."""
    if version == entry.latest and entry.promoted:
        yield RolloutSteered(job=name, version=version, action=RolloutAction.PROMOTE)
    if version == entry.latest and entry.paused:
        yield RolloutSteered(job=name, version=version, action=RolloutAction.PAUSE)


def _allocations(state: "State") -> AllocationsSnapshot:
    kept = np.flatnonzero(state.table.status[: state.table.size] != columns.FORGOTTEN)
    used = sorted((state.groups[key].job, state.groups[key].version, state.groups[key].position, key)
                  for key in np.unique(state.table.group[kept]).tolist())  # fmt: skip
    packed = {name: getattr(state.table, name)[kept].tobytes() for name in columns.DURABLE if name != "group"}
    if used:
        positions = np.zeros(max(key for *_, key in used) + 1, np.int32)
        positions[[key for *_, key in used]] = np.arange(len(used))
        packed["group"] = positions[state.table.group[kept]].tobytes()
    else:
        packed["group"] = b""
    return AllocationsSnapshot(
        next_serial=state.next_serial,
        generation=state.generation,
        columns=packed,
        groups=tuple((job, version, position) for job, version, position, _ in used),
        ports=dict(sorted(state.ports.items())),
        reasons=dict(sorted(state.reasons.items())),
        reports=tuple(report for _, report in sorted(state.last_reports.items())),
        restarts=dict(sorted(state.restarts.items())),
        moves=dict(sorted(state.moves.items())),
    )
