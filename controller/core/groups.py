"""A group of one version of a job, with what follows from it computed once. Owns no state."""

import msgspec

from outrider.ids import GroupName, JobName, ServiceName
from outrider.model.job import Driver, Group, ImageKind, Job, JobType, Resources, UpdatePolicy, group_resources

FamilyKey = tuple[JobName, GroupName]


class GroupEntry(msgspec.Struct, frozen=True, kw_only=True):
    job: JobName
    version: int
    position: int
    type: JobType
    group: Group
    spec: Group  # what an allocation is made from: the group without count, updating, scaling and waiting
    need: Resources
    mesh_services: tuple[ServiceName, ...]  # those with a port: each takes a host port
    static_ports: tuple[int, ...]
    has_vms: bool
    uses_host_image: bool
    snapshots: frozenset[str]  # that its guests start from

    @property
    def family(self) -> FamilyKey:
        """The group across the job's versions."""
        return self.job, self.group.name


def group_entry(job: Job, version: int, position: int) -> GroupEntry:
    group = job.groups[position]
    return GroupEntry(
        job=job.name,
        version=version,
        position=position,
        type=job.type,
        group=group,
        spec=msgspec.structs.replace(group, count=0, update=UpdatePolicy(), scaling=None, depends_on=()),
        need=group_resources(group),
        mesh_services=tuple(service.name for service in group.services if service.port is not None),
        static_ports=tuple(port.static for port in group.network.ports if port.static is not None),
        has_vms=any(task.driver is Driver.VM for task in group.tasks),
        snapshots=frozenset(task.image.start_from for task in group.tasks if task.image.start_from),
        uses_host_image=any(
            task.driver is Driver.PROCESS and task.image.kind is ImageKind.HOST for task in group.tasks
        ),
    )
