"""Processes with `isolation: vm` on this node: a disk from the task's image, an initial file system, an emulator.

Owns DATA/microvms: `initrd-*`, which all such guests have, a disk for each image of a registry and each set of
artifacts, and each allocation's: those under names of its own, or one made for it where the image is a directory, which
may change. What one guest alone is told, secrets among it, is a disk of its own too, which lies in the node's memory.
"""

import asyncio
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from agent.belongings.artifacts import KeptArtifact
from agent.belongings.volumes import Disk
from agent.config import GuestConfig
from agent.drivers.microvm import ARTIFACTS_DISK, KERNEL_ARGUMENTS, MODULES, TOLD_DISK, given, initrd_files
from agent.drivers.process import Place, sandbox_id, sandbox_spec
from agent.drivers.vm import OVERLAY, GuestImages, guest_spec
from agent.pull.image import UnpackedImage
from agent.sandbox import process
from agent.sandbox.spec import INNER_USER, SandboxSpec, StartError
from agent.vms import make_overlay, make_ready
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.initrd import Entry, archive, loading_order, regular, with_parents
from outrider.model.allocation import Assignment
from outrider.model.belongings import OnChange
from outrider.model.job import MIB, Image, ImageKind, Task

_DISK, _ARTIFACTS, _UNFINISHED = ".ext4", ".artifacts.ext4", ".new"
_TOLD = "told"
_SECTOR_BYTES = 512
_UNUSED_MAX = 4  # disks of images that no allocation has, kept for the next one
_MAKE_S, _TOOL_S, _LDD_S = 300.0, 30.0, 10.0
_BLOCK_BYTES, _INODE_BYTES = 4096, 512
_ROOM_BYTES = 16 * MIB  # for what the file system needs for itself
_INSIDE = {OnChange.SIGNAL, OnChange.NONE}  # what its agent does to a guest that runs
_LIBRARY = re.compile(r"(/\S+) \(0x")
_ELF_VERSION = re.compile(rb"Linux version (\S+)")


class Microvms:
    """`config` is None where the node's operator gave it no kernel for guests. `kvm` as `agent.vms` has it."""

    def __init__(self, directory: Path, *, config: GuestConfig | None, kvm: Callable[[], bool]) -> None:
        self._directory = directory
        self._config = config
        self._kvm = kvm
        self._making = asyncio.Lock()  # two allocations of one image at once make one disk

    async def prepare(
        self, assignment: Assignment, task: Task, place: Place, image: UnpackedImage | None
    ) -> SandboxSpec:
        """Raises InputError and StartError where the job is at fault, HostError where this host is."""
        if self._config is None:
            raise StartError("this node has no kernel for guests: `guest: {kernel: ...}` in its agent's configuration")
        _can_be_told(task, self._config)
        told = given(task, sandbox_spec(assignment, task, place, image), place.files)
        directory, owner = Path(place.task_directory), place.uid_first + INNER_USER
        name = sandbox_id(assignment.alloc, task.name)
        try:
            disks = [*place.disks, await asyncio.to_thread(_write_told, Path(place.memory) / _TOLD, told, owner)]
            async with self._making:
                self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
                base = await self._base(self._directory / f"{name}{_DISK}", task, image)
                initrd = await self._common()
                if place.artifacts:
                    shown = await self._shown(self._directory / f"{name}{_ARTIFACTS}", place.artifacts)
                    disks.append(Disk(name=ARTIFACTS_DISK, path=str(shown), read_only=True))
        except OSError as error:
            raise HostError(str(self._directory), step=f"make what {name} boots from: {error.strerror}") from error
        if not make_ready(directory, owner):
            await make_overlay(directory / OVERLAY, base.stat().st_size, "raw", owner)
        images = GuestImages(disk=str(base), disk_format="raw", kernel=str(self._config.kernel), initrd=str(initrd))
        boots = Image(kind=ImageKind.DISK, kernel_arguments=KERNEL_ARGUMENTS)
        guest = msgspec.structs.replace(task, image=boots, files=())
        place = msgspec.structs.replace(place, disks=tuple(disks))
        return guest_spec(assignment, guest, place, images, kvm=self._kvm())

    def forget(self, alloc: AllocId) -> None:
        """Nothing runs of it."""
        for path in self._directory.glob(f"{alloc}.*"):
            path.unlink(missing_ok=True)

    async def _base(self, base: Path, task: Task, image: UnpackedImage | None) -> Path:
        """What the guest's disk was at first, however often it starts: room for the image, and `resources: disk`."""
        if await asyncio.to_thread(base.exists):
            return base
        if image is None:
            source = Path(task.image.reference)
            if not await asyncio.to_thread(source.is_dir):
                raise StartError(f"image directory {source} is not there on this node")
            await _make_disk(source, base, task.resources.disk_bytes)
            return base
        kept = self._kept(f"{image.digest} {task.resources.disk_bytes}")
        if not kept.exists():
            await _make_disk(Path(image.root), kept, task.resources.disk_bytes)
        self._take(kept, base)
        return base

    async def _shown(self, disk: Path, artifacts: tuple[KeptArtifact, ...]) -> Path:
        """One disk of them all, each at its path: a machine has few slots for disks."""
        kept = self._kept("\n".join(f"{artifact.digest} {artifact.path}" for artifact in artifacts))
        if not kept.exists():
            tree = self._directory / f"tree{_UNFINISHED}"
            try:
                await asyncio.to_thread(shutil.rmtree, tree, ignore_errors=True)
                for artifact in artifacts:
                    target = tree / artifact.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # Names for what is in the node's cache: nothing is copied.
                    done = await process.run(["cp", "-al", artifact.source, str(target)], timeout_s=_MAKE_S)
                    if done.code != 0:
                        raise HostError("cp", step=f"gather artifacts: {done.output.strip()[-500:]}")
                await _make_disk(tree, kept, 0)
            finally:
                await asyncio.to_thread(shutil.rmtree, tree, ignore_errors=True)
        self._take(kept, disk)
        return disk

    def _kept(self, content: str) -> Path:
        return self._directory / f"{hashlib.sha256(content.encode()).hexdigest()}{_DISK}"

    def _take(self, kept: Path, disk: Path) -> None:
        """Under a name of an allocation's. Those that no allocation has go, but for the newest."""
        os.utime(kept)
        disk.unlink(missing_ok=True)
        os.link(kept, disk)
        names = self._directory.glob(f"{'?' * len(kept.stem)}{_DISK}")
        unused = [path for path in names if path.stat().st_nlink == 1]
        for path in sorted(unused, key=lambda path: path.stat().st_mtime)[:-_UNUSED_MAX]:
            path.unlink()

    async def _common(self) -> Path:
        """Made anew where something that it is made from is another."""
        assert self._config is not None, "`prepare` asks first"
        stamps = [str((path, path.stat().st_mtime_ns)) for path in _sources(self._config)]
        digest = hashlib.sha256("\n".join(stamps).encode() + archive(initrd_files())).hexdigest()[:16]
        made = self._directory / f"initrd-{digest}"
        if not made.exists():
            for old in self._directory.glob("initrd-*"):
                old.unlink()
            libraries = await _libraries(self._config.agent)
            unfinished = made.with_suffix(_UNFINISHED)
            unfinished.write_bytes(archive(with_parents((*initrd_files(), *_brought(self._config, libraries)))))
            unfinished.chmod(0o444)
            unfinished.replace(made)
        return made


def _can_be_told(task: Task, config: GuestConfig) -> None:
    """Raises StartError where its files are to change while it runs, and nothing in there could do it."""
    wants = {*(use.on_change for use in task.secrets), *(use.on_change for use in task.templates)} & _INSIDE
    if wants and not config.agent.exists():
        message = f"on_change {min(wants)} takes a guest's agent, and this node has no {config.agent}"
        raise StartError(f"{message}: say restart, or install qemu-guest-agent on the node")


def _write_told(path: Path, told: tuple[Entry, ...], owner: int) -> Disk:
    """In whole sectors, as of a disk."""
    data = archive(told)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o400), "wb") as file:
        file.write(data + bytes(-len(data) % _SECTOR_BYTES))
    os.chown(path, owner, owner)
    return Disk(name=TOLD_DISK, path=str(path), read_only=True)


def kernel_version(config: GuestConfig | None) -> str:
    """Of the kernel that guests get; "" where there is none to give, as also without all that its start takes."""
    if config is None:
        return ""
    try:
        if not all(path.exists() for path in _sources(config)):
            return ""
        data = config.kernel.read_bytes()
    except OSError:
        return ""
    if data[0x202:0x206] == b"HdrS":  # Documentation/arch/x86/boot.rst: kernel_version
        (at,) = struct.unpack_from("<H", data, 0x20E)
        return data[0x200 + at :].partition(b"\0")[0].partition(b" ")[0][:64].decode(errors="replace")
    found = _ELF_VERSION.search(data)
    return found[1].decode(errors="replace") if found else "unknown"


def _sources(config: GuestConfig) -> tuple[Path, ...]:
    """What a guest's start takes of this host. The guest's agent may be absent: then nothing can be run in there."""
    agent = (config.agent,) if config.agent.exists() else ()
    modules = (config.modules,) if config.modules is not None else ()
    return (config.kernel, config.busybox, *modules, *agent)


def _brought(config: GuestConfig, libraries: tuple[Path, ...]) -> Iterator[Entry]:
    """Busybox, the kernel's modules in the order to load them, and the guest's agent with its libraries."""
    yield regular("bin/busybox", config.busybox.read_bytes(), mode=0o755)
    modules = _modules(config.modules)
    order = loading_order(modules, MODULES)
    yield regular("modules/order", "\n".join(order).encode())
    for name in order:
        yield regular(f"modules/{name}.ko", modules[name].read_bytes())
    if config.agent.exists():
        for path in (config.agent, *libraries):
            inside = "usr/sbin/qemu-ga" if path == config.agent else str(path).lstrip("/")
            yield regular(inside, path.read_bytes(), mode=0o755)


def _modules(directory: Path | None) -> Mapping[str, Path]:
    if directory is None:
        return {}
    return {path.stem.replace("-", "_"): path for path in directory.rglob("*.ko")}


async def _libraries(program: Path) -> tuple[Path, ...]:
    if not await asyncio.to_thread(program.exists):
        return ()
    done = await process.run(["ldd", str(program)], timeout_s=_LDD_S)
    return tuple(Path(found) for found in _LIBRARY.findall(done.output))


async def _make_disk(source: Path, target: Path, room_bytes: int) -> None:
    """All of `source`, with its owners, and `room_bytes` more. Raises StartError where `source` cannot be read."""
    unfinished = target.with_suffix(_UNFINISHED)
    try:
        size, inodes = await asyncio.to_thread(_size, source)
        size += room_bytes + _ROOM_BYTES + inodes * _INODE_BYTES
        with unfinished.open("wb") as file:
            file.truncate(-(-size // MIB) * MIB)
        options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-N", str(2 * inodes + 1024)]
        options += ["-b", str(_BLOCK_BYTES), "-E", "root_owner=0:0", "-d", str(source)]
        done = await process.run(["mkfs.ext4", *options, str(unfinished)], timeout_s=_MAKE_S)
        if done.code != 0:
            raise HostError("mkfs.ext4", step=f"make a disk of {source}: {done.output.strip()[-500:]}")
        # Nothing but what is in `source`.
        await process.run(["debugfs", "-w", "-R", "rmdir lost+found", str(unfinished)], timeout_s=_TOOL_S)
        unfinished.chmod(0o444)
        unfinished.replace(target)
    except OSError as error:
        raise HostError(str(target), step=f"make a disk of {source}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _size(source: Path) -> tuple[int, int]:
    """Bytes in whole blocks, and how many files and directories."""
    size, count = 0, 0
    for directory, names, files in os.walk(source):
        for name in (*names, *files):
            status = (Path(directory) / name).lstat()
            size += -(-status.st_size // _BLOCK_BYTES) * _BLOCK_BYTES + _BLOCK_BYTES
            count += 1
    return size, count
