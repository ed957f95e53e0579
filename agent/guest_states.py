"""A guest's state kept and taken up again: its memory, its devices and what it wrote to its disk, as one.

Owns what goes into a snapshot and what must be the same for a guest to go on from it. Whether the guest's emulator
runs, and its restart, are its caller's. Starts no task.
"""

import asyncio
import os
import platform
from collections.abc import Callable
from pathlib import Path

from agent import qmp
from agent.drivers.vm import MACHINE, OVERLAY, QMP, GuestImages, cpus
from agent.sandbox.spec import StartError
from agent.snapshots import DISK, IMAGES, MEMORY, SEED, FileSum, Manifest, Snapshots, copy_sparse, sum_of
from outrider.clock import wall_s
from outrider.errors import HostError, OutriderError, RefusedError
from outrider.model.allocation import Assignment
from outrider.model.job import Task, Value, has_seed

KVM, TCG = "kvm", "tcg"
# In the sandbox's own directory, which no guest reaches.
_PENDING, _WAITS, _TAKEN_UP = "load", "waits", "loaded"


class GuestPlace(Value, frozen=True, kw_only=True):
    """Where one guest's files are: the emulator's directory, the agent's beside it, and what is in memory alone."""

    directory: Path
    sandbox: Path
    memory: Path


class Origin(Value, frozen=True, kw_only=True):
    """What ran a guest: a guest goes on only under the like."""

    qemu: str
    accelerator: str  # KVM or TCG
    processor: str  # of the host, where KVM shows it to the guest


class GuestStates:
    """`qemu_version`: of the emulator that would be started; `kvm`: whether with KVM."""

    def __init__(
        self,
        *,
        snapshots: Snapshots,
        cluster: str,
        qemu_version: Callable[[], str],
        kvm: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self.snapshots = snapshots
        self._cluster = cluster
        self._qemu_version = qemu_version
        self._kvm = kvm
        self.changed = changed

    async def take(
        self, name: str, assignment: Assignment, task: Task, place: GuestPlace, images: GuestImages, *, kvm: bool
    ) -> Manifest:
        """Keep what runs at `place` as `name`. The guest pauses meanwhile, and runs on in every case.

        Raises RefusedError where it cannot be kept so, HostError where emulator or host fail.
        """
        if task.volumes:
            names = ", ".join(each.volume for each in task.volumes)
            raise RefusedError("unsupported", f"{task.name} has volumes ({names}): what is in them no snapshot keeps")
        if task.secrets or task.templates:
            message = "has secrets or templates, which are in its memory: a snapshot would keep them on disk"
            raise RefusedError("unsupported", f"{task.name} {message}")
        control = place.directory / QMP
        made = self.snapshots.begin(name)
        try:
            version = await qmp.version(control)
            memory = os.open(made / MEMORY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                await qmp.save(control, memory)
                await asyncio.to_thread(_copy_disks, place, made)
            finally:
                os.close(memory)
                await qmp.resume(control)
            manifest = Manifest(
                name=name,
                made_at_s=wall_s(),
                cluster=self._cluster,
                job=assignment.job,
                group=assignment.group.name,
                task=task.name,
                qemu=version,
                machine=MACHINE,
                accelerator=KVM if kvm else TCG,
                processor=_processor() if kvm else "",
                cpus=cpus(task.resources),
                memory_bytes=task.resources.memory_bytes,
                disk_bytes=task.resources.disk_bytes if images.disk else 0,
                disk_format=images.disk_format,
                kernel_arguments=task.image.kernel_arguments,
                images=await asyncio.to_thread(_link_images, images, made),
                files=await asyncio.to_thread(_sums, made),
            )
            await asyncio.to_thread(self.snapshots.keep, made, manifest)
        except OSError as error:
            raise HostError(str(made), step=f"keep snapshot {name}: {error.strerror}") from error
        finally:
            self.snapshots.drop(made)  # gone already where it was kept
        self.changed()
        return manifest

    def remove(self, name: str) -> None:
        self.snapshots.remove(name)
        self.changed()

    def fitting(self, name: str, task: Task) -> Manifest:
        """Raises RefusedError where a guest of `task` could not go on from it, with all that is in the way."""
        manifest = self.snapshots.manifest(name)
        reasons = [*misfits(manifest, task), *self.foreign(manifest)]
        if reasons:
            raise RefusedError("unfit", f"snapshot {name} does not fit: {'; '.join(reasons)}")
        return manifest

    def wanted(self, task: Task, sandbox: Path) -> str:
        """The snapshot that the next start goes on from; "" where it boots."""
        pending = sandbox / _PENDING
        if pending.exists():
            return pending.read_text()
        return "" if (sandbox / _TAKEN_UP).exists() else task.image.start_from

    def want(self, name: str, sandbox: Path) -> None:
        """From the next start on, also where another agent makes it."""
        unfinished = sandbox / f"{_PENDING}.new"
        unfinished.write_text(name)
        unfinished.replace(sandbox / _PENDING)

    async def check(self, name: str, task: Task, sandbox: Path) -> None:
        """Raises StartError where it does not fit, or is damaged."""
        try:
            await asyncio.to_thread(self.snapshots.check, self.fitting(name, task))
        except RefusedError as error:
            (sandbox / _PENDING).unlink(missing_ok=True)
            raise StartError(str(error)) from error

    async def lay_out(self, name: str, place: GuestPlace, owner: int) -> None:
        """The disks of a checked snapshot, where the emulator finds them."""
        try:
            kept, manifest = self.snapshots.path(name), self.snapshots.manifest(name)
            await asyncio.to_thread(_lay_out, kept, manifest, place, owner)
        except (OSError, RefusedError) as error:
            raise HostError(str(place.directory), step=f"lay out snapshot {name}: {error}") from error

    async def take_up(self, name: str, place: GuestPlace) -> None:
        """The started emulator's guest goes on from there. Raises StartError where it does not."""
        try:
            with (self.snapshots.path(name) / MEMORY).open("rb", buffering=0) as memory:
                await qmp.load(place.directory / QMP, memory.fileno())
        except (OSError, OutriderError) as error:
            raise StartError(f"the guest does not go on from snapshot {name}: {error}") from error
        finally:
            (place.sandbox / _PENDING).unlink(missing_ok=True)
        self.settle(place.sandbox)

    def begin(self, sandbox: Path, *, waits: bool) -> None:
        """An emulator is about to be started; whether to be given a guest's state."""
        sandbox.mkdir(mode=0o711, parents=True, exist_ok=True)
        if waits:
            (sandbox / _WAITS).touch()
        else:
            (sandbox / _WAITS).unlink(missing_ok=True)

    def settle(self, sandbox: Path) -> None:
        """It has its guest. From here on its disk is what it starts from."""
        (sandbox / _TAKEN_UP).touch()
        (sandbox / _WAITS).unlink(missing_ok=True)

    def waits(self, sandbox: Path) -> bool:
        return (sandbox / _WAITS).exists()

    def was_taken_up(self, sandbox: Path) -> bool:
        return (sandbox / _TAKEN_UP).exists()

    def origin(self) -> Origin:
        """What a guest that is started here comes from."""
        accelerator = KVM if self._kvm() else TCG
        return Origin(qemu=self._qemu_version(), accelerator=accelerator, processor=_processor() if self._kvm() else "")

    def foreign(self, origin: "Manifest | Origin") -> list[str]:
        """What is different about this node."""
        found, here = [], self.origin()
        if here.qemu.split(".")[:2] != origin.qemu.split(".")[:2]:
            found.append(f"it was made by QEMU {origin.qemu}, and this node has {here.qemu or 'none'}")
        if origin.accelerator != here.accelerator:
            found.append(f"it was made under {origin.accelerator}, and this node has {here.accelerator}")
        elif origin.processor != here.processor:
            found.append(f"it was made on {origin.processor}, and this node has {here.processor}")
        return found


def misfits(manifest: Manifest, task: Task) -> list[str]:
    """What the job says otherwise than the guest in the snapshot was."""
    image, resources = task.image, task.resources
    given = {"disk": image.sha256 if image.reference else ""}
    given |= {name: file.sha256 if file else "" for name, file in (("kernel", image.kernel), ("initrd", image.initrd))}
    kept = {name: manifest.images[name].sha256 if name in manifest.images else "" for name in given}
    found = [f"another {name}" for name in given if given[name] != kept[name]]
    pairs = (
        ("memory", manifest.memory_bytes, resources.memory_bytes),
        ("processors", manifest.cpus, cpus(resources)),
        ("disk size", manifest.disk_bytes, resources.disk_bytes if image.reference else 0),
        ("machine", manifest.machine, MACHINE),
    )
    found += [f"{what} {theirs} there, {ours} here" for what, theirs, ours in pairs if theirs != ours]
    if (SEED in manifest.files) != has_seed(task):
        found.append("files on a disk of their own in one, none in the other")
    return found


def _disks(place: GuestPlace) -> tuple[tuple[str, Path], ...]:
    """What a snapshot calls each, and where it is."""
    return (DISK, place.directory / OVERLAY), (SEED, place.memory / SEED)


def _copy_disks(place: GuestPlace, made: Path) -> None:
    for name, disk in _disks(place):
        if disk.exists():
            copy_sparse(disk, made / name)


def _lay_out(kept: Path, manifest: Manifest, place: GuestPlace, owner: int) -> None:
    for name, disk in _disks(place):
        disk.unlink(missing_ok=True)
        if name in manifest.files:
            copy_sparse(kept / name, disk)
            os.chown(disk, owner, owner)


def _link_images(images: GuestImages, made: Path) -> dict[str, FileSum]:
    """In the cache they go when others need room: here they stay. Named by what is in them, so not read again."""
    (made / IMAGES).mkdir()
    found = {}
    for role in ("disk", "kernel", "initrd"):
        if path := getattr(images, role):
            source = Path(path)
            (made / IMAGES / source.name).unlink(missing_ok=True)
            os.link(source, made / IMAGES / source.name)
            found[role] = FileSum(sha256=source.name, size_bytes=source.stat().st_size)
    return found


def _sums(made: Path) -> dict[str, FileSum]:
    return {name: sum_of(made / name) for name in (MEMORY, DISK, SEED) if (made / name).exists()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
