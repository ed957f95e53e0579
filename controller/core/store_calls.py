"""Operators' calls about what the fleet keeps apart from jobs: what each changes, and why one is refused.

Owns the answers; writes nothing itself.
"""

from typing import assert_never

import msgspec
import numpy as np

from controller.core import sealed, volumes
from controller.core import table as columns
from controller.core.commands import Reply
from controller.core.events import (
    SecretDeleteRequested,
    SecretPutRequested,
    SecretsResealed,
    StoreCalls,
    VolumeDeleteRequested,
    VolumeMade,
    VolumeSnapshotMade,
)
from controller.core.records import Record, SecretDeleted, SecretPut, VolumeCreated, VolumeDeleted, VolumeSnapshotted
from controller.core.state import State
from controller.core.submit import Answer, added, versions_dropped
from outrider.ids import JobName, Namespace, SecretName
from outrider.model.belongings import VolumeSnapshot

VERSIONS_KEPT = 5
SECRETS_MAX = 10_000


def answer(state: State, call: StoreCalls, now_s: float) -> Answer:
    """The records that the call needs, and the reply for when the journal has them."""
    match call:
        case SecretPutRequested():
            return _put(state, call, now_s)
        case SecretDeleteRequested():
            return _delete(state, call)
        case SecretsResealed():
            return _reseal(state, call)
        case VolumeMade():
            return _volume_made(state, call, now_s)
        case VolumeDeleteRequested():
            return _volume_deleted(state, call)
        case VolumeSnapshotMade():
            return _snapshot_made(state, call, now_s)
        case _:
            assert_never(call)


def _volume_made(state: State, call: VolumeMade, now_s: float) -> Answer:
    volume = call.volume
    if (volume.namespace, volume.name) in state.stored.volumes:
        message = f"volume {volume.name} is there already, in namespace {volume.namespace}; take another name"
        return (), Reply(request=call.request, code="conflict", message=message)
    if volume.node not in state.nodes.reference:
        message = f"no node {volume.node!r}; `outrider node ls` lists them"
        return (), Reply(request=call.request, code="not-found", message=message)
    return (VolumeCreated(volume=volume, at_s=now_s),), Reply(request=call.request, changed=True)


def _volume_deleted(state: State, call: VolumeDeleteRequested) -> Answer:
    """Refused while an allocation has it, or a job that is not stopped names it."""
    entry = state.stored.volumes.get((call.namespace, call.name))
    if entry is None:
        return (), _no_volume(call)
    jobs = volumes.holders(state, entry)
    if entry.claims or jobs:
        allocs = ", ".join(state.alloc_id(serial) for serial in sorted(entry.claims)[:10])
        whose = f"allocation {allocs} has it" if allocs else f"job {', '.join(jobs[:10])} names it"
        message = f"volume {call.name} is claimed: {whose}; stop what uses it first"
        return (), Reply(request=call.request, code="in-use", message=message)
    return (VolumeDeleted(namespace=call.namespace, name=call.name),), Reply(request=call.request, changed=True)


def _snapshot_made(state: State, call: VolumeSnapshotMade, now_s: float) -> Answer:
    if (call.namespace, call.name) not in state.stored.volumes:
        return (), _no_volume(call)
    snapshot = VolumeSnapshot(name=call.snapshot, at_s=now_s, bytes=call.bytes)
    record = VolumeSnapshotted(namespace=call.namespace, name=call.name, snapshot=snapshot, removed=call.removed)
    return (record,), Reply(request=call.request, changed=True)


def _no_volume(call: VolumeDeleteRequested | VolumeSnapshotMade) -> Reply:
    message = f"no volume {call.name[:80]!r} in namespace {call.namespace[:80]}; `outrider volume ls` lists them"
    return Reply(request=call.request, code="not-found", message=message)


def _put(state: State, call: SecretPutRequested, now_s: float) -> Answer:
    """The next version, and a new version of every job that wants to be rolled for it."""
    entry = state.stored.secrets.get((call.namespace, call.name))
    if entry is None and len(state.stored.secrets) >= SECRETS_MAX:
        message = f"the fleet keeps {SECRETS_MAX} secrets already; `outrider secret delete` what nobody names"
        return (), Reply(request=call.request, code="too-many", message=message)
    if entry is not None and entry.variable is not call.variable:
        there, wanted = ("variable", "secret") if entry.variable else ("secret", "variable")
        message = f"{call.name} is a {there}; delete it before it becomes a {wanted}, or take another name"
        return (), Reply(request=call.request, code="conflict", message=message)
    version = entry.latest + 1 if entry is not None else 1
    record = SecretPut(
        namespace=call.namespace,
        name=call.name,
        version=version,
        sealed=call.sealed,
        variable=call.variable,
        at_s=now_s,
        dropped=_dropped(state, call.namespace, call.name),
    )
    records: list[Record] = [record]
    notes = []
    for job in sealed.naming(state, call.namespace, call.name):
        old = state.jobs[job]
        rolled = sealed.restamped(state, old.job, {(call.namespace, call.name): version})
        if rolled != old.job and old.job.parent is None:  # what was launched has what there was then
            records.extend(added(state, rolled, old.latest + 1, now_s))
            records.extend(versions_dropped(state, old, job))
            notes.append(f"job {job} is rolled: version {old.latest + 1}")
    return tuple(records), Reply(request=call.request, version=version, changed=True, warnings=tuple(notes))


def _delete(state: State, call: SecretDeleteRequested) -> Answer:
    """Refused while a job that is not stopped, or an allocation that is not over, names it."""
    if (call.namespace, call.name) not in state.stored.secrets:
        message = f"no secret {call.name[:80]!r} in namespace {call.namespace[:80]}; `outrider secret ls` lists them"
        return (), Reply(request=call.request, code="not-found", message=message)
    jobs = {*sealed.naming(state, call.namespace, call.name), *_running_with(state, call.namespace, call.name)}
    if jobs:
        message = f"secret {call.name} is named by job {', '.join(sorted(jobs)[:10])}; stop it, or have it name another"
        return (), Reply(request=call.request, code="in-use", message=message)
    return (SecretDeleted(namespace=call.namespace, name=call.name),), Reply(request=call.request, changed=True)


def _reseal(state: State, call: SecretsResealed) -> Answer:
    """What was dropped meanwhile stays dropped."""
    records = [
        msgspec.structs.replace(kept, sealed=content)
        for namespace, name, version, content in call.sealed
        if (entry := state.stored.secrets.get((namespace, name))) is not None
        and (kept := entry.versions.get(version)) is not None
    ]
    return tuple(records), Reply(request=call.request, version=len(records), changed=bool(records))


def _running_with(state: State, namespace: Namespace, name: SecretName) -> set[JobName]:
    table = state.table
    keys = table.group[: table.size][table.status[: table.size] == columns.LIVE]
    groups = (state.groups[key] for key in np.unique(keys).tolist())
    return {
        group.job
        for group in groups
        if state.jobs[group.job].job.namespace == namespace
        and any(use.name == name for use in sealed.uses(group.group))
    }


def _dropped(state: State, namespace: Namespace, name: SecretName) -> tuple[int, ...]:
    """The oldest beyond those kept, unless a kept version of a job names it: it may be run again."""
    entry = state.stored.secrets.get((namespace, name))
    excess = len(entry.versions) + 1 - VERSIONS_KEPT if entry is not None else 0
    if entry is None or excess <= 0:
        return ()
    named: set[int] = set()
    for job in state.jobs.values():
        for version in job.versions.values():
            for group in version.job.groups if version.job.namespace == namespace else ():
                named.add(group.secrets.get(name, 0))
                named.update(use.version for use in sealed.uses(group) if use.name == name and use.version is not None)
    return tuple(version for version in sorted(entry.versions) if version not in named)[:excess]
