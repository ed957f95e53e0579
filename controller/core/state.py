"""The controller's state. Owns what is true after each record; never decides what to write next.

The durable part changes by `apply` alone. `live` is the volatile part: rebuilt from the agents after a restart.
"""

from collections.abc import Iterator
from typing import assert_never

import msgspec
import numpy as np

from controller.core import compaction
from controller.core import table as columns
from controller.core.access import Access
from controller.core.entries import JobEntry
from controller.core.groups import FamilyKey, GroupEntry, group_entry
from controller.core.nodes import NodeTable
from controller.core.policy import Policy
from controller.core.records import (
    AllocationsSnapshot,
    AllocSteered,
    AllocTransitions,
    EpochBegun,
    GroupScaled,
    JobForgotten,
    JobLaunched,
    JobStopped,
    JobVersionAdded,
    JobVersionsDropped,
    NodeDowned,
    NodeRegistered,
    NodeSteered,
    Plan,
    Record,
    RolloutEnded,
    RolloutSteered,
    SecretDeleted,
    SecretPut,
    SerialsSkipped,
    VirtualAddressAssigned,
    VolumeCreated,
    VolumeDeleted,
    VolumeSnapshotted,
)
from controller.core.stored import Stored
from controller.core.table import AllocTable, Bools, Ints, Shorts
from controller.core.volatile import NodeLink, Volatile
from outrider.ids import AllocId, JobName, Namespace, ServiceName, alloc_id, alloc_serial
from outrider.model.allocation import AllocAction, AllocReport, Generation
from outrider.model.fleet import RolloutAction, RolloutState
from outrider.model.job import JobType, Protocol

JobRecord = (
    JobVersionAdded
    | JobVersionsDropped
    | JobStopped
    | JobLaunched
    | JobForgotten
    | GroupScaled
    | RolloutEnded
    | RolloutSteered
)


class State:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.epoch = 0
        self.salt = 0
        self.generation = Generation()  # of the newest plan
        self.next_serial = 0
        self.skipped: tuple[SerialsSkipped, ...] = ()  # by restored snapshots
        self.jobs: dict[JobName, JobEntry] = {}
        self.groups: dict[int, GroupEntry] = {}
        self.group_keys: dict[tuple[JobName, int, int], int] = {}
        self.next_group_key = 0
        self.nodes = NodeTable()
        self.table = AllocTable()
        self.families: dict[FamilyKey, Ints] = {}  # serials of all that is not forgotten, ascending
        self.system_jobs: dict[JobName, None] = {}  # that are not stopped
        # Who provides a service: jobs that are not stopped, in their newest version.
        self.providers: dict[ServiceName, dict[JobName, Protocol]] = {}
        self.stored = Stored(self.nodes)
        self.dependents: dict[ServiceName, dict[JobName, None]] = {}  # who waits for a service, in the same way
        self.virtual: dict[ServiceName, int] = {}
        self.ports: dict[int, tuple[int, ...]] = {}  # mesh ports by serial; gone when the allocation ended
        self.moves: dict[int, int] = {}  # of guests, by serial: that which is to have it -> that which has it
        self.reasons: dict[int, str] = {}  # by serial: why it was stopped, or ended
        self.last_reports: dict[int, AllocReport] = {}  # of failed allocations
        # Who has a name, offered or only called by: jobs that are not stopped, in their newest version.
        self.service_owners: dict[ServiceName, dict[JobName, Namespace]] = {}
        self.guiding: dict[JobName, None] = {}  # of them those which say who may call, or where calls go
        self.access = Access()
        self.restarts: dict[int, int] = {}  # by serial: how often an operator asked for one
        self.live = Volatile()

    @classmethod
    def empty(cls, policy: Policy | None = None) -> "State":
        return cls(policy or Policy())

    @property
    def next_deadline_s(self) -> float | None:
        """When the edge must send a Tick, unless another event comes first."""
        if self.live.started_at_s is None:
            return 0.0  # the first step tells the mesh of what was replayed, and starts everybody's grace
        return self.live.timers.next_s

    def next_epoch(self, salt: int) -> EpochBegun:
        """What to append and apply after replay, before the first event. `salt` counts in the first epoch only."""
        return EpochBegun(epoch=self.epoch + 1, salt=self.salt if self.epoch else salt)

    @property
    def ready_nodes(self) -> Bools:
        """By reference: exactly the ready ones are watched for heartbeats."""
        return np.isfinite(self.live.heartbeat_s[: len(self.nodes)])

    @property
    def open_nodes(self) -> Bools:
        """By reference: those that get new work."""
        open_nodes: Bools = self.ready_nodes & ~self.nodes.closed[: len(self.nodes)]
        return open_nodes

    def alloc_id(self, serial: int) -> AllocId:
        return alloc_id(serial, self.salt)

    def serial(self, alloc: AllocId) -> int | None:
        """None for what cannot be an id."""
        try:
            return alloc_serial(alloc, self.salt)
        except ValueError:
            return None

    def group_of(self, row: int) -> GroupEntry:
        return self.groups[int(self.table.group[row])]

    def family_rows(self, family: FamilyKey) -> Ints:
        serials = self.families.get(family)
        return self.table.rows(serials) if serials is not None else np.zeros(0, np.int64)

    def node_rows(self, ref: int) -> Ints:
        """Allocations of the node that have not ended."""
        rows = np.sort(self.table.known(np.array(self.nodes.hosted[ref], np.int64)))
        live: Ints = rows[self.table.status[rows] == columns.LIVE]
        return live

    def current_groups(self, job: JobName) -> tuple[int, ...]:
        """Keys of the groups of the job's newest version. One that others are launched from runs none itself."""
        entry = self.jobs[job]
        if entry.job.is_template:
            return ()
        return tuple(self.group_keys[job, entry.latest, at] for at in range(len(entry.job.groups)))

    def apply(self, record: Record) -> None:
        """Make `record`, which the journal has, true."""
        match record:
            case EpochBegun():
                self.epoch, self.salt = record.epoch, record.salt
                self.generation = Generation(record.epoch, 0)
            case SerialsSkipped():
                self.next_serial = record.past
                self.skipped = (*self.skipped, record)
            case NodeRegistered() | NodeDowned() | NodeSteered():
                self._change_node(record)
            case (
                JobVersionAdded()
                | JobVersionsDropped()
                | JobStopped()
                | JobLaunched()
                | JobForgotten()
                | GroupScaled()
                | RolloutEnded()
                | RolloutSteered()
            ):
                self._change_job(record)
            case VirtualAddressAssigned():
                self.virtual[record.service] = record.index
            case SecretPut() | SecretDeleted() | VolumeCreated() | VolumeDeleted() | VolumeSnapshotted():
                self.stored.apply(record)
            case Plan():
                self._carry_out(record)
            case AllocSteered():
                self._steer(record)
            case AllocTransitions():
                self._end(np.frombuffer(record.serials, np.int64), record)
            case AllocationsSnapshot():
                self._restore(record)
            case _:
                self.access.apply(record)

    def snapshot(self) -> Iterator[Record]:
        """Few records that make the same durable state: the start of a compacted journal. Equal for equal states."""
        return compaction.snapshot(self)

    def _change_node(self, record: NodeRegistered | NodeDowned | NodeSteered) -> None:
        match record:
            case NodeRegistered():
                if self.nodes.register(record.node) == len(self.live.links):
                    self.live.links.append(NodeLink())
            case NodeDowned():
                self.nodes.down[self.nodes.reference[record.node]] = True
            case NodeSteered():
                self.nodes.steer(self.nodes.reference[record.node], eligible=record.eligible, drain=record.drain)
            case _:
                assert_never(record)

    def _change_job(self, record: JobRecord) -> None:
        match record:
            case JobVersionAdded():
                self._add_version(record)
            case JobVersionsDropped():
                self._drop_versions(record)
            case JobStopped():
                self._stop_job(record)
            case RolloutEnded():
                self._end_rollout(record)
            case GroupScaled():
                self._scale(record)
            case JobLaunched():
                entry = self.jobs[record.job]
                entry.launches, entry.fired_s = record.number, max(entry.fired_s, record.fired_s)
            case JobForgotten():
                self._forget_job(record.job)
            case RolloutSteered():
                self._steer_rollout(record)
            case _:
                assert_never(record)

    def _add_version(self, added: JobVersionAdded) -> None:
        job = added.job
        entry = self.jobs.setdefault(job.name, JobEntry())
        self._withdraw_provider(job.name)
        entry.versions[added.version] = added
        entry.latest = added.version
        entry.stopped = False
        entry.rollout, entry.rollout_reason = RolloutState.RUNNING, ""
        entry.final = entry.promoted = entry.paused = False
        if job.type is JobType.SYSTEM:
            self.system_jobs[job.name] = None
        for position in range(len(job.groups)):
            group = group_entry(job, added.version, position)
            key, self.next_group_key = self.next_group_key, self.next_group_key + 1
            self.group_keys[job.name, added.version, position] = key
            self.groups[key] = group
            if job.is_template:
                continue
            for service in group.group.services:
                self.service_owners.setdefault(service.name, {})[job.name] = job.namespace
                if service.port is not None:
                    self.providers.setdefault(service.name, {})[job.name] = service.protocol
            for needed in group.group.depends_on:
                self.dependents.setdefault(needed, {})[job.name] = None
        if job.parent in self.jobs:
            self.jobs[job.parent].children[job.name] = None
        services = (service for group in job.groups for service in group.services)
        if job.parent is None and any(service.allow or service.traffic for service in services):
            self.guiding[job.name] = None
        for wanted in job.groups:
            self._forget((job.name, wanted.name))

    def _drop_versions(self, record: JobVersionsDropped) -> None:
        entry = self.jobs[record.job]
        for version in record.versions:
            self._drop_groups(entry.versions.pop(version))
            entry.outcomes.pop(version, None)

    def _drop_groups(self, version: JobVersionAdded) -> None:
        for position in range(len(version.job.groups)):
            del self.groups[self.group_keys.pop((version.job.name, version.version, position))]

    def _scale(self, record: GroupScaled) -> None:
        """In the version itself: what a submission is compared with, and what a revert goes back to."""
        entry = self.jobs[record.job]
        added = entry.versions[entry.latest]
        groups = tuple(
            msgspec.structs.replace(group, count=record.count) if group.name == record.group else group
            for group in added.job.groups
        )
        job = msgspec.structs.replace(added.job, groups=groups)
        entry.versions[entry.latest] = msgspec.structs.replace(added, job=job)
        for position in range(len(groups)):
            key = self.group_keys[record.job, entry.latest, position]
            self.groups[key] = group_entry(job, entry.latest, position)

    def _forget_job(self, name: JobName) -> None:
        """Nothing of it lives."""
        self._withdraw_provider(name)
        entry = self.jobs.pop(name)
        families = {(name, group.name) for version in entry.versions.values() for group in version.job.groups}
        for family in families:
            rows = self.family_rows(family)
            assert (self.table.status[rows] != columns.LIVE).all(), f"{name} is over"
            self._forget_rows(family, rows)
            self.families.pop(family, None)
        for version in entry.versions.values():
            self._drop_groups(version)
        if entry.job.parent in self.jobs:
            self.jobs[entry.job.parent].children.pop(name, None)

    def _stop_job(self, record: JobStopped) -> None:
        entry = self.jobs[record.job]
        entry.stopped = True
        self.system_jobs.pop(record.job, None)
        self._withdraw_provider(record.job)
        if entry.rollout is RolloutState.RUNNING:
            entry.rollout = RolloutState.STOPPED

    def _withdraw_provider(self, job: JobName) -> None:
        entry = self.jobs[job]
        self.guiding.pop(job, None)
        for group in entry.job.groups if entry.versions else ():
            for service in group.services:
                for names in (self.providers, self.service_owners):
                    holders = names.get(service.name, {})
                    holders.pop(job, None)
                    if not holders:
                        names.pop(service.name, None)
            for needed in group.depends_on:
                dependents = self.dependents.get(needed, {})
                dependents.pop(job, None)
                if not dependents:
                    self.dependents.pop(needed, None)

    def _end_rollout(self, record: RolloutEnded) -> None:
        entry = self.jobs[record.job]
        entry.outcomes[record.version] = record
        if record.state is RolloutState.SUCCESSFUL:
            entry.good_version = record.version
        if record.version == entry.latest:
            entry.rollout, entry.rollout_reason = record.state, record.reason
            entry.final, entry.paused = record.final, False

    def _steer_rollout(self, record: RolloutSteered) -> None:
        entry = self.jobs[record.job]
        if record.version != entry.latest:
            return  # of a version that was replaced in the same batch
        if record.action is RolloutAction.PROMOTE:
            entry.promoted = True
        else:
            entry.paused = record.action is RolloutAction.PAUSE

    def _steer(self, record: AllocSteered) -> None:
        if record.action is AllocAction.STOP:
            self._stop(np.array([record.serial], np.int64), "stopped by an operator", record.at_s)
        else:
            self.restarts[record.serial] = self.restarts.get(record.serial, 0) + 1

    def _carry_out(self, plan: Plan) -> None:
        self.generation = plan.generation
        for run in plan.runs:
            key = self.group_keys[run.job, run.version, run.group]
            nodes = np.frombuffer(run.nodes, np.int32)
            self.table.add(run.first_serial, key, run.first_index, nodes, plan.at_s, run.role)
            serials = np.arange(run.first_serial, run.first_serial + len(nodes), dtype=np.int64)
            self.next_serial = run.first_serial + len(nodes)
            family = self.groups[key].family
            before = self.families.get(family)
            self.families[family] = serials if before is None else np.concatenate([before, serials])
            self._place(key, serials, nodes, run.ports)
        for late in plan.late:
            serials = np.frombuffer(late.serials, np.int64)
            nodes = np.frombuffer(late.nodes, np.int32)
            rows = self.table.rows(serials)
            self.table.node[rows] = nodes
            self.table.changed_s[rows] = plan.at_s
            self._place(int(self.table.group[rows[0]]), serials, nodes, late.ports)
        for update in plan.updates:
            rows = self.table.rows(np.frombuffer(update.serials, np.int64))
            self.table.group[rows] = self.group_keys[update.job, update.version, update.group]
        self.table.role[self.table.rows(np.frombuffer(plan.settled, np.int64))] = columns.ORDINARY
        self.moves.update({new: old for old, new in plan.moves})
        for stop in plan.stops:
            self._stop(np.frombuffer(stop.serials, np.int64), stop.reason, plan.at_s)

    def _end_moves(self, serials: list[int]) -> None:
        """Of a move, one end is told to stop or has ended: the other is an allocation like any."""
        if self.moves:
            gone = set(serials)
            self.moves = {new: old for new, old in self.moves.items() if new not in gone and old not in gone}

    def _place(self, key: int, serials: Ints, nodes: Shorts, ports: bytes) -> None:
        """Account what was placed. `nodes` may hold -1; then its ports are 0."""
        group = self.groups[key]
        self.nodes.take(nodes[nodes >= 0], serials[nodes >= 0], group)
        if group.volumes:
            self.stored.claim(group, serials[nodes >= 0].tolist())
        width = group.ports_width
        if width:
            given = np.frombuffer(ports, np.int32).reshape(len(nodes), width).tolist()
            for serial, ref, mesh_ports in zip(serials.tolist(), nodes.tolist(), given, strict=True):
                if ref >= 0:
                    self.ports[serial] = tuple(mesh_ports)
        if width or group.static_ports or group.group.services:
            for serial, ref in zip(serials.tolist(), nodes.tolist(), strict=True):
                if ref >= 0:
                    for port in (*self.ports.get(serial, ()), *group.static_ports):
                        self.nodes.take_port(ref, port)
                    if group.group.services:
                        self.nodes.serving[ref].add(serial)

    def _stop(self, serials: Ints, reason: str, at_s: float) -> None:
        self._end_moves(serials.tolist())
        rows = self.table.rows(serials)
        self.table.desired[rows] = columns.STOP
        self.table.changed_s[rows] = at_s
        self.reasons.update(dict.fromkeys(serials.tolist(), reason))
        unplaced = rows[self.table.node[rows] < 0]  # nothing runs: nothing to wait for
        if len(unplaced):
            self.table.status[unplaced] = columns.COMPLETE
            for family in {self.groups[key].family for key in np.unique(self.table.group[unplaced]).tolist()}:
                self._forget(family)
                self.live.perhaps_over[family[0]] = None

    def _end(self, serials: Ints, record: AllocTransitions) -> None:
        self._end_moves(serials.tolist())
        rows = self.table.rows(serials)
        self.table.status[rows] = columns.ENDED_CODES[record.status]
        self.table.changed_s[rows] = record.at_s
        if record.reason:
            self.reasons.update(dict.fromkeys(serials.tolist(), record.reason))
        for report in record.reports:
            self.last_reports[alloc_serial(report.alloc, self.salt)] = report
        keys = self.table.group[rows]
        for key in np.unique(keys).tolist():
            self._release(key, rows[keys == key])
        for family in {self.groups[key].family for key in np.unique(keys).tolist()}:
            self._forget(family)

    def _release(self, key: int, rows: Ints) -> None:
        group = self.groups[key]
        placed = rows[self.table.node[rows] >= 0]
        nodes = self.table.node[placed]
        for ref in self.nodes.release(nodes, group):
            self.nodes.host_only(ref, self.table.serial[self.node_rows(ref)])
        if group.volumes:
            self.stored.release(group, self.table.serial[placed].tolist())
        if group.group.services or group.ports_width or group.static_ports:
            for serial, ref in zip(self.table.serial[placed].tolist(), nodes.tolist(), strict=True):
                for port in (*self.ports.pop(serial, ()), *group.static_ports):
                    self.nodes.release_port(ref, port)
                self.nodes.serving[ref].discard(serial)

    def _forget(self, family: FamilyKey) -> None:
        """Keep the newest few of those that ended. Of a batch job all since its submission: its result."""
        if len(self.families.get(family, ())) <= self.policy.ended_kept:
            return
        rows = self.family_rows(family)
        ended = rows[self.table.status[rows] != columns.LIVE]
        entry = self.jobs[family[0]]
        if entry.job.type is JobType.BATCH and not entry.stopped:
            submitted_s = entry.versions[entry.latest].submitted_at_s
            ended = ended[self.table.changed_s[ended] < submitted_s]
        excess = len(ended) - self.policy.ended_kept
        if excess <= 0:
            return
        self._forget_rows(family, ended[np.argsort(self.table.changed_s[ended], kind="stable")[:excess]])

    def _forget_rows(self, family: FamilyKey, rows: Ints) -> None:
        gone = self.table.serial[rows]
        if len(gone):
            self.families[family] = np.setdiff1d(self.families[family], gone, assume_unique=True)
        for serial in gone.tolist():
            self.reasons.pop(serial, None)
            self.last_reports.pop(serial, None)
            self.restarts.pop(serial, None)
            self.live.forget_report(serial)
        self.table.forget(rows)

    def _restore(self, record: AllocationsSnapshot) -> None:
        self.next_serial, self.generation = record.next_serial, record.generation
        self.ports.update(record.ports)
        self.restarts.update(record.restarts)
        self.moves.update(record.moves)
        self.reasons.update(record.reasons)
        self.last_reports.update({alloc_serial(report.alloc, self.salt): report for report in record.reports})
        keys = np.array([self.group_keys[group] for group in record.groups], np.int32)
        group = keys[np.frombuffer(record.columns["group"], np.int32)] if len(keys) else keys
        self.table.restore({**record.columns, "group": group.tobytes()})
        size = self.table.size
        for key in np.unique(group).tolist():
            rows = np.flatnonzero(self.table.group[:size] == key)
            family = self.groups[key].family
            before = self.families.get(family, np.zeros(0, np.int64))
            self.families[family] = np.sort(np.concatenate([before, self.table.serial[rows]]))
            live = rows[self.table.status[rows] == columns.LIVE]
            ports = [self.ports.get(serial, (0,) * self.groups[key].ports_width)
                     for serial in self.table.serial[live].tolist()]  # fmt: skip
            packed = np.array(ports, np.int32).tobytes()
            self._place(key, self.table.serial[live], self.table.node[live], packed)
