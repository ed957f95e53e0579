"""Secrets and variables: which version who is to have, and who names them.

Owns these questions; what is inside is sealed and means nothing here (`controller.keyring`). Changes nothing.
"""

from collections.abc import Iterator, Mapping

import msgspec

from controller.core import table as columns
from controller.core.records import SecretPut
from controller.core.state import State
from outrider.ids import DEFAULT_NAMESPACE, AllocId, JobName, Namespace, NodeId, SecretName
from outrider.model.belongings import OnChange, SecretInfo, SecretUse
from outrider.model.job import Group, Job


def stamped(state: State, job: Job) -> Job:
    """`job` as it is rolled out now: each group with the versions of the secrets that it is to be rolled for."""
    return restamped(state, job, {})


def refusal(state: State, job: Job) -> str:
    """Why `job` cannot have the secrets that it names; "" where it can."""
    for group in job.groups:
        for whose, use in _named(group):
            entry = state.stored.secrets.get((job.namespace, use.name))
            where = f"group {group.name}: {whose}"
            if entry is None:
                return f"{where}: {_missing(job.namespace, use.name)}"
            if use.version is not None and use.version not in entry.versions:
                kept = ", ".join(map(str, sorted(entry.versions)))
                return f"{where}: secret {use.name} has no version {use.version} any more; kept are {kept}"
    return ""


def delivered(state: State, namespace: Namespace, group: Group) -> dict[SecretName, int]:
    """Which version of each secret an allocation of `group` is to have now."""
    return {
        use.name: use.version or group.secrets.get(use.name) or entry.latest
        for use in uses(group)
        if (entry := state.stored.secrets.get((namespace, use.name))) is not None
    }


def held_by(state: State, node: NodeId, alloc: AllocId) -> tuple[SecretPut, ...] | None:
    """What the allocation is to have; None unless it is placed on `node`, and told to run."""
    serial = state.serial(alloc)
    row = state.table.row(serial) if serial is not None else None
    if row is None or state.nodes.reference.get(node) != int(state.table.node[row]):
        return None
    if state.table.status[row] != columns.LIVE or state.table.desired[row] != columns.RUN:
        return None
    group = state.group_of(row)
    namespace = state.jobs[group.job].job.namespace
    wanted = delivered(state, namespace, group.group)
    entries = ((state.stored.secrets[namespace, name], version) for name, version in sorted(wanted.items()))
    return tuple(put for entry, version in entries if (put := entry.versions.get(version)) is not None)


def told(state: State, record: SecretPut) -> None:
    """Applied: agents whose tasks have it without being rolled hear of the new version."""
    for job in naming(state, record.namespace, record.name):
        for group in state.jobs[job].job.groups:
            if not any(use.name == record.name and use.on_change is not OnChange.ROLL for use in uses(group)):
                continue
            rows = state.family_rows((job, group.name))
            for row in rows[(state.table.status[rows] == columns.LIVE) & (state.table.node[rows] >= 0)].tolist():
                state.live.to(int(state.table.node[row])).serials[int(state.table.serial[row])] = None


def infos(state: State, namespace: str) -> tuple[SecretInfo, ...]:
    """What operators may see; what variables hold is the edge's to add. "" is every namespace."""
    return tuple(
        SecretInfo(
            name=name,
            namespace=space,
            version=entry.latest,
            versions=tuple(sorted(entry.versions)),
            variable=entry.variable,
            changed_at_s=entry.versions[entry.latest].at_s,
            jobs=tuple(sorted(naming(state, space, name))),
        )
        for (space, name), entry in sorted(state.stored.secrets.items())
        if namespace in ("", space)
    )


def _missing(namespace: Namespace, name: SecretName) -> str:
    # That another namespace has one of this name is nobody's business here.
    flag = "" if namespace == DEFAULT_NAMESPACE else f" --namespace {namespace}"
    return f"no secret {name!r} in namespace {namespace}; `outrider secret put {name}{flag}` makes it"


def restamped(state: State, job: Job, newer: Mapping[tuple[Namespace, SecretName], int]) -> Job:
    """`newer`: versions that are about to be written."""

    def version(use: SecretUse) -> int:
        key = (job.namespace, use.name)
        entry = state.stored.secrets.get(key)
        return newer.get(key) or (entry.latest if entry is not None else 0)

    groups = tuple(
        msgspec.structs.replace(
            group,
            secrets={
                use.name: version(use)
                for use in uses(group)
                if use.on_change is OnChange.ROLL and use.version is None and version(use)
            },
        )
        for group in job.groups
    )
    return msgspec.structs.replace(job, groups=groups)


def uses(group: Group) -> Iterator[SecretUse]:
    return (use for _, use in _named(group))


def _named(group: Group) -> Iterator[tuple[str, SecretUse]]:
    """With whose they are, for people."""
    yield from ((f"task {task.name}", use) for task in group.tasks for use in task.secrets)
    for service in group.services:
        for listener in service.gateway:
            if listener.secret is not None:
                yield f"gateway {service.name}", SecretUse(name=listener.secret)


def naming(state: State, namespace: Namespace, name: SecretName) -> tuple[JobName, ...]:
    """Jobs that are not stopped and name it in their newest version."""
    return tuple(
        job
        for job, entry in state.jobs.items()
        if not entry.stopped
        and entry.job.namespace == namespace
        and any(use.name == name for group in entry.job.groups for use in uses(group))
    )
