"""Volumes of this node: made, given to tasks, snapshotted, removed. They outlive allocations, agents and reboots.

    DATA/volumes/KEY/disk.img            the volume: an ext4 file system of exactly the size that was asked for
    DATA/volumes/KEY/fresh               nobody has had it yet
    DATA/volumes/KEY/snapshots/NAME.img
    RUN/volumes/KEY/root                 where it is mounted while tasks have it
    RUN/volumes/KEY/claims/ALLOC         who has it: "process" or "vm"

KEY is NAMESPACE.NAME. A volume with a path is that directory, and only its claims are here. Owns all of the above.
One change of a volume at a time. Starts no task.
"""

import asyncio
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from agent.belongings.mounted import Mounted
from agent.sandbox import mounts, process
from agent.sandbox.spec import Mount, StartError
from outrider.errors import HostError, RefusedError
from outrider.ids import AllocId
from outrider.model.allocation import Assignment
from outrider.model.belongings import Access, Volume, VolumeUse
from outrider.model.job import Task, Value

_DISK, _FRESH, _SNAPSHOTS = "disk.img", "fresh", "snapshots"
_PROCESS, _VM = "process", "vm"
_TOOL_S, _COPY_S = 60.0, 3600.0
_RELEASED_S, _POLL_S = 120.0, 0.2  # for who had it before to be cleaned away
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE and FITHAW of <linux/fs.h>
_BLOCK_BYTES: Final = 512


class Disk(Value, frozen=True, kw_only=True):
    """A volume as a vm has it."""

    name: str
    path: str
    read_only: bool


class Volumes:
    """`paths`: the directories of this node below which a volume's path may be."""

    def __init__(self, *, data: Path, run: Path, mounted: Mounted, paths: tuple[Path, ...]) -> None:
        self._data = data / "volumes"
        self._run = run / "volumes"
        self._mounted = mounted
        self._paths = paths
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(self, volume: Volume) -> int:
        """How many bytes of the disk it takes. Raises RefusedError and HostError, and then nothing of it is left."""
        async with self._lock(volume):
            if volume.path:
                self._checked_path(volume)
                return 0
            directory = self._data / volume.key
            if (directory / _DISK).exists() and not (directory / _FRESH).exists():
                message = f"{directory} holds a volume of this name already; move it away first"
                raise RefusedError("conflict", message)
            shutil.rmtree(directory, ignore_errors=True)  # one that nobody ever had, or half made
            try:
                return await self._make(directory, volume.size_bytes)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    async def delete(self, volume: Volume) -> int:
        """Gone already is fine. What is in a path is nobody's to delete."""
        async with self._lock(volume):
            if claims := self._claims(volume):
                raise RefusedError("in-use", f"allocation {', '.join(claims)} has it")
            mounts.unmount(self._run / volume.key / "root")
            shutil.rmtree(self._run / volume.key, ignore_errors=True)
            if not volume.path:
                await asyncio.to_thread(shutil.rmtree, self._data / volume.key, ignore_errors=True)
            return 0

    async def snapshot(self, volume: Volume, name: str) -> int:
        """As of one moment: what is mounted is frozen while it is copied. How many bytes it takes."""
        async with self._lock(volume):
            source = self._disk(volume)
            if _VM in self._claims(volume).values():
                raise RefusedError("in-use", "a vm has it, and may be writing: stop it first")
            target = source.parent / _SNAPSHOTS / f"{name}.img"
            root = self._run / volume.key / "root"
            with _frozen(root) if root.is_mount() else _untouched():
                await self._copied(source, target)
            return target.stat().st_blocks * _BLOCK_BYTES

    async def restore(self, volume: Volume, name: str) -> int:
        async with self._lock(volume):
            target = self._disk(volume)
            if claims := self._claims(volume):
                raise RefusedError("in-use", f"allocation {', '.join(claims)} has it")
            source = target.parent / _SNAPSHOTS / f"{name}.img"
            if not source.exists():
                raise RefusedError("not-found", f"there is no snapshot {name} here")
            mounts.unmount(self._run / volume.key / "root")
            await self._copied(source, target)
            return 0

    async def delete_snapshot(self, volume: Volume, name: str) -> int:
        async with self._lock(volume):
            (self._disk(volume).parent / _SNAPSHOTS / f"{name}.img").unlink(missing_ok=True)
            return 0

    async def mount(
        self, assignment: Assignment, task: Task, *, uid_first: int, user: int, group: int
    ) -> tuple[Mount, ...]:
        """The task's volumes, to be bound into its sandbox. Raises StartError and HostError."""
        found = []
        for number, (use, volume) in enumerate(_wanted(assignment, task)):
            async with self._lock(volume):
                await self._claim(volume, assignment.alloc, _PROCESS)
                source = await self._shown(volume, user, group)
                shown = await self._mounted.show(
                    source, assignment.alloc, task.name, f"volume{number}", uid_first=uid_first
                )
            read_only = use.read_only or volume.read_only
            found.append(Mount(source=shown, target=use.target, read_only=read_only))
        return tuple(found)

    async def disks(self, assignment: Assignment, task: Task, *, owner: int) -> tuple[Disk, ...]:
        """The same for a vm, whose emulator runs as the host's `owner`."""
        found = []
        for use, volume in _wanted(assignment, task):
            async with self._lock(volume):
                await self._claim(volume, assignment.alloc, _VM)
                path = self._disk(volume)
                mounts.unmount(self._run / volume.key / "root")
                os.chown(path, owner, owner)
                (path.parent / _FRESH).unlink(missing_ok=True)
            found.append(Disk(name=volume.name, path=str(path), read_only=use.read_only or volume.read_only))
        return tuple(found)

    async def release(self, alloc: AllocId) -> None:
        """Nothing runs of it. A volume that nobody has any more is unmounted."""
        self._mounted.release(alloc)
        for claim in self._run.glob(f"*/claims/{alloc}"):
            directory = claim.parent
            claim.unlink(missing_ok=True)
            if not any(directory.iterdir()):
                mounts.unmount(directory.with_name("root"))

    async def _make(self, directory: Path, size_bytes: int) -> int:
        disk = directory / _DISK
        try:
            await asyncio.to_thread(_allocated, disk, size_bytes)
        except OSError as error:
            hint = "the node's disk is full: take less, or another node" if error.errno == errno.ENOSPC else ""
            raise HostError(str(disk), step=f"make {size_bytes} bytes: {error.strerror}", hint=hint) from error
        argv = ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1", str(disk))
        await _done(argv, timeout_s=_TOOL_S, doing="make a file system")
        return disk.stat().st_blocks * _BLOCK_BYTES

    async def _shown(self, volume: Volume, user: int, group: int) -> Path:
        """Where its tree is on the host, mounted if it was not."""
        if volume.path:
            try:
                return self._checked_path(volume)
            except RefusedError as error:
                raise StartError(f"volume {volume.name}: {error}") from error
        disk, root = self._disk(volume), self._run / volume.key / "root"
        if root.is_mount():
            return root
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        checked = await process.run((process.program("e2fsck"), "-p", str(disk)), timeout_s=_COPY_S)
        if checked.code not in (0, 1):  # 1: what was wrong is right now
            raise HostError(str(disk), step=f"check its file system: {checked.output.strip()[-300:]}")
        argv = ("mount", "-t", "ext4", "-o", "loop,nosuid,nodev", str(disk), str(root))
        await _done(argv, timeout_s=_TOOL_S, doing="mount the volume")
        if (disk.parent / _FRESH).exists():
            (root / "lost+found").rmdir()
            os.chown(root, user, group)
            (disk.parent / _FRESH).unlink()
        return root

    async def _claim(self, volume: Volume, alloc: AllocId, kind: str) -> None:
        """Waits for who had it before and has not been cleaned away. Raises HostError."""
        until_s = asyncio.get_running_loop().time() + _RELEASED_S
        while volume.access is Access.SINGLE and (others := self._claims(volume).keys() - {alloc}):
            if asyncio.get_running_loop().time() > until_s:
                raise HostError(f"volume {volume.name}", step=f"allocation {', '.join(others)} still has it here")
            await asyncio.sleep(_POLL_S)
        directory = self._run / volume.key / "claims"
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        (directory / alloc).write_text(kind)

    def _claims(self, volume: Volume) -> Mapping[AllocId, str]:
        directory = self._run / volume.key / "claims"
        return {AllocId(path.name): path.read_text() for path in directory.iterdir()} if directory.is_dir() else {}

    async def _copied(self, source: Path, target: Path) -> None:
        """Whole or not at all."""
        unfinished = target.with_name(f"{target.name}.new")
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            argv = ("cp", "--reflink=auto", "--sparse=always", "--", str(source), str(unfinished))
            await _done(argv, timeout_s=_COPY_S, doing="copy")
            await asyncio.to_thread(_synced, unfinished)
            unfinished.replace(target)
        except OSError as error:
            raise HostError(str(target), step=f"copy: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def _disk(self, volume: Volume) -> Path:
        """Raises HostError where the node does not have it."""
        path = self._data / volume.key / _DISK
        if volume.path or not path.exists():
            what = "it is a directory of the node, which its operator looks after" if volume.path else "it is not here"
            raise HostError(f"volume {volume.name}", step=what)
        return path

    def _checked_path(self, volume: Volume) -> Path:
        path = Path(os.path.realpath(volume.path))
        if not any(path.is_relative_to(os.path.realpath(allowed)) for allowed in self._paths):
            message = f"{volume.path} is not below what this node lets volumes be: `volume_paths` of its configuration"
            raise RefusedError("denied", message)
        if not path.is_dir():
            raise RefusedError("not-found", f"{volume.path} is no directory on this node")
        return path

    def _lock(self, volume: Volume) -> asyncio.Lock:
        return self._locks.setdefault(volume.key, asyncio.Lock())


def remove_mounts(run: Path) -> None:
    """Of every volume; the volumes stay."""
    mounts.unmount_below(run / "volumes")
    shutil.rmtree(run / "volumes", ignore_errors=True)


def _wanted(assignment: Assignment, task: Task) -> Iterator[tuple[VolumeUse, Volume]]:
    known = {volume.name: volume for volume in assignment.volumes}
    for use in task.volumes:
        if use.volume not in known:
            raise StartError(f"volume {use.volume} was deleted; `outrider volume create` makes it")
        yield use, known[use.volume]


@contextmanager
def _frozen(root: Path) -> Iterator[None]:
    """Nothing is written to the file system mounted there meanwhile; who tries waits."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _THAW, 0)
    except OSError as error:
        raise HostError(str(root), step=f"freeze: {error.strerror}") from error
    finally:
        os.close(descriptor)


@contextmanager
def _untouched() -> Iterator[None]:
    """Nobody has it mounted."""
    yield


def _allocated(disk: Path, size_bytes: int) -> None:
    """All of it is taken now: a write into the volume never finds the node's disk full."""
    disk.parent.mkdir(mode=0o711, parents=True)
    if shutil.disk_usage(disk.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before the rest of the node is in need
    (disk.parent / _FRESH).touch()
    descriptor = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def _synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


async def _done(argv: tuple[str, ...], *, timeout_s: float, doing: str) -> None:
    done = await process.run((process.program(argv[0]), *argv[1:]), timeout_s=timeout_s)
    if done.code != 0:
        raise HostError(argv[-1], step=f"{doing}: {done.output.strip()[-300:]}")
