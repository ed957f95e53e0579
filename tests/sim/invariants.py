"""What must be true, whatever happens. Each raises BrokenError with what it saw."""

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from controller.core import table as columns
from controller.core import views
from controller.core.entries import JobEntry
from controller.core.records import Record
from controller.core.state import State
from outrider.ids import JobName, NodeId
from outrider.model.allocation import Allocation, AllocStatus
from outrider.model.fleet import RolloutState
from outrider.model.job import JobType
from outrider.model.node import NodeStatus
from tests.sim.host import Host
from tests.sim.kernel import BrokenError


def check_state(state: State) -> None:
    """No node over-committed, its accounts the sum of what is on it; no two that are to run are the same copy."""
    table, nodes = state.table, state.nodes
    for ref, node in enumerate(nodes.nodes):
        groups = [state.group_of(row) for row in state.node_rows(ref).tolist()]
        cpu = sum(entry.need.cpu_millis for entry in groups)
        memory = sum(entry.need.memory_bytes for entry in groups)
        if not nodes.cpu_free[ref] == node.fingerprint.cpu_millis - cpu >= 0:
            raise BrokenError(
                f"{node.id}: {cpu} of {node.fingerprint.cpu_millis} CPU taken, {nodes.cpu_free[ref]} free"
            )
        if not nodes.memory_free[ref] == node.fingerprint.memory_bytes - memory >= 0:
            raise BrokenError(f"{node.id}: {memory} bytes taken, {nodes.memory_free[ref]} free")
        serials = table.serial[state.node_rows(ref)].tolist()
        ports = [port for serial in serials for port in state.ports.get(serial, ())]
        ports += [port for entry in groups for port in entry.static_ports]
        if len(ports) != len(set(ports)):
            raise BrokenError(f"{node.id}: a port is given twice: {sorted(ports)}")
    size = table.size
    wanted = np.flatnonzero((table.status[:size] == columns.LIVE) & (table.desired[:size] == columns.RUN))
    names = [(*state.group_of(row).family, int(table.index[row]), int(table.role[row])) for row in wanted.tolist()]
    if len(names) != len(set(names)):
        raise BrokenError(f"a copy is to run twice: {sorted(name for name in names if names.count(name) > 1)}")


def check_replay(records: Iterable[Record], state: State) -> None:
    """The journal alone gives what the leader has; so does a snapshot of it."""
    replayed = State.empty(state.policy)
    for record in records:
        replayed.apply(record)
    compacted = State.empty(state.policy)
    for record in replayed.snapshot():
        compacted.apply(msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=type(record)))
    live = _packed(state)
    if _packed(replayed) != live:
        raise BrokenError("the journal's replay is not what the leader has")
    if _packed(compacted) != live:
        raise BrokenError("a snapshot's replay is not what the leader has")


def check_acknowledged(state: State, acknowledged: Mapping[str, int]) -> None:
    for job, version in acknowledged.items():
        entry = state.jobs.get(JobName(job))
        if entry is None or entry.latest < version:
            raise BrokenError(f"version {version} of {job} was acknowledged, and the new leader does not know it")


def check_converged(state: State, hosts: Mapping[NodeId, Host]) -> None:
    """Every job runs as it should, where it should, once; nothing else runs anywhere."""
    for node in views.node_states(state):
        if node.status is not NodeStatus.READY:
            raise BrokenError(f"node {node.node.id} is {node.status}: {node.reason}")
    expected: set[tuple[str, str]] = set()
    for name in state.jobs:
        for one in _check_job(state, name):
            assert one.node is not None
            expected.add((one.node, one.id))
            if not any(alloc == one.id for alloc, _ in hosts[NodeId(one.node)].running()):
                raise BrokenError(f"{one.id} of {name} should run on {one.node}, and nothing of it does")
    found = {(node, alloc) for node, host in hosts.items() for alloc, _ in host.running()}
    if orphans := found - expected:
        raise BrokenError(f"runs and should not: {sorted(orphans)}")


def _check_job(state: State, name: JobName) -> list[Allocation]:
    """Those that run."""
    status = views.job_status(state, name)
    assert status is not None
    entry = state.jobs[name]
    running = [one for one in status.allocations if one.status is AllocStatus.RUNNING]
    others = [one for one in status.allocations if one.status in _UNSETTLED]
    if others:
        told = [(one.id, str(one.status), one.reason, one.node) for one in others]
        raise BrokenError(f"{name} is still under way: {told}")
    group = entry.job.groups[0]
    if entry.stopped:
        if running:
            raise BrokenError(f"{name} is stopped and runs: {[one.id for one in running]}")
    elif entry.job.type is JobType.SERVICE:
        if len(running) not in _counts(entry) or not all(one.healthy for one in running):
            raise BrokenError(
                f"{name}: {len(running)} of {group.count} run, {sum(one.healthy for one in running)} healthy"
            )
        stale = {one.job_version for one in running} != {entry.latest}
        failed = entry.rollout is RolloutState.FAILED and (stale or entry.final)
        if entry.rollout not in _SETTLED and not failed and group.count:
            raise BrokenError(f"{name}: its rollout is {entry.rollout}: {entry.rollout_reason}")
    elif entry.job.type is JobType.SYSTEM and len(running) != len(state.nodes):
        raise BrokenError(f"{name} runs on {len(running)} of {len(state.nodes)} nodes")
    return running


def _counts(entry: JobEntry) -> set[int]:
    """What may be: where canaries were not promoted the count of the version before holds."""
    counts = {entry.job.groups[0].count}
    if entry.rollout is RolloutState.FAILED and entry.base:
        counts.add(entry.versions[entry.base].job.groups[0].count)
    return counts


_UNSETTLED = frozenset({AllocStatus.PENDING, AllocStatus.STARTING, AllocStatus.STOPPING})
_SETTLED = frozenset({RolloutState.SUCCESSFUL})


def _packed(state: State) -> bytes:
    return msgspec.msgpack.encode(list(state.snapshot()))
