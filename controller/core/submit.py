"""Operators' calls: what a submission changes, and why one is refused. Owns the answers; writes nothing itself."""

import msgspec

from controller.core import quota, sealed, volumes
from controller.core.commands import Reply
from controller.core.entries import JobEntry
from controller.core.events import JobRestartRequested, JobStopRequested, JobSubmitted
from controller.core.records import JobStopped, JobVersionAdded, JobVersionsDropped, Record, VirtualAddressAssigned
from controller.core.remedies import hopeless_wishes
from controller.core.state import State
from outrider.ids import JobName, ServiceName
from outrider.model.dependencies import circle, waits
from outrider.model.fleet import RolloutState
from outrider.model.job import Group, Job, JobType, Protocol, Service

Answer = tuple[tuple[Record, ...], Reply]


def submit(state: State, call: JobSubmitted, now_s: float, addresses: int) -> Answer:
    """The records that the submission needs, and the reply for when the journal has them.

    `addresses`: how many virtual addresses earlier calls of the same batch take.
    """
    entry = state.jobs.get(call.job.name)
    job = sealed.stamped(state, _with_found_counts(call.job, entry))
    if job.namespace not in state.access.namespaces:
        message = f"no namespace {job.namespace!r}; `outrider namespace ls` lists them"
        return (), Reply(request=call.request, code="not-found", message=message)
    if refusal := _refusal(state, job, entry) or sealed.refusal(state, job) or volumes.refusal(state, job):
        return (), Reply(request=call.request, code="conflict", message=refusal)
    if too_much := quota.excess(state, job):
        return (), Reply(request=call.request, code="quota", message=too_much)
    warnings = job_warnings(state, job)
    if entry is not None and not entry.stopped:
        job = _as_often_restarted(job, entry.job)
    unchanged = entry is not None and not entry.stopped and entry.job == job
    if entry is not None and unchanged and entry.rollout is not RolloutState.FAILED:  # that one is tried again
        return (), Reply(request=call.request, version=entry.latest, warnings=warnings)
    version = entry.latest + 1 if entry is not None else 1
    records = (*added(state, job, version, now_s, addresses), *versions_dropped(state, entry, job.name))
    return records, Reply(request=call.request, version=version, changed=True, warnings=warnings)


def restart(state: State, call: JobRestartRequested, now_s: float) -> Answer:
    """A version of the same content with another number in it: a rollout replaces every copy."""
    entry = state.jobs.get(call.job)
    if entry is None or entry.stopped:
        message = f"no job {call.job!r} runs; `outrider job ls` lists them"
        return (), Reply(request=call.request, code="not-found", message=message)
    if entry.job.type is JobType.BATCH:
        message = f"job {call.job} is a batch job, whose work ends by itself; submit it again"
        return (), Reply(request=call.request, code="conflict", message=message)
    groups = tuple(msgspec.structs.replace(group, restarts=group.restarts + 1) for group in entry.job.groups)
    again = msgspec.structs.replace(entry.job, groups=groups)
    version = entry.latest + 1
    records = (*added(state, again, version, now_s), *versions_dropped(state, entry, call.job))
    return records, Reply(request=call.request, version=version, changed=True)


def stop(state: State, call: JobStopRequested) -> Answer:
    entry = state.jobs.get(call.job)
    if entry is None:
        message = f"no job {call.job!r}; `outrider job ls` lists them"
        return (), Reply(request=call.request, code="not-found", message=message)
    over = state.live.children_over.get(call.job, {})
    launched = (name for name in entry.children if name not in over and not state.jobs[name].stopped)
    records = () if entry.stopped else (JobStopped(job=call.job), *(JobStopped(job=name) for name in launched))
    return records, Reply(request=call.request, version=entry.latest, changed=bool(records))


def added(state: State, job: Job, version: int, now_s: float, addresses: int = 0) -> tuple[Record, ...]:
    """A new version, and virtual addresses for the names that it brings."""
    entry = state.jobs.get(job.name)
    base = entry.good_version if entry is not None and not entry.stopped else 0
    records: list[Record] = [JobVersionAdded(job=job, version=version, submitted_at_s=now_s, base=base)]
    names = sorted(set(_names(job)) - state.virtual.keys())
    first = len(state.virtual) + addresses
    records.extend(VirtualAddressAssigned(service=name, index=first + at) for at, name in enumerate(names))
    return tuple(records)


def names_touched(state: State, job: Job) -> frozenset[str]:
    """What two submissions must not both touch in one batch: each is judged by the state before it."""
    services = [service for group in job.groups for service in group.services]
    new = set(_names(job)) - state.virtual.keys()
    called = {service.name for service in services}
    counted = quota.touched(state, job.namespace)
    return frozenset({f"job {job.name}", *counted, *(f"service {name}" for name in new | called)})


def names_of_stop(state: State, job: JobName) -> frozenset[str]:
    """Likewise of a stop, which takes along what was launched from the job."""
    entry = state.jobs.get(job)
    return frozenset(f"job {name}" for name in (job, *(entry.children if entry is not None else ())))


def job_warnings(state: State, job: Job) -> tuple[str, ...]:
    """Services that it calls, leads calls to or depends on and nobody provides, this job included; and wishes that no
    node fulfils."""
    own = {service.name for group in job.groups for service in group.services if service.port is not None}
    upstreams = tuple(
        f"group {group.name}: service {service.name}: nobody provides its upstream {upstream.service!r} yet"
        for group in job.groups
        for service in group.services
        for upstream in service.upstreams
        if upstream.service not in state.providers and upstream.service not in own
    )
    needed = tuple(
        f"group {group.name}: nobody provides service {service!r} yet, which it depends on"
        for group in job.groups
        for service in group.depends_on
        if service not in state.providers and service not in own
    )
    led = tuple(
        f"group {group.name}: service {service.name}: nobody provides {name!r} yet, to which its traffic leads"
        for group in job.groups
        for service in group.services
        for name in _led_to(service)
        if name not in state.providers and name not in own
    )
    return (*upstreams, *needed, *led, *hopeless_wishes(state, job))


def _led_to(service: Service) -> tuple[ServiceName, ...]:
    """Where calls of it may go by its own `traffic:`."""
    traffic = service.traffic
    if traffic is None:
        return ()
    routed = (leg for route in traffic.routes for leg in route.legs)
    mirrored = (traffic.mirror.to,) if traffic.mirror is not None else ()
    legs = (*traffic.split, *routed, *traffic.failover, *mirrored)
    return tuple(dict.fromkeys(ServiceName(leg.service) for leg in legs))


def _refusal(state: State, job: Job, entry: JobEntry | None) -> str:
    if entry is not None and (taken := _name_taken(job, entry)):
        return taken
    if names := _circle(state, job):
        return f"{' -> '.join(names)}: each waits for the next, so none would ever start"
    return _protocol_clash(state, job)


def _name_taken(job: Job, entry: JobEntry) -> str:
    if not entry.stopped and entry.job.type is not job.type:
        return f"job {job.name} is a {entry.job.type} job; stop it before it becomes a {job.type} job"
    if entry.job.parent is not None:
        return f"job {job.name} was launched from {entry.job.parent}; `outrider job dispatch` launches another"
    if entry.job.namespace != job.namespace:  # stopped or not: its history is not to be inherited
        return f"a job {job.name} is in another namespace already; take another name"
    return ""


def _protocol_clash(state: State, job: Job) -> str:
    own: dict[ServiceName, Protocol] = {}
    for group in job.groups:
        for service in group.services:
            # A name is an identity: what may call others by it, and whom others trust under it.
            for owner in state.service_owners.get(service.name, {}).values():
                if owner != job.namespace:
                    return f"service {service.name} is a job's in another namespace; give it another name"
            if service.port is None:
                continue
            if own.setdefault(service.name, service.protocol) is not service.protocol:
                return f"service {service.name}: two groups of the job give it different protocols"
            for other, protocol in state.providers.get(service.name, {}).items():
                if other != job.name and protocol is not service.protocol:
                    return (
                        f"service {service.name} speaks {protocol} in job {other} and {service.protocol} here; "
                        "give one of them another name, or both the same protocol"
                    )
    return ""


def _circle(state: State, job: Job) -> tuple[ServiceName, ...]:
    """Services that would wait for each other, over all jobs."""
    if not any(group.depends_on for group in job.groups):
        return ()
    others = {name for jobs in state.dependents.values() for name in jobs if name != job.name}
    groups = [group for name in sorted(others) for group in state.jobs[name].job.groups]
    return circle(waits([*groups, *job.groups]))


def _with_found_counts(job: Job, entry: JobEntry | None) -> Job:
    """A group that the fleet scales keeps the number of copies that it has been found to need."""
    if entry is None or entry.stopped:
        return job
    found = {group.name: group.count for group in entry.job.groups if group.scaling is not None}

    def kept(group: Group) -> Group:
        if group.scaling is None or group.name not in found:
            return group
        count = min(max(found[group.name], group.scaling.count_min), group.scaling.count_max)
        return msgspec.structs.replace(group, count=count)

    return msgspec.structs.replace(job, groups=tuple(kept(group) for group in job.groups))


def _as_often_restarted(job: Job, before: Job) -> Job:
    """A job file knows nothing of restarts that were asked for: submitting it again must not undo them."""
    restarts = {group.name: group.restarts for group in before.groups}
    groups = tuple(
        msgspec.structs.replace(group, restarts=max(group.restarts, restarts.get(group.name, 0)))
        for group in job.groups
    )
    return msgspec.structs.replace(job, groups=groups)


def _names(job: Job) -> list[ServiceName]:
    """Service names that get a virtual address: provided or called."""
    services = [service for group in job.groups for service in group.services]
    provided = [service.name for service in services if service.port is not None]
    return provided + [upstream.service for service in services for upstream in service.upstreams]


def versions_dropped(state: State, entry: JobEntry | None, job: JobName) -> tuple[Record, ...]:
    """The oldest versions beyond those kept, unless an allocation is made from them or a revert may want them."""
    excess = len(entry.versions) + 1 - state.policy.versions_kept if entry is not None else 0
    if entry is None or excess <= 0:
        return ()
    used = {entry.good_version, entry.latest}
    for group in {group.name for added in entry.versions.values() for group in added.job.groups}:
        rows = state.family_rows((job, group))
        used.update(state.groups[key].version for key in set(state.table.group[rows].tolist()))
    unused = [version for version in entry.versions if version not in used][:excess]
    return (JobVersionsDropped(job=job, versions=tuple(unused)),) if unused else ()
