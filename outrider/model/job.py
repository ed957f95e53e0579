"""A job, as its author wrote it: parsed, validated, with defaults filled in.

Sizes are bytes, CPU is in thousandths of a core, durations are seconds.
"""

import itertools
from collections.abc import Mapping
from enum import StrEnum

import msgspec

from outrider.ids import (
    DEFAULT_NAMESPACE,
    GroupName,
    JobName,
    Namespace,
    PortName,
    SecretName,
    ServiceName,
    TaskName,
)
from outrider.model.belongings import Artifact, SecretUse, StickyDisk, Template, VolumeUse
from outrider.model.external import External
from outrider.model.gateway import GatewayListener
from outrider.model.sidecar import SidecarKind
from outrider.model.traffic import Traffic

MIB = 1024 * 1024


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every value of the model: frozen, compared by content, defaults left out on the wire."""


class JobType(StrEnum):
    SERVICE = "service"
    BATCH = "batch"
    SYSTEM = "system"


class TaskRole(StrEnum):
    """When a task of a group runs, beside the others."""

    MAIN = "main"
    INIT = "init"  # before all others, to its end, one after the other
    HELPER = "helper"  # beside the main tasks; asked to end once they have


class Payload(StrEnum):
    """Whether whoever dispatches a job may, must or must not send bytes along."""

    OPTIONAL = "optional"
    REQUIRED = "required"
    FORBIDDEN = "forbidden"


class ScalingMetric(StrEnum):
    """What a group is scaled by, for each of its copies; the value is the job file's key."""

    REQUESTS = "requests"  # a second, as its sidecar counts them; connections a second of a tcp service
    CONCURRENCY = "concurrency"  # requests under way; open connections of a tcp service
    CPU = "cpu"  # percent of what it reserves


class Driver(StrEnum):
    PROCESS = "process"
    VM = "vm"


class Isolation(StrEnum):
    """What stands between a process and its node's kernel: namespaces, or a kernel of its own."""

    PROCESS = "process"
    VM = "vm"


class Protocol(StrEnum):
    TCP = "tcp"
    HTTP = "http"
    HTTP2 = "http2"
    GRPC = "grpc"


class CheckKind(StrEnum):
    HTTP = "http"
    TCP = "tcp"
    GRPC = "grpc"
    COMMAND = "command"


class ImageKind(StrEnum):
    HOST = "host"
    OCI = "oci"
    OCI_LAYOUT = "oci-layout"
    DOCKER_ARCHIVE = "docker-archive"
    DIR = "dir"
    DISK = "disk"


PULLED = frozenset({ImageKind.OCI, ImageKind.OCI_LAYOUT, ImageKind.DOCKER_ARCHIVE})  # unpacked by the node


class PullPolicy(StrEnum):
    """When the registry is asked what a tag means. What is pinned by its digest is never asked for twice."""

    IF_ABSENT = "if-absent"
    ALWAYS = "always"
    NEVER = "never"


class Operator(StrEnum):
    """How a constraint or an affinity looks at an attribute of a node; the value is how the job file writes it."""

    EQUAL = "="
    NOT_EQUAL = "!="
    LESS = "<"
    LESS_EQUAL = "<="
    GREATER = ">"
    GREATER_EQUAL = ">="
    MATCHES = "matches"
    VERSION = "version"
    CONTAINS = "contains"  # all of a comma-separated list
    CONTAINS_ANY = "contains any"
    IS_SET = "is set"
    IS_NOT_SET = "is not set"
    DISTINCT = "distinct"  # at most so many copies on nodes of one value; "node.id": on one node


class Packing(StrEnum):
    """What is better where all else is equal: to keep copies and load apart, or to fill one node after the other."""

    SPREAD = "spread"
    PACK = "pack"


class Constraint(Value, frozen=True, kw_only=True):
    """What a node must be like. Attributes' names: `outrider.model.attributes`."""

    attribute: str
    operator: Operator
    value: str = ""


class Affinity(Value, frozen=True, kw_only=True):
    """What a node had better be like, or, with a negative weight, had better not."""

    prefer: Constraint
    weight: int = 50  # -100 to 100


class SpreadTarget(Value, frozen=True, kw_only=True):
    value: str
    percent: int


class Spread(Value, frozen=True, kw_only=True):
    """Over which attribute's values the copies go: by percent, or evenly where there are no targets."""

    attribute: str
    weight: int = 100  # 1 to 100
    targets: tuple[SpreadTarget, ...] = ()


class Resources(Value, frozen=True, kw_only=True):
    cpu_millis: int = 100  # a reservation: the weight under contention
    memory_bytes: int = 64 * MIB  # a reservation and the limit
    cpu_max_millis: int | None = None  # a quota, only where the job asks for one
    disk_bytes: int = 64 * MIB  # cap of the task's directory and of its /tmp, each
    pids_max: int = 256
    shm_bytes: int = 64 * MIB  # of /dev/shm; counts as the task's memory
    io_weight: int = 0  # 1 to 1000 against others on the same disk; 0: like everybody's
    nice: int = 0  # 0 to 19: the higher, the more it yields
    ulimits: Mapping[str, int] = {}  # "nofile" -> how many; soft and hard
    devices: Mapping[str, int] = {}  # name -> how many; "kvm" is there or not, and is never used up
    hugepages: Mapping[str, int] = {}  # size of a page, "2Mi" -> bytes, which are none of `memory`


class Port(Value, frozen=True, kw_only=True):
    name: PortName
    static: int | None = None  # published in the clear on the host's address at this number
    to: int | None = None  # the number inside; `inner_ports` gives one where the job does not
    dynamic: bool = False  # published in the clear too, at a number that the scheduler picks
    from_image: bool = False  # `to` is what the group's image exposes: its agent fills it in, once it has the image


class Network(Value, frozen=True, kw_only=True):
    ports: tuple[Port, ...] = ()
    bandwidth_bytes: int = 0  # a second, each way, of all its traffic; 0 is no limit
    egress: tuple[str, ...] = ()  # networks the workload may reach beside the mesh; () is none
    external: tuple[External, ...] = ()  # what its sidecar reaches for it outside of the mesh


class Check(Value, frozen=True, kw_only=True):
    kind: CheckKind
    path: str = ""  # http: the path; grpc: the service name
    command: tuple[str, ...] = ()
    interval_s: float = 5.0
    timeout_s: float = 2.0


class Upstream(Value, frozen=True, kw_only=True):
    service: ServiceName
    port: int | None = None  # also on 127.0.0.1 at this number


class Service(Value, frozen=True, kw_only=True):
    name: ServiceName
    port: PortName | None = None  # None: it only calls, nobody calls it
    protocol: Protocol = Protocol.TCP
    check: Check | None = None
    upstreams: tuple[Upstream, ...] = ()
    allow: tuple[ServiceName, ...] = ()  # who may call it; "*" is everybody in the mesh
    traffic: Traffic | None = None  # None: nothing but what sidecars do anyway
    meta: Mapping[str, str] = {}  # shown in Consul; subsets choose by it
    transparent: bool = False  # it may call every service that lets it, by name, without `upstreams`
    gateway: tuple[GatewayListener, ...] = ()  # ways in for callers outside of the mesh


class GuestFile(Value, frozen=True, kw_only=True):
    """A file on the node that a guest boots from, and what it must contain."""

    reference: str
    sha256: str


class Image(Value, frozen=True, kw_only=True):
    kind: ImageKind = ImageKind.HOST
    reference: str = ""  # of a disk: "" for a guest that lives in its initrd
    sha256: str = ""
    # Of a guest alone. Without a kernel the disk's own boot loader is started, by firmware.
    kernel: GuestFile | None = None
    initrd: GuestFile | None = None
    kernel_arguments: str = ""
    boot_deadline_s: float = 120.0  # until the guest's first packet
    start_from: str = ""  # a snapshot on the node: the guest goes on from there instead of booting
    pull: PullPolicy = PullPolicy.IF_ABSENT  # of one in a registry


class File(Value, frozen=True, kw_only=True):
    path: str  # relative to the task's directory
    content: bytes
    mode: int = 0o644


class CloudInit(Value, frozen=True, kw_only=True):
    """What cloud-init does in a guest at its first boot, where the guest has it."""

    user: str = ""  # made, with the right to become root; "": the image's own
    ssh_keys: tuple[str, ...] = ()  # that let in as this user
    files: tuple[File, ...] = ()  # by their whole paths inside
    commands: tuple[str, ...] = ()  # for a shell, as root, in this order


class Task(Value, frozen=True, kw_only=True):
    name: TaskName
    command: tuple[str, ...] = ()  # instead of all that the image would run; () where it brings its own
    args: tuple[str, ...] = ()  # for the image's entrypoint, instead of its own arguments
    driver: Driver = Driver.PROCESS
    image: Image = Image()
    files: tuple[File, ...] = ()
    env: Mapping[str, str] = {}
    resources: Resources = Resources()
    kill_signal: str = "SIGTERM"
    kill_timeout_s: float = 5.0
    user: int | None = None  # uid and gid inside, never root; None: the image's, or 1000
    secrets: tuple[SecretUse, ...] = ()
    volumes: tuple[VolumeUse, ...] = ()
    sticky: tuple[StickyDisk, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    templates: tuple[Template, ...] = ()
    capabilities: tuple[str, ...] = ()  # beyond none, where the node lets it: "NET_BIND_SERVICE"
    workdir: str = ""  # "": the image's; the task's directory where there is no image
    role: TaskRole = TaskRole.MAIN
    cloud_init: CloudInit | None = None  # of a vm
    isolation: Isolation = Isolation.PROCESS  # of a process


class RestartPolicy(Value, frozen=True, kw_only=True):
    """Restart on the same node: at most `attempts` within `interval_s`, each later than the one before."""

    attempts: int = 3
    interval_s: float = 300.0
    delay_s: float = 1.0
    delay_max_s: float = 30.0


class UpdatePolicy(Value, frozen=True, kw_only=True):
    max_parallel: int = 1
    canary: int = 0  # copies of a new version that prove themselves beside the old ones; then somebody promotes
    min_healthy_s: float = 1.0
    healthy_deadline_s: float = 120.0
    auto_revert: bool = False
    auto_promote: bool = False
    blue_green: bool = False  # a whole second set beside the first; promoting it switches the calls over
    progress_deadline_s: float | None = None  # None: the first copy that fails makes the rollout fail


class ReschedulePolicy(Value, frozen=True, kw_only=True):
    """Elsewhere, after the restarts on one node are used up: each time later than the time before."""

    attempts: int | None = None  # within `interval_s`; None: no limit, and of a batch job none at all
    interval_s: float = 600.0  # a copy that has not failed for so long starts at the first delay again
    delay_s: float = 5.0
    delay_max_s: float = 300.0


class Survivor(StrEnum):
    """Which copy stays when a silent node returns and another has stood in."""

    ORIGINAL = "original"
    REPLACEMENT = "replacement"
    HEALTHY = "healthy"  # the first of the two that is; the original where both are


class DisconnectPolicy(Value, frozen=True, kw_only=True):
    lost_after_s: float | None = None  # None: the fleet's
    replace_after_s: float | None = None  # None: not before it is lost
    survivor: Survivor = Survivor.ORIGINAL
    # A group that must never run twice: its node stops it after so long without a controller. None: it runs on.
    stop_after_s: float | None = None


class ScalingPolicy(Value, frozen=True, kw_only=True):
    """How many copies there are is the fleet's to say, within bounds, so that each has about `target` to do."""

    count_min: int = 1
    count_max: int
    metric: ScalingMetric
    target: float
    cooldown_s: float = 60.0  # no change follows another sooner; fewer only where fewer would have done all the while


class Group(Value, frozen=True, kw_only=True):
    name: GroupName
    tasks: tuple[Task, ...]
    count: int = 1
    update: UpdatePolicy = UpdatePolicy()
    restart: RestartPolicy = RestartPolicy()
    network: Network = Network()
    services: tuple[Service, ...] = ()
    reschedule: ReschedulePolicy = ReschedulePolicy()
    disconnect: DisconnectPolicy = DisconnectPolicy()
    restarts: int = 0  # how often `job restart` was asked for: another number is other content
    constraints: tuple[Constraint, ...] = ()
    affinities: tuple[Affinity, ...] = ()
    spread: tuple[Spread, ...] = ()
    # Which version of each secret it was rolled out with: the controller fills it in when the job is submitted.
    secrets: Mapping[SecretName, int] = {}
    scaling: ScalingPolicy | None = None
    depends_on: tuple[ServiceName, ...] = ()  # of which one instance each must be healthy when a copy is placed
    sidecar: SidecarKind = SidecarKind.OWN


class Schedule(Value, frozen=True, kw_only=True):
    """When copies of a periodic job are launched."""

    cron: str  # minute hour day month weekday, or six fields with seconds first
    time_zone: str = "UTC"
    overlap: bool = False  # whether one is launched while the one before still runs


class Parameters(Value, frozen=True, kw_only=True):
    """What a dispatch fills in: names of `${param.NAME}`."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    payload: Payload = Payload.OPTIONAL


class Job(Value, frozen=True, kw_only=True):
    name: JobName
    groups: tuple[Group, ...]
    type: JobType = JobType.SERVICE
    priority: int = 50
    # For each of its groups, beside the group's own; a distinct constraint counts the copies of all groups together.
    constraints: tuple[Constraint, ...] = ()
    affinities: tuple[Affinity, ...] = ()
    spread: tuple[Spread, ...] = ()
    pool: str = "default"  # of nodes; "all": any
    placement: Packing | None = None  # None: as the fleet's configuration says
    namespace: Namespace = DEFAULT_NAMESPACE  # whose it is: who may see and change it, and whose quota it counts in
    schedule: Schedule | None = None
    parameters: Parameters | None = None
    parent: JobName | None = None  # the job that this one was launched from
    arguments: Mapping[str, str] = {}  # what its parent's parameters are here

    @property
    def is_template(self) -> bool:
        """Runs nothing itself: jobs are launched from it."""
        return self.schedule is not None or self.parameters is not None


class JobVersion(Value, frozen=True, kw_only=True):
    job: Job
    version: int
    submitted_at_s: float = 0.0
    stopped: bool = False


# What a sidecar costs its node: counted in placement and in the cgroup limit (DESIGN, decision 13).
SIDECAR = Resources(cpu_millis=50, memory_bytes=96 * MIB, disk_bytes=0)
SIDECAR_SHARE = Resources(cpu_millis=10, memory_bytes=8 * MIB, disk_bytes=0)  # each allocation's, of one that is shared

# What QEMU takes beside its guest's memory: likewise. A guest of 128 MiB has some 207 MiB resident under emulation.
EMULATOR = Resources(cpu_millis=50, memory_bytes=160 * MIB, disk_bytes=0, pids_max=0)

_FIRST_INNER_PORT = 8080


def inner_ports(network: Network) -> dict[PortName, int]:
    """The number at which each port's workload listens inside its namespace.

    The same on every node, so that a migrated guest keeps it: `to`, or `static`, or the next free from 8080 on. One
    that its image has yet to say is left out.
    """
    known = [port for port in network.ports if port.to is not None or not port.from_image]
    taken = {number for port in known if (number := port.to or port.static)}
    free = (number for number in itertools.count(_FIRST_INNER_PORT) if number not in taken)
    return {port.name: port.to or port.static or next(free) for port in known}


def published_ports(network: Network, dynamic: Mapping[PortName, int]) -> dict[PortName, int]:
    """The numbers on the node's address, in the clear. `dynamic`: those that the scheduler picked."""
    numbers = ((port.name, port.static or dynamic.get(port.name)) for port in network.ports)
    return {name: number for name, number in numbers if number is not None}


def main_task(group: Group) -> Task:
    """The one that is meant where a command says none: the first of the main ones."""
    return next(task for task in group.tasks if task.role is TaskRole.MAIN)


def has_seed(task: Task) -> bool:
    """Whether a guest gets a disk with what the job brings along."""
    brings = task.files or task.cloud_init is not None or task.secrets or task.templates
    return task.driver is Driver.VM and bool(brings)


# Beyond `stop_after`: for the sidecar to drain and the host to be slow, and for clocks that run unlike.
STOP_MARGIN_S = 15.0


def surely_stopped_s(group: Group) -> float | None:
    """How long after a controller last heard of a node no copy of `group` runs there; None: one may run for ever."""
    stop_after_s = group.disconnect.stop_after_s
    if stop_after_s is None:
        return None
    return stop_after_s + max((task.kill_timeout_s for task in group.tasks), default=0.0) + STOP_MARGIN_S


def is_guest(task: Task) -> bool:
    """Whether it runs in a virtual machine, behind an address of its own: its own guest, or an image's root in ours."""
    return task.driver is Driver.VM or task.isolation is Isolation.VM


def has_guest(group: Group) -> bool:
    return any(map(is_guest, group.tasks))


def has_own_guest(group: Group) -> bool:
    """Whether its state can be kept and moved: that of a vm can."""
    return any(task.driver is Driver.VM for task in group.tasks)
