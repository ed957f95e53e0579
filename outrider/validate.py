"""What makes a job impossible, whoever sent it. Pure: the job file's reader and the operator's edge both ask here.

Owns limits and references within one job. Never judges whether the fleet can run it: that is the scheduler's.
"""

import ipaddress
import itertools
import math
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from outrider.belongings import ENV_NAME, wrong_belongings
from outrider.ids import is_name
from outrider.model.hugepages import page_bytes
from outrider.model.job import (
    MIB,
    PULLED,
    Check,
    CheckKind,
    DisconnectPolicy,
    Driver,
    File,
    Group,
    GuestFile,
    Image,
    ImageKind,
    Isolation,
    Job,
    JobType,
    Network,
    PullPolicy,
    ReschedulePolicy,
    Resources,
    RestartPolicy,
    Service,
    Survivor,
    Task,
    UpdatePolicy,
    Value,
    has_guest,
    inner_ports,
    surely_stopped_s,
)
from outrider.model.mesh import PUBLIC_PORT, VIRTUAL_PORT
from outrider.model.node import KVM
from outrider.placement import wrong_wishes
from outrider.validate_exposed import exposed_findings
from outrider.validate_external import external_findings
from outrider.validate_gateway import gateway_findings
from outrider.validate_kinds import group_findings, job_findings
from outrider.validate_sidecar import sidecar_findings
from outrider.validate_traffic import traffic_findings

COUNT_MAX = 1_000_000
GROUPS_MAX = 100
TASKS_MAX = 32
SERVICES_MAX = 32
FILES_BYTES_MAX = MIB
DEVICES_MAX = 1000
HUGEPAGES_MAX = 1_000_000  # of one size
BANDWIDTH_MIN, BANDWIDTH_MAX = 10_000, 4_000_000_000  # bytes a second
GUEST_MEMORY_MIN = 128 * MIB
STOP_AFTER_S_MIN = 10.0  # a controller is replaced in some seconds, and answers seldom in a large fleet
DURATION_S_MAX = 7 * 24 * 3600.0
# Inside the allocation's namespace the sidecar listens here.
RESERVED_PORTS = frozenset({VIRTUAL_PORT, *range(PUBLIC_PORT, PUBLIC_PORT + SERVICES_MAX)})
RESERVED_TASK = "sidecar"  # `logs` names Envoy's so

_TEXT_CHARS_MAX = 128 * 1024  # the kernel's limit of one argument or variable
_KERNEL_ARGUMENTS_CHARS_MAX = 2000  # the kernel's own limit is 2,048, and ours go before
# https://github.com/distribution/reference: the registry must be named, for there is no default one.
_REGISTRY_IMAGE = re.compile(
    r"^(localhost|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+|[A-Za-z0-9.-]+(?=:))(:[0-9]+)?"
    r"(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)
_UID_MAX = 65_535
_GUEST_USER = re.compile(r"^[a-z_][a-z0-9_-]{0,31}\Z")
_SSH_KEY = re.compile(r"^(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/=]{16,}( [^\n]*)?\Z")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_NAME_RULE = "lower-case letters, digits and dashes, at most 63, no dash at either end"

Path = tuple[str | int, ...]


class Problem(Value, frozen=True, kw_only=True):
    """One thing that is wrong. `path` is the job file's: groups, tasks and ports by name, lists by index."""

    path: Path
    message: str

    @property
    def where(self) -> str:
        """The path for people: `groups.web.services[0].port`."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}"
        return text.removeprefix(".")


def problems(job: Job) -> tuple[Problem, ...]:
    """All that is wrong with `job`, in the order of its parts. () is a good job."""
    return tuple(_job(job))


def _job(job: Job) -> Iterator[Problem]:
    yield from _name(("job",), job.name)
    yield from _name(("namespace",), job.namespace)
    yield from _range(("priority",), job.priority, 1, 100)
    yield from _name(("pool",), job.pool)
    yield from _wishes((), job)
    yield from _range(("groups",), len(job.groups), 1, GROUPS_MAX, "groups")
    yield from _unique(("groups",), (group.name for group in job.groups), "group")
    for group in job.groups:
        path: Path = ("groups", group.name)
        if job.type is JobType.SYSTEM and group.count != 1:
            yield Problem(path=(*path, "count"), message="a system job runs one copy on each node; leave count out")
        yield from _rollout_kind(job, path, group)
        yield from _group(path, group)
        findings = (
            group_findings(job, group),
            gateway_findings(group),
            exposed_findings(group),
            external_findings(group),
            sidecar_findings(group),
        )
        for at, message in itertools.chain(*findings):
            yield Problem(path=(*path, *at), message=message)
    for at, message in job_findings(job):
        yield Problem(path=at, message=message)


def _group(path: Path, group: Group) -> Iterator[Problem]:
    yield from _name(path, group.name)
    yield from _range((*path, "count"), group.count, 0, COUNT_MAX)
    yield from _update((*path, "update"), group.update)
    yield from _attempts((*path, "restart"), group.restart)
    yield from _attempts((*path, "reschedule"), group.reschedule)
    yield from _disconnect((*path, "disconnect"), group.disconnect)
    yield from _stop_after((*path, "disconnect"), group)
    yield from _network((*path, "network"), group.network)
    tasks_min = 0 if any(service.gateway for service in group.services) else 1  # a gateway is its sidecar
    yield from _range((*path, "tasks"), len(group.tasks), tasks_min, TASKS_MAX, "tasks")
    yield from _unique((*path, "tasks"), (task.name for task in group.tasks), "task")
    for task in group.tasks:
        yield from _task((*path, "tasks", task.name), task)
    yield from _services((*path, "services"), group)
    yield from _wishes(path, group)
    if has_guest(group):
        yield from _guest(path, group)


def _guest(path: Path, group: Group) -> Iterator[Problem]:
    """A guest is behind an address of its own: what is a matter of course beside a process is not there."""
    if len(group.tasks) > 1:
        yield Problem(path=(*path, "tasks"), message="a vm is alone in its group; put the other tasks in another group")
    for task in group.tasks:
        for key in ("command", "env", "user", "workdir") if task.driver is Driver.VM else ():
            if getattr(task, key):
                yield Problem(path=(*path, "tasks", task.name, key), message="a vm brings its own; leave it out")
        yield from _cloud_init((*path, "tasks", task.name), task)
        if task.resources.hugepages:
            at: Path = (*path, "tasks", task.name, "resources", "hugepages")
            yield Problem(path=at, message="for processes on their node's kernel; a vm has none")
        if task.resources.memory_bytes < GUEST_MEMORY_MIN:
            at = (*path, "tasks", task.name, "resources", "memory")
            yield Problem(path=at, message="a vm needs at least 128Mi: a Linux kernel does not start in less")
    for index, service in enumerate(group.services):
        at = (*path, "services", index)
        if service.check is not None and service.check.kind is CheckKind.COMMAND:
            message = "a command check is for processes; use an http, tcp or grpc check"
            yield Problem(path=(*at, "check"), message=message)
        for place, upstream in enumerate(service.upstreams):
            if upstream.port is not None:
                message = f"a vm has a 127.0.0.1 of its own; call http://{upstream.service}.mesh, and leave port out"
                yield Problem(path=(*at, "upstreams", place, "port"), message=message)


def _wishes(path: Path, owner: Job | Group) -> Iterator[Problem]:
    for at, message in wrong_wishes(owner):
        yield Problem(path=(*path, *at), message=message)


def _cloud_init(path: Path, task: Task) -> Iterator[Problem]:
    wanted, at = task.cloud_init, (*path, "cloud_init")
    if wanted is None:
        return
    if any(file.path == "user-data" for file in task.files):
        yield Problem(path=at, message="files bring a user-data of their own; say it in one place")
    if wanted.user and not _GUEST_USER.match(wanted.user):
        yield Problem(path=(*at, "user"), message=f"{wanted.user[:80]!r} is no name of a user")
    for index, key in enumerate(wanted.ssh_keys):
        if not _SSH_KEY.match(key):
            message = "expected a public key as ~/.ssh/id_ed25519.pub has it: a kind, and letters"
            yield Problem(path=(*at, "ssh_keys", index), message=message)
    for index, command in enumerate(wanted.commands):
        yield from _text((*at, "commands", index), command)
    for file in wanted.files:
        parts = PurePosixPath(file.path)
        if not parts.is_absolute() or ".." in parts.parts or "\0" in file.path:
            yield Problem(path=(*at, "files", file.path), message="expected a whole path inside, from / on, without ..")
    size = sum(len(file.content) for file in (*task.files, *wanted.files))
    if size > FILES_BYTES_MAX:
        yield Problem(path=(*at, "files"), message=f"{size} bytes in all; at most {FILES_BYTES_MAX} travel with a job")


def _update(path: Path, update: UpdatePolicy) -> Iterator[Problem]:
    yield from _range((*path, "max_parallel"), update.max_parallel, 1, COUNT_MAX)
    yield from _range((*path, "canary"), update.canary, 0, COUNT_MAX)
    yield from _range((*path, "min_healthy"), update.min_healthy_s, 0, DURATION_S_MAX)
    yield from _range((*path, "healthy_deadline"), update.healthy_deadline_s, 0, DURATION_S_MAX)
    if update.healthy_deadline_s <= update.min_healthy_s:
        yield Problem(path=(*path, "healthy_deadline"), message="must be longer than min_healthy, or nothing succeeds")
    if update.progress_deadline_s is not None:
        yield from _range((*path, "progress_deadline"), update.progress_deadline_s, 0, DURATION_S_MAX)
        if update.progress_deadline_s <= update.healthy_deadline_s:
            message = "must be longer than healthy_deadline, or no copy is ever tried twice"
            yield Problem(path=(*path, "progress_deadline"), message=message)
    if update.blue_green and update.canary:
        yield Problem(path=(*path, "canary"), message="blue_green starts a copy of each already; leave canary out")
    if update.auto_promote and not (update.canary or update.blue_green):
        message = "there is nothing to promote; give canary, or blue_green: true"
        yield Problem(path=(*path, "auto_promote"), message=message)


def _attempts(path: Path, policy: RestartPolicy | ReschedulePolicy) -> Iterator[Problem]:
    if policy.attempts is not None:
        yield from _range((*path, "attempts"), policy.attempts, 0, 1_000_000)
    yield from _range((*path, "interval"), policy.interval_s, 0, DURATION_S_MAX)
    yield from _range((*path, "delay"), policy.delay_s, 0, DURATION_S_MAX)
    yield from _range((*path, "delay_max"), policy.delay_max_s, 0, DURATION_S_MAX)
    if policy.delay_max_s < policy.delay_s:
        yield Problem(path=(*path, "delay_max"), message="must not be shorter than delay")


def _disconnect(path: Path, policy: DisconnectPolicy) -> Iterator[Problem]:
    for key, after_s in (("lost_after", policy.lost_after_s), ("replace_after", policy.replace_after_s)):
        if after_s is not None:
            yield from _range((*path, key), after_s, 0, DURATION_S_MAX)
    lost_s, replace_s = policy.lost_after_s, policy.replace_after_s
    if lost_s is not None and replace_s is not None and replace_s >= lost_s:
        message = "must be shorter than lost_after: what is lost is replaced anyway"
        yield Problem(path=(*path, "replace_after"), message=message)
    if policy.survivor is not Survivor.ORIGINAL and replace_s is None:
        message = "nothing stands in for a silent copy; give replace_after, or leave survivor out"
        yield Problem(path=(*path, "survivor"), message=message)


def _stop_after(path: Path, group: Group) -> Iterator[Problem]:
    """A group that must never run twice: nobody may stand in, and it is not lost before it has surely stopped."""
    policy, stopped_s = group.disconnect, surely_stopped_s(group)
    if policy.stop_after_s is None or stopped_s is None:
        return
    yield from _range((*path, "stop_after"), policy.stop_after_s, STOP_AFTER_S_MIN, DURATION_S_MAX)
    for key in ("canary", "blue_green"):
        if getattr(group.update, key):
            message = "a group with stop_after never runs twice: a new version's copies begin once the old ones ended"
            yield Problem(path=(*path[:-1], "update", key), message=message)
    if policy.replace_after_s is not None:
        message = "a group with stop_after never runs twice: nothing may stand in for its copies"
        yield Problem(path=(*path, "replace_after"), message=message)
    if policy.lost_after_s is not None and policy.lost_after_s < stopped_s:
        message = f"must be at least {stopped_s:g} s: only then its copies have surely stopped"
        yield Problem(path=(*path, "lost_after"), message=message)


def _rollout_kind(job: Job, path: Path, group: Group) -> Iterator[Problem]:
    """Canaries are copies beside others of one group: a service's."""
    for key in ("canary", "blue_green"):
        if job.type is not JobType.SERVICE and getattr(group.update, key):
            message = f"only for service jobs; a {job.type} job is updated without canaries"
            yield Problem(path=(*path, "update", key), message=message)
    if job.type is not JobType.SERVICE and group.disconnect.replace_after_s is not None:
        message = f"only for service jobs; a {job.type} job's copies have no stand-ins"
        yield Problem(path=(*path, "disconnect", "replace_after"), message=message)


def _network(path: Path, network: Network) -> Iterator[Problem]:
    yield from _unique((*path, "ports"), (port.name for port in network.ports), "port")
    if network.bandwidth_bytes and not BANDWIDTH_MIN <= network.bandwidth_bytes <= BANDWIDTH_MAX:
        message = f"{network.bandwidth_bytes} bytes a second is not within {BANDWIDTH_MIN} and {BANDWIDTH_MAX}"
        yield Problem(path=(*path, "bandwidth"), message=message)
    for port in network.ports:
        at: Path = (*path, "ports", port.name)
        yield from _name(at, port.name)
        for key, number in (("static", port.static), ("to", port.to)):
            if number is not None:
                yield from _range((*at, key), number, 1, 65535)
        if port.dynamic and port.static is not None:
            yield Problem(path=(*at, "dynamic"), message="static gives the number already; leave one of them out")
    statics = (str(port.static) for port in network.ports if port.static is not None)
    yield from _unique((*path, "ports"), statics, "static port")
    for name, number in inner_ports(network).items():
        if number in RESERVED_PORTS:
            yield Problem(path=(*path, "ports", name), message=f"{number} is the sidecar's; take another number")
    yield from _unique((*path, "ports"), map(str, inner_ports(network).values()), "port number inside")
    for index, text in enumerate(network.egress):
        try:
            ipaddress.IPv4Network(text)
        except ValueError as error:
            yield Problem(path=(*path, "egress", index), message=f"{error}; expected an IPv4 network, 10.0.0.0/8")


def _task(path: Path, task: Task) -> Iterator[Problem]:
    yield from _name(path, task.name)
    if task.name == RESERVED_TASK:
        yield Problem(path=path, message=f"{RESERVED_TASK!r} names the sidecar; choose another name")
    if task.driver is Driver.PROCESS and not task.command and task.image.kind not in PULLED:
        yield Problem(path=(*path, "command"), message="a process needs a command")
    for key, words in (("command", task.command), ("args", task.args)):
        for index, word in enumerate(words):
            yield from _text((*path, key, index), word)
    if task.args and (task.command or task.image.kind not in PULLED):
        yield Problem(path=(*path, "args"), message="args are for an image's entrypoint; add them to the command")
    if task.cloud_init is not None and task.driver is Driver.PROCESS:
        yield Problem(path=(*path, "cloud_init"), message="cloud-init is for a vm; a process has files and a command")
    if task.isolation is Isolation.VM and task.driver is Driver.VM:
        yield Problem(path=(*path, "isolation"), message="for processes: a vm has a kernel of its own already")
    elif task.isolation is Isolation.VM and task.image.kind is ImageKind.HOST:
        message = "a vm shows nothing of the node's own /usr; give it an image, such as oci:REGISTRY/NAME:TAG"
        yield Problem(path=(*path, "image"), message=message)
    yield from _identity(path, task)
    yield from (Problem(path=(*path, *at), message=message) for at, message in wrong_belongings(task))
    yield from _image((*path, "image"), task.driver, task.image)
    yield from _files((*path, "files"), task.files)
    for name, text in task.env.items():
        if not ENV_NAME.match(name):
            yield Problem(path=(*path, "env", name), message="a variable's name is letters, digits and underscores")
        yield from _text((*path, "env", name), text)
    yield from _resources((*path, "resources"), task.resources)
    if task.kill_signal not in signal.Signals.__members__:
        yield Problem(path=(*path, "kill_signal"), message=f"{task.kill_signal!r} is no signal; for example SIGTERM")
    yield from _range((*path, "kill_timeout"), task.kill_timeout_s, 0, DURATION_S_MAX)


def _identity(path: Path, task: Task) -> Iterator[Problem]:
    if task.user is not None and not 1 <= task.user <= _UID_MAX:
        message = f"{task.user} is not within 1 and {_UID_MAX}: the uid inside; a workload is never root"
        yield Problem(path=(*path, "user"), message=message)
    if task.workdir and not task.workdir.startswith("/"):
        yield Problem(path=(*path, "workdir"), message=f"{task.workdir[:80]!r} is no whole path, from / on")
    yield from _text((*path, "workdir"), task.workdir)


def _image(path: Path, driver: Driver, image: Image) -> Iterator[Problem]:
    if (image.kind is ImageKind.DISK) != (driver is Driver.VM):
        yield Problem(path=path, message="a disk is what a vm boots; a process has another kind of image")
    if image.kind is not ImageKind.HOST and not image.reference and image.kernel is None:
        yield Problem(path=path, message=f"{image.kind} needs a reference")
    if image.kind is ImageKind.OCI and image.reference and not _REGISTRY_IMAGE.match(image.reference):
        message = (
            f"{image.reference[:80]!r} is no image in a registry; expected REGISTRY/NAME:TAG or NAME@sha256:DIGEST"
        )
        yield Problem(path=path, message=message)
    if image.pull is not PullPolicy.IF_ABSENT and image.kind is not ImageKind.OCI:
        yield Problem(path=(*path, "pull"), message="only for images in a registry; others are looked at each time")
    yield from _boot(path, image)


def _boot(path: Path, image: Image) -> Iterator[Problem]:
    """How a guest starts, and from what."""
    yield from _range((*path, "boot_deadline"), image.boot_deadline_s, 1, DURATION_S_MAX)
    if image.start_from:
        yield from _name((*path, "start_from"), image.start_from)
    if image.initrd is not None and image.kernel is None:
        yield Problem(path=(*path, "initrd"), message="an initrd needs a kernel to be given too")
    if len(image.kernel_arguments) > _KERNEL_ARGUMENTS_CHARS_MAX or "\0" in image.kernel_arguments:
        message = f"holds a NUL, or more than {_KERNEL_ARGUMENTS_CHARS_MAX} characters"
        yield Problem(path=(*path, "kernel_arguments"), message=message)
    if image.kernel_arguments and image.kernel is None:
        yield Problem(path=(*path, "kernel_arguments"), message="without a kernel, the disk's boot loader has them")
    disk = GuestFile(reference=image.reference, sha256=image.sha256) if image.reference else None
    is_guest = image.kind is ImageKind.DISK
    for name, file in (("disk", disk), ("kernel", image.kernel), ("initrd", image.initrd)):
        at: Path = (*path, "sha256") if name == "disk" else (*path, "sha256", name)
        if file is not None and file.sha256 and not _SHA256.match(file.sha256):
            yield Problem(path=at, message="expected 64 hexadecimal digits in lower case")
        if file is not None and is_guest and not file.sha256:
            yield Problem(path=at, message=f"a {name} needs its checksum: sha256sum prints it")
        if file is not None and is_guest and not file.reference.startswith("/"):
            yield Problem(path=(*path, name), message="expected a whole path on the node, from / on")


def _files(path: Path, files: tuple[File, ...]) -> Iterator[Problem]:
    yield from _unique(path, (file.path for file in files), "file")
    for file in files:
        parts = PurePosixPath(file.path)
        if not file.path or parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in file.path:
            yield Problem(
                path=(*path, file.path), message="expected a path relative to the task's directory, without .."
            )
        if not 0 <= file.mode <= 0o777:
            yield Problem(path=(*path, file.path), message=f"mode {file.mode:o} is not within 0 and 777")
    size = sum(len(file.content) for file in files)
    if size > FILES_BYTES_MAX:
        yield Problem(
            path=path, message=f"{size} bytes in all; at most {FILES_BYTES_MAX} travel with a job: use an image"
        )


def _resources(path: Path, resources: Resources) -> Iterator[Problem]:
    yield from _range((*path, "cpu"), resources.cpu_millis, 1, 1_000_000, "thousandths of a core")
    yield from _range((*path, "memory"), resources.memory_bytes, MIB, 1 << 50, "bytes")
    yield from _range((*path, "disk"), resources.disk_bytes, 0, 1 << 60, "bytes")
    yield from _range((*path, "pids"), resources.pids_max, 1, 4_194_304)
    for name, count in resources.devices.items():
        yield from _name((*path, "devices", name), name)
        yield from _range((*path, "devices", name), count, 1, 1 if name == KVM else DEVICES_MAX)
    for page, amount in resources.hugepages.items():
        at, size = (*path, "hugepages", page), page_bytes(page)
        if size is None:
            yield Problem(path=at, message="is no size that a page can have; for example 2Mi or 1Gi")
        elif amount % size or not 1 <= amount // size <= HUGEPAGES_MAX:
            yield Problem(path=at, message=f"expected 1 to {HUGEPAGES_MAX} pages of {page}, and no part of one")
    if resources.cpu_max_millis is not None:
        yield from _range((*path, "cpu_max"), resources.cpu_max_millis, 10, 1_000_000, "thousandths of a core")
        if resources.cpu_max_millis < resources.cpu_millis:
            yield Problem(path=(*path, "cpu_max"), message="must not be less than cpu, which is reserved")


def _services(path: Path, group: Group) -> Iterator[Problem]:
    yield from _range(path, len(group.services), 0, SERVICES_MAX, "services")
    yield from _unique(path, (service.name for service in group.services), "service")
    local = Counter(inner_ports(group.network).values())
    for index, service in enumerate(group.services):
        at: Path = (*path, index)
        yield from _service(at, service, {port.name for port in group.network.ports})
        for place, upstream in enumerate(service.upstreams):
            if upstream.port is None:
                continue
            yield from _range((*at, "upstreams", place, "port"), upstream.port, 1, 65535)
            if local[upstream.port] or upstream.port in RESERVED_PORTS:
                message = f"127.0.0.1:{upstream.port} is taken by another port, upstream or the sidecar"
                yield Problem(path=(*at, "upstreams", place, "port"), message=message)
            local[upstream.port] += 1


def _service(path: Path, service: Service, ports: set[str]) -> Iterator[Problem]:
    yield from _name((*path, "name"), service.name)
    if service.port is not None and service.port not in ports:
        known = ", ".join(sorted(ports)) or "none"
        yield Problem(path=(*path, "port"), message=f"the group has no port {service.port!r}; known: {known}")
    if service.allow and service.port is None:
        yield Problem(path=(*path, "allow"), message="a service without a port is never called; give it a port")
    yield from _unique((*path, "upstreams"), (upstream.service for upstream in service.upstreams), "upstream")
    for index, upstream in enumerate(service.upstreams):
        yield from _name((*path, "upstreams", index), upstream.service)
    yield from _unique((*path, "allow"), service.allow, "caller")
    for index, caller in enumerate(service.allow):
        if caller != "*":
            yield from _name((*path, "allow", index), caller)
    for at, message in traffic_findings(service):
        yield Problem(path=(*path, *at), message=message)
    if service.check is not None:
        yield from _check((*path, "check"), service.check, has_port=service.port is not None)


def _check(path: Path, check: Check, *, has_port: bool) -> Iterator[Problem]:
    if check.kind is CheckKind.COMMAND and not check.command:
        yield Problem(path=path, message="a command check needs a command")
    if check.kind is not CheckKind.COMMAND and not has_port:
        yield Problem(path=path, message=f"a {check.kind} check needs the service's port")
    if check.kind is CheckKind.HTTP and not check.path.startswith("/"):
        yield Problem(path=path, message=f"{check.path!r} is no path; it begins with /")
    for word in (check.path, *check.command):
        yield from _text(path, word)
    yield from _range((*path, "interval"), check.interval_s, 0.05, DURATION_S_MAX)
    yield from _range((*path, "timeout"), check.timeout_s, 0.01, DURATION_S_MAX)


def _name(path: Path, name: str) -> Iterator[Problem]:
    if not is_name(name):
        yield Problem(path=path, message=f"{name[:80]!r} is no name: {_NAME_RULE}")


def _text(path: Path, text: str) -> Iterator[Problem]:
    if "\0" in text or len(text) > _TEXT_CHARS_MAX:
        yield Problem(path=path, message=f"holds a NUL, or more than {_TEXT_CHARS_MAX} characters")


def _range(path: Path, number: float, least: float, most: float, unit: str = "") -> Iterator[Problem]:
    if not math.isfinite(number) or not least <= number <= most:
        yield Problem(path=path, message=f"{number} is not within {least} and {most}{unit and ' ' + unit}")


def _unique(path: Path, names: Iterable[str], noun: str) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(path=(*path, name), message=f"{noun} {name!r} stands here {count} times")
