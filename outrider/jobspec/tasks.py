"""`tasks:` of a group -> `Task` values. Reads the small files that travel with the job."""

import stat
from pathlib import Path as FilePath

from outrider.ids import TaskName
from outrider.jobspec.belongings import (
    read_artifacts,
    read_secrets,
    read_sticky,
    read_templates,
    read_ulimits,
    read_volumes,
)
from outrider.jobspec.document import Mapping, Node, Scalar
from outrider.jobspec.fields import Faults, Fields, Path, named, text_of
from outrider.jobspec.units import cpu_millis, duration_s, size_bytes
from outrider.model.job import (
    CloudInit,
    Driver,
    File,
    GuestFile,
    Image,
    ImageKind,
    Isolation,
    PullPolicy,
    Resources,
    Task,
    TaskRole,
)

FILE_BYTES_MAX = 256 * 1024
FILES_BYTES_MAX = 1024 * 1024
_TASK_KEYS = (
    "driver", "image", "files", "command", "args", "env", "user", "workdir", "resources", "kill_signal", "kill_timeout",
    "role", "secrets", "volumes", "sticky", "artifacts", "templates", "capabilities", "cloud_init", "isolation",
)  # fmt: skip
_IMAGE_EXAMPLES = (
    "host, oci:REGISTRY/NAME:TAG, {oci: REGISTRY/NAME:TAG, pull: always}, oci-layout:PATH, docker-archive:PATH, "
    "dir:PATH or {disk: PATH, sha256: ...}"
)
_RESOURCE_KEYS = (
    "cpu",
    "cpu_max",
    "memory",
    "disk",
    "pids",
    "devices",
    "shm",
    "io_weight",
    "nice",
    "ulimits",
    "hugepages",
)
_GUEST_FILES = ("kernel", "initrd", "disk")
_GUEST_KEYS = (*_GUEST_FILES, "sha256", "kernel_arguments", "boot_deadline", "start_from")
_ON_THE_NODE = {ImageKind.OCI_LAYOUT, ImageKind.DOCKER_ARCHIVE, ImageKind.DIR}


class FilesBudget:
    """All files of one job file together: found beside it, and bounded."""

    def __init__(self, directory: FilePath) -> None:
        self._directory = directory
        self._left = FILES_BYTES_MAX

    def read(self, inside: str, outside: str) -> File:
        """Raises ValueError with what is wrong with the file outside."""
        path = self._directory / outside
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path}: no regular file")
            with path.open("rb") as opened:
                content = opened.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}; paths begin at the job file") from error
        if len(content) > FILE_BYTES_MAX:
            raise ValueError(f"{path}: {status.st_size} bytes; a file of a job has at most {FILE_BYTES_MAX}")
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"{path}: the files of a job have at most {FILES_BYTES_MAX} bytes in all; use an image")
        return File(path=inside, content=content, mode=0o755 if status.st_mode & stat.S_IXUSR else 0o644)


def read_tasks(node: Node, path: Path, budget: FilesBudget, faults: Faults) -> tuple[Task, ...]:
    return tuple(_task(name, inner, (*path, name), budget, faults) for name, inner in named(node, path, faults))


def _task(name: str, node: Node, path: Path, budget: FilesBudget, faults: Faults) -> Task:
    fields = Fields(node, path, faults, _TASK_KEYS)
    default = Task(name=TaskName(name))
    return Task(
        name=TaskName(name),
        driver=fields.choice("driver", Driver, default.driver),
        isolation=fields.choice("isolation", Isolation, default.isolation),
        role=fields.choice("role", TaskRole, default.role),
        image=_image(fields, faults),
        cloud_init=_cloud_init(fields, budget, faults),
        files=_files(fields, budget, faults),
        command=fields.texts("command", 'write [sh, -c, "..."] for a shell'),
        args=fields.texts("args"),
        env=_env(fields, faults),
        user=fields.integer("user", 0) if "user" in fields else None,
        workdir=fields.text("workdir", default.workdir),
        secrets=read_secrets(fields, faults),
        volumes=read_volumes(fields, faults),
        sticky=read_sticky(fields, faults),
        artifacts=read_artifacts(fields, faults),
        templates=read_templates(fields, faults, budget.read),
        capabilities=fields.texts("capabilities"),
        resources=_resources(fields, faults),
        kill_signal=fields.text("kill_signal", default.kill_signal),
        kill_timeout_s=fields.quantity("kill_timeout", duration_s, default.kill_timeout_s),
    )


def _image(task: Fields, faults: Faults) -> Image:
    node = task.node("image")
    if node is None:
        return Image()
    if isinstance(node, Mapping) and any(key.text == ImageKind.OCI for key, _ in node.entries):
        return _registry_image(Fields(node, (*task.path, "image"), faults, (ImageKind.OCI, "pull")))
    if not isinstance(node, Scalar):
        return _guest_image(Fields(node, (*task.path, "image"), faults, _GUEST_KEYS), faults)
    if node.text == ImageKind.HOST:
        return Image()
    scheme, _, reference = node.text.partition(":")
    if scheme not in {ImageKind.OCI, *_ON_THE_NODE} or not reference:
        task.fault("image", f"{node.text[:80]!r} is no image; expected {_IMAGE_EXAMPLES}")
        return Image()
    kind = ImageKind(scheme)
    if kind in _ON_THE_NODE and not reference.startswith("/"):
        task.fault("image", f"{reference[:80]!r} is looked for on the node: give the whole path, from / on")
    return Image(kind=kind, reference=reference)


def _registry_image(fields: Fields) -> Image:
    reference = fields.text(ImageKind.OCI, "")
    return Image(kind=ImageKind.OCI, reference=reference, pull=fields.choice("pull", PullPolicy, Image().pull))


def _guest_image(fields: Fields, faults: Faults) -> Image:
    """`sha256` is one text where there is a disk alone, else one for each file."""
    if "kernel" not in fields:
        fields.required("disk", "/srv/images/db.qcow2")
    node = fields.node("sha256")
    sums = {"disk": fields.text("sha256", "")} if node is None or isinstance(node, Scalar) else {}
    if node is not None and not isinstance(node, Scalar):
        each = Fields(node, (*fields.path, "sha256"), faults, _GUEST_FILES)
        sums = {name: each.text(name, "") for name in _GUEST_FILES}
    files = {name: fields.text(name, "") for name in _GUEST_FILES}

    def file(name: str) -> GuestFile | None:
        return GuestFile(reference=files[name], sha256=sums.get(name, "")) if files[name] else None

    return Image(
        kind=ImageKind.DISK,
        reference=files["disk"],
        sha256=sums.get("disk", ""),
        kernel=file("kernel"),
        initrd=file("initrd"),
        kernel_arguments=fields.text("kernel_arguments", ""),
        boot_deadline_s=fields.quantity("boot_deadline", duration_s, Image().boot_deadline_s),
        start_from=fields.text("start_from", ""),
    )


def _files(task: Fields, budget: FilesBudget, faults: Faults) -> tuple[File, ...]:
    node = task.node("files")
    path = (*task.path, "files")
    files = []
    for inside, value in named(node, path, faults) if node is not None else ():
        outside = text_of(value, (*path, inside), faults)
        if outside is None:
            continue
        try:
            files.append(budget.read(inside, outside))
        except ValueError as error:
            faults.add((*path, inside), str(error), value.mark)
    return tuple(files)


def _cloud_init(task: Fields, budget: FilesBudget, faults: Faults) -> CloudInit | None:
    node = task.node("cloud_init")
    if node is None:
        return None
    fields = Fields(node, (*task.path, "cloud_init"), faults, ("user", "ssh_keys", "files", "commands"))
    return CloudInit(
        user=fields.text("user", ""),
        ssh_keys=fields.texts("ssh_keys"),
        files=_files(fields, budget, faults),
        commands=fields.texts("commands"),
    )


def _env(task: Fields, faults: Faults) -> dict[str, str]:
    node = task.node("env")
    path = (*task.path, "env")
    texts = (
        (name, text_of(value, (*path, name), faults))
        for name, value in (named(node, path, faults) if node is not None else ())
    )
    return {name: text for name, text in texts if text is not None}


def _resources(task: Fields, faults: Faults) -> Resources:
    node = task.node("resources")
    if node is None:
        return Resources()
    default = Resources()
    fields = Fields(node, (*task.path, "resources"), faults, _RESOURCE_KEYS)
    return Resources(
        cpu_millis=fields.quantity("cpu", cpu_millis, default.cpu_millis),
        cpu_max_millis=fields.quantity("cpu_max", cpu_millis, 0) if "cpu_max" in fields else None,
        memory_bytes=fields.quantity("memory", size_bytes, default.memory_bytes),
        disk_bytes=fields.quantity("disk", size_bytes, default.disk_bytes),
        pids_max=fields.integer("pids", default.pids_max),
        devices=_devices(fields, faults),
        hugepages=_hugepages(fields, faults),
        shm_bytes=fields.quantity("shm", size_bytes, default.shm_bytes),
        io_weight=fields.integer("io_weight", default.io_weight),
        nice=fields.integer("nice", default.nice),
        ulimits=read_ulimits(fields, faults),
    )


def _devices(resources: Fields, faults: Faults) -> dict[str, int]:
    node = resources.node("devices")
    if node is None:
        return {}
    names = [key.text for key, _ in node.entries] if isinstance(node, Mapping) else []
    counts = Fields(node, (*resources.path, "devices"), faults, names)
    return {name: counts.integer(name, 1) for name in names}


def _hugepages(resources: Fields, faults: Faults) -> dict[str, int]:
    node = resources.node("hugepages")
    if node is None:
        return {}
    pages = [key.text for key, _ in node.entries] if isinstance(node, Mapping) else []
    amounts = Fields(node, (*resources.path, "hugepages"), faults, pages)
    return {page: amounts.quantity(page, size_bytes, 0) for page in pages}
