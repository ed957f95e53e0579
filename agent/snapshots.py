"""Snapshots of guests on this node: DATA/snapshots/NAME, each whole, with a manifest that says what is in it.

    manifest.json               Manifest
    memory, disk, seed.iso      as the manifest has them; disk is the guest's overlay, memory what QEMU wrote
    images/SHA256               what lies below the overlay and what it booted: links into the node's image cache

A snapshot is made beside its place and renamed into it. Blocks its caller: run it in a thread. Speaks to no emulator.
"""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from outrider.errors import HostError, RefusedError
from outrider.ids import is_name
from outrider.model.job import MIB, Value

MANIFEST, MEMORY, DISK, SEED, IMAGES = "manifest.json", "memory", "disk", "seed.iso", "images"
FORMAT = 1
_BLOCK_BYTES = 4 * MIB
_MANIFEST_BYTES_MAX = MIB
_CHECKED = "checked.json"  # stamps of the parts that were read and found to be good


class FileSum(Value, frozen=True, kw_only=True):
    sha256: str
    size_bytes: int


class Manifest(Value, frozen=True, kw_only=True):
    """What a guest must be like to go on from it, and the checksums of its parts. Read by other fleets: `FORMAT`."""

    format: int = FORMAT
    name: str
    made_at_s: float  # wall clock
    cluster: str
    job: str
    group: str
    task: str
    qemu: str  # version
    machine: str
    accelerator: str  # "kvm" or "tcg"
    processor: str  # of the host, where KVM showed it to the guest
    cpus: int
    memory_bytes: int
    disk_bytes: int
    disk_format: str  # of the image below the overlay; "" without a disk
    kernel_arguments: str
    images: Mapping[str, FileSum]  # "disk", "kernel", "initrd" -> what is in images/
    files: Mapping[str, FileSum]  # memory, disk, seed.iso


class Snapshots:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> tuple[str, ...]:
        if not self._directory.is_dir():
            return ()
        return tuple(sorted(path.name for path in self._directory.iterdir() if is_name(path.name)))

    def all(self) -> Iterator[Manifest]:
        for name in self.names():
            try:
                yield self.manifest(name)
            except RefusedError:
                continue  # removed meanwhile, or damaged: `restore` says so

    def path(self, name: str) -> Path:
        if not is_name(name):
            raise RefusedError(
                "bad-input", f"{name[:80]!r} is no name of a snapshot: lower-case letters, digits, dashes"
            )
        return self._directory / name

    def manifest(self, name: str) -> Manifest:
        """Raises RefusedError where there is none, or it cannot be read."""
        path = self.path(name)
        try:
            return read_manifest((path / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            hint = "`outrider vm snapshots` lists what there is"
            raise RefusedError("not-found", f"no snapshot {name!r} on this node; {hint}") from error
        except OSError as error:
            raise HostError(str(path), step=f"read the snapshot: {error.strerror}") from error

    def begin(self, name: str) -> Path:
        """A directory to fill, for `keep` or `drop`. Raises RefusedError where the name is taken."""
        if self.path(name).exists():
            raise RefusedError("exists", f"there is a snapshot {name!r} on this node; delete it, or take another name")
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".new-", dir=self._directory))

    def keep(self, made: Path, manifest: Manifest) -> None:
        """Whole and durable from here on. Raises RefusedError where another took the name meanwhile."""
        written = made / MANIFEST
        written.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        stamps = {name: _stamp(made / name) for name in manifest.files}  # summed just now
        (made / _CHECKED).write_bytes(msgspec.json.encode(stamps))
        for path in made.iterdir():
            if path.is_file():
                _sync(path)
        try:
            made.rename(self.path(manifest.name))
        except OSError as error:  # a directory that holds something
            raise RefusedError("exists", f"there is a snapshot {manifest.name!r} on this node already") from error
        _sync(self._directory)

    @staticmethod
    def drop(made: Path) -> None:
        shutil.rmtree(made, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Raises RefusedError where there is none."""
        path = self.path(name)
        if not path.exists():
            self.manifest(name)
        # Out of its place first: what is half removed must not be taken for a snapshot.
        aside = Path(tempfile.mkdtemp(prefix=".old-", dir=self._directory))
        path.rename(aside / "gone")
        shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """What an agent that was killed left half made. For an agent's start, before anything is made."""
        for path in self._directory.glob(".*") if self._directory.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def check(self, manifest: Manifest) -> None:
        """Its parts are what the manifest says. Raises RefusedError.

        What was read once and has not been written to since is not read again: a warm start should cost little.
        """
        path = self.path(manifest.name)
        for each in manifest.images.values():
            image = path / IMAGES / each.sha256  # of the content that its name says since it came here
            if not image.exists() or image.stat().st_size != each.size_bytes:
                raise RefusedError("damaged", f"snapshot {manifest.name}: {IMAGES}/{each.sha256} is damaged or absent")
        try:
            stamps = {name: _stamp(path / name) for name in manifest.files}
            if stamps == _read_stamps(path / _CHECKED):
                return
            for name, expected in manifest.files.items():
                if sum_of(path / name) != expected:
                    raise RefusedError("damaged", f"snapshot {manifest.name}: {name} is not what was kept: delete it")
        except OSError as error:
            raise RefusedError("damaged", f"snapshot {manifest.name}: {error.filename}: {error.strerror}") from error
        (path / _CHECKED).write_bytes(msgspec.json.encode(stamps))


def read_manifest(data: bytes) -> Manifest:
    """Raises RefusedError for what is none."""
    if len(data) > _MANIFEST_BYTES_MAX:
        raise RefusedError("damaged", f"a manifest of {len(data)} bytes")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise RefusedError("damaged", f"no manifest of a snapshot: {error}") from error
    if manifest.format != FORMAT:
        raise RefusedError("unsupported", f"a snapshot of format {manifest.format}; this agent reads {FORMAT}")
    if not set(manifest.files) <= {MEMORY, DISK, SEED} or MEMORY not in manifest.files:
        raise RefusedError("damaged", f"a manifest of {', '.join(manifest.files) or 'nothing'}")
    if not all(_is_sum(each.sha256) for each in (*manifest.images.values(), *manifest.files.values())):
        raise RefusedError("damaged", "a manifest with checksums that are none")
    return manifest


def sum_of(path: Path) -> FileSum:
    """Raises OSError."""
    found, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            size += len(block)
    return FileSum(sha256=found.hexdigest(), size_bytes=size)


def copy_sparse(source: Path, target: Path) -> None:
    """Holes stay holes. Whoever owns `source` could have put a link there: none is followed. Raises OSError."""
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(reading)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "no regular file", str(source))
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(writing, status.st_size)
            for begin, end in _extents(reading, status.st_size):
                _copy(reading, writing, begin, end)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole until the end
            return
        at = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, at


def _copy(reading: int, writing: int, begin: int, end: int) -> None:
    while begin < end:
        try:
            done = os.copy_file_range(reading, writing, end - begin, begin, begin)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # A seed, which is in memory.
            done = os.pwrite(writing, os.pread(reading, min(end - begin, _BLOCK_BYTES), begin), begin)
        if done == 0:
            return  # it was cut meanwhile
        begin += done


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_stamps(path: Path) -> dict[str, tuple[int, int, int]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int, int]])
    except (OSError, msgspec.DecodeError):
        return {}


def _is_sum(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
