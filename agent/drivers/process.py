"""A process task as a sandbox: its root, what is mounted, its limits, its command with the names filled in.

Pure: owns the translation alone; `task_directory` writes files, `agent.sandbox` runs the result.
"""

import re
from collections.abc import Mapping
from typing import assert_never

from agent.belongings.artifacts import KeptArtifact
from agent.belongings.volumes import Disk
from agent.pull.image import UnpackedImage
from agent.sandbox.spec import (
    INNER_USER,
    Device,
    DirectoryRoot,
    HostRoot,
    ImageRoot,
    Limits,
    Mount,
    Root,
    SandboxSpec,
    StartError,
    Tmpfs,
)
from outrider.errors import InputError
from outrider.ids import AllocId, NodeId, TaskName
from outrider.model.allocation import Assignment
from outrider.model.hugepages import page_bytes
from outrider.model.job import ImageKind, Task, Value, inner_ports, published_ports

TASK_DIRECTORY = "/task"  # inside; writable, of limited size, kept over restarts of the task

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HOSTNAME_CHARS_MAX = 63
_PRIVATE = "/tmp"  # noqa: S108 - the target inside, a private one
# `${name}`; a dollar before it keeps it as it is, for shells: `$${HOME}` is `${HOME}`.
_REFERENCE = re.compile(r"(\$?)\$\{([^}]*)\}")


class Place(Value, frozen=True, kw_only=True):
    """Where on this host the agent puts a task."""

    node: NodeId
    uid_first: int
    network_namespace: str
    directory: str  # the sandbox's own
    task_directory: str  # as `task_directory.prepare` made it
    resolv_conf: str = ""  # a file that says where the mesh's names are answered; "" is none
    env: Mapping[str, str] = {}  # what the agent gives it beside what the job says
    secrets: Mapping[str, str] = {}  # "secret.NAME" -> its text, for the environment alone
    devices: tuple[Device, ...] = ()
    disks: tuple[Disk, ...] = ()  # a vm's, beside its own
    memory: str = ""  # of a vm: a directory, not on any disk, that its emulator may be shown
    files: Mapping[str, bytes] = {}  # of a vm: "secrets/NAME" and "templates/NAME"
    artifacts: tuple[KeptArtifact, ...] = ()  # of a vm
    mounts: tuple[Mount, ...] = ()  # what else the agent provides, such as the namespace's own /sys


def sandbox_id(alloc: AllocId, task: TaskName) -> str:
    return f"{alloc}.{task}"


def sandbox_spec(assignment: Assignment, task: Task, place: Place, image: UnpackedImage | None = None) -> SandboxSpec:
    """The sandbox that runs `task`. `image`: what its image says, where that had to be fetched.

    Raises InputError where the command or the environment names something unknown, StartError where this agent cannot
    run such an image.
    """
    names = references(assignment, task, place.node)
    user, group = identity(task, image)
    where = f"job {assignment.job}, task {task.name}"
    command = task.command
    if image is not None and not command:
        command = (*image.entrypoint, *(task.args or image.command))
    if not command:
        raise InputError(f"{where}: no command; give one as a list, such as command: [python3, app.py]")
    mounts = [Mount(source=place.task_directory, target=TASK_DIRECTORY, read_only=False), *place.mounts]
    if place.resolv_conf:
        mounts.append(Mount(source=place.resolv_conf, target="/etc/resolv.conf"))
    resources = task.resources
    return SandboxSpec(
        id=sandbox_id(assignment.alloc, task.name),
        argv=_argv(task, command, names, where),
        env={**environment(assignment, task, place.node, {**names, **place.secrets}, image), **place.env},
        cwd=task.workdir or (TASK_DIRECTORY if image is None else image.workdir or "/"),
        root=_root(task, image, where),
        mounts=tuple(mounts),
        tmpfs=(Tmpfs(target=_PRIVATE, size_bytes=resources.disk_bytes),),
        network_namespace=place.network_namespace,
        uid_first=place.uid_first,
        user=user,
        group=group,
        hostname=f"{assignment.group.name}-{assignment.index}"[-_HOSTNAME_CHARS_MAX:].lstrip("-"),
        limits=Limits(
            cpu_millis=resources.cpu_millis,
            cpu_max_millis=resources.cpu_max_millis,
            memory_bytes=resources.memory_bytes,
            pids_max=resources.pids_max,
            shm_bytes=resources.shm_bytes,
            io_weight=resources.io_weight,
            nice=resources.nice,
            ulimits=resources.ulimits,
            hugepages={size: amount for page, amount in resources.hugepages.items() if (size := page_bytes(page))},
        ),
        capabilities=task.capabilities,
        devices=place.devices,
        directory=place.directory,
    )


def identity(task: Task, image: UnpackedImage | None) -> tuple[int, int]:
    """The uid and gid inside: the job's, or the image's, or those of a sandbox that nobody says anything about."""
    user, group = (INNER_USER, INNER_USER) if image is None else (image.user, image.group)
    return (user, group) if task.user in (None, user) else (task.user, task.user)


def references(assignment: Assignment, task: Task, node: NodeId) -> dict[str, str]:
    """What `${...}` may name in a command and in the environment."""
    ports = inner_ports(assignment.group.network)
    published = published_ports(assignment.group.network, assignment.dynamic_ports)
    return {
        "task.dir": TASK_DIRECTORY,
        "alloc.id": assignment.alloc,
        "alloc.index": str(assignment.index),
        "node.id": node,
        "job": assignment.job,
        "group": assignment.group.name,
        "task": task.name,
        **{f"port.{name}": str(number) for name, number in ports.items()},
        **{f"host_port.{name}": str(number) for name, number in published.items()},
        **{f"param.{name}": value for name, value in assignment.arguments.items()},
    }


def environment(
    assignment: Assignment,
    task: Task,
    node: NodeId,
    names: Mapping[str, str],
    image: UnpackedImage | None,
) -> dict[str, str]:
    """The workload's environment; what the job sets goes before what the agent would set, and the image before both."""
    ports = inner_ports(assignment.group.network)
    published = published_ports(assignment.group.network, assignment.dynamic_ports)
    where = f"job {assignment.job}, task {task.name}"
    given = {name: interpolate(value, names, f"{where}, env {name}") for name, value in task.env.items()}
    return {
        "PATH": _PATH,
        "HOME": TASK_DIRECTORY,
        "LANG": "C.UTF-8",
        **({} if image is None else image.env),
        "OUTRIDER_ALLOC_ID": assignment.alloc,
        "OUTRIDER_ALLOC_INDEX": str(assignment.index),
        "OUTRIDER_JOB": assignment.job,
        "OUTRIDER_GROUP": assignment.group.name,
        "OUTRIDER_TASK": task.name,
        "OUTRIDER_NODE": node,
        **{_variable("PORT", name): str(number) for name, number in ports.items()},
        **{_variable("HOST_PORT", name): str(number) for name, number in published.items()},
        **{f"OUTRIDER_PARAM_{name.upper()}": value for name, value in assignment.arguments.items()},
        **given,
    }


def _variable(prefix: str, port: str) -> str:
    return f"{prefix}_{port.upper().replace('-', '_')}"


def interpolate(text: str, names: Mapping[str, str], where: str) -> str:
    """`text` with each `${name}` replaced. Raises InputError naming what is unknown, and what is known."""

    def value(match: re.Match[str]) -> str:
        dollar, name = match.groups()
        if dollar:
            return match.group(0)[1:]
        if name not in names:
            known = ", ".join(sorted(names))
            raise InputError(f"{where}: ${{{name}}} is unknown; known are {known} ($${{{name}}} stays as it is)")
        return names[name]

    return _REFERENCE.sub(value, text)


def _argv(task: Task, command: tuple[str, ...], names: Mapping[str, str], where: str) -> tuple[str, ...]:
    """What the job says has its names filled in; what the image says is left as it is."""
    given = set(task.command or task.args)
    return tuple(interpolate(part, names, f"{where}, command") if part in given else part for part in command)


def _root(task: Task, image: UnpackedImage | None, where: str) -> Root:
    match task.image.kind:
        case ImageKind.HOST:
            return HostRoot()
        case ImageKind.DIR:
            return DirectoryRoot(path=task.image.reference)
        case ImageKind.OCI | ImageKind.OCI_LAYOUT | ImageKind.DOCKER_ARCHIVE:
            assert image is not None, "an allocation's images are there before its tasks are started"
            return ImageRoot(path=image.root, writable_bytes=task.resources.disk_bytes)
        case ImageKind.DISK:
            raise StartError(f"{where}: {task.image.reference} is a disk for a vm; say `driver: vm`")
        case _:
            assert_never(task.image.kind)
