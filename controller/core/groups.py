"""A group of one version of a job, with what follows from it computed once. Owns no state."""

from collections.abc import Mapping

import msgspec

from controller.core.attributes import Demand
from outrider.ids import GroupName, JobName, Namespace, PortName, ServiceName, TaskName, VolumeName
from outrider.model.attributes import POOL
from outrider.model.job import (
    Affinity,
    Constraint,
    DisconnectPolicy,
    Driver,
    Group,
    ImageKind,
    Isolation,
    Job,
    JobType,
    Operator,
    Packing,
    ReschedulePolicy,
    Resources,
    RestartPolicy,
    Spread,
    Task,
    UpdatePolicy,
    Value,
    has_guest,
)
from outrider.model.node import ANY_POOL, KVM
from outrider.model.reservation import group_resources

FamilyKey = tuple[JobName, GroupName]
VolumeKey = tuple[Namespace, VolumeName]


class Distinct(Value, frozen=True, kw_only=True):
    """At most so many copies on nodes of one value; of the job's groups together, or of this one."""

    constraint: Constraint
    attribute: str
    most: int
    whole_job: bool


class GroupEntry(msgspec.Struct, frozen=True, kw_only=True):
    job: JobName
    version: int
    position: int
    type: JobType
    group: Group
    told: Group  # what its agent needs to know of it: not how many there are, nor where, nor how they are replaced
    spec: Group  # what an allocation is made from: without what its agent takes up while it runs
    arguments: Mapping[str, str]
    need: Resources
    mesh_services: tuple[ServiceName, ...]  # those with a port: each takes a host port
    dynamic_ports: tuple[PortName, ...]  # likewise
    static_ports: tuple[int, ...]
    demand: Demand
    devices: tuple[tuple[str, int], ...]  # counted ones
    distinct: tuple[Distinct, ...]
    affinities: tuple[Affinity, ...]
    spread: tuple[Spread, ...]
    packing: Packing | None  # None: as the fleet's policy says
    priority: int
    volumes: tuple[VolumeKey, ...]  # that its tasks name, each once
    sticky: bool  # a copy had better be where the one before it was, once that has ended

    @property
    def family(self) -> FamilyKey:
        """The group across the job's versions."""
        return self.job, self.group.name

    @property
    def ports_width(self) -> int:
        """How many ports of the node's range each allocation takes."""
        return len(self.mesh_services) + len(self.dynamic_ports)


def current_group(job: Job, group: GroupEntry) -> Group:
    """The group as `job`, another version of its job, has it; as it is where that has none."""
    return next((one for one in job.groups if one.name == group.group.name), group.group)


def group_entry(job: Job, version: int, position: int) -> GroupEntry:
    group = job.groups[position]
    need = group_resources(group)
    constraints = (*job.constraints, *group.constraints)
    distinct = tuple(
        _distinct(constraint, whole_job=at < len(job.constraints))
        for at, constraint in enumerate(constraints)
        if constraint.operator is Operator.DISTINCT
    )
    wanted = tuple(constraint for constraint in constraints if constraint.operator is not Operator.DISTINCT)
    if job.pool != ANY_POOL:
        wanted = (Constraint(attribute=POOL, operator=Operator.EQUAL, value=job.pool), *wanted)
    told = _told(group, (*wanted, *(one.constraint for one in distinct)))
    return GroupEntry(
        job=job.name,
        version=version,
        position=position,
        type=job.type,
        group=group,
        told=told,
        spec=_spec(told),
        arguments=job.arguments,
        need=need,
        mesh_services=tuple(service.name for service in group.services if service.port is not None),
        dynamic_ports=tuple(port.name for port in group.network.ports if port.dynamic),
        static_ports=tuple(port.static for port in group.network.ports if port.static is not None),
        demand=Demand(
            constraints=wanted,
            attributes=tuple(one.attribute for one in distinct),
            vms=has_guest(group),
            guest_kernel=any(task.isolation is Isolation.VM for task in group.tasks),
            host_image=any(task.driver is Driver.PROCESS and task.image.kind is ImageKind.HOST for task in group.tasks),
            snapshots=tuple(sorted({task.image.start_from for task in group.tasks if task.image.start_from})),
            kvm=KVM in need.devices,
        ),
        devices=tuple(sorted((name, count) for name, count in need.devices.items() if name != KVM)),
        distinct=distinct,
        affinities=(*job.affinities, *group.affinities),
        spread=tuple({one.attribute: one for one in (*job.spread, *group.spread)}.values()),
        packing=job.placement,
        priority=job.priority,
        volumes=tuple(dict.fromkeys((job.namespace, use.volume) for task in group.tasks for use in task.volumes)),
        sticky=any(task.sticky for task in group.tasks),
    )


def _distinct(constraint: Constraint, *, whole_job: bool) -> Distinct:
    return Distinct(
        constraint=constraint, attribute=constraint.attribute, most=int(constraint.value), whole_job=whole_job
    )


def _told(group: Group, constraints: tuple[Constraint, ...]) -> Group:
    return msgspec.structs.replace(
        group,
        count=0,
        update=UpdatePolicy(),
        reschedule=ReschedulePolicy(),
        disconnect=DisconnectPolicy(stop_after_s=group.disconnect.stop_after_s),
        depends_on=(),
        constraints=constraints,
        affinities=(),
        spread=(),
        services=tuple(msgspec.structs.replace(service, allow=()) for service in group.services),
    )


def _spec(told: Group) -> Group:
    task = Task(name=TaskName(""))
    return msgspec.structs.replace(
        told,
        scaling=None,
        restart=RestartPolicy(),
        services=tuple(msgspec.structs.replace(service, check=None) for service in told.services),
        tasks=tuple(
            msgspec.structs.replace(one, kill_signal=task.kill_signal, kill_timeout_s=task.kill_timeout_s)
            for one in told.tasks
        ),
    )
