"""The node's cache of guests' files: DATA/images/SHA256, each whole, of the content that its name says, never changed.

What a job names on the node is copied once; whatever becomes of the original, a guest boots from what was asked for.
Blocks its caller: run it in a thread. Two calls for one file may overlap.
"""

import hashlib
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

from agent.sandbox.spec import StartError
from outrider.errors import HostError
from outrider.model.job import MIB, GuestFile

_BLOCK_BYTES = 256 * 1024
_RESERVE_BYTES = 1024 * MIB  # for what guests write meanwhile
_UNFINISHED = "new-"
_ZEROES = bytes(_BLOCK_BYTES)
# docs/interop/qcow2.txt of QEMU: magic, version, backing file's place and length, cluster bits, size, encryption ...
_HEADER = struct.Struct(">4sIQIIQI")
_FEATURES = struct.Struct(">72xQ")
_MAGIC = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2
_REFUSED = {b"KDMV": "VMDK", b"conectix": "VPC", b"vhdxfile": "VHDX", b"<<< ": "VDI"}


class Images:
    """`open` first. `free_bytes` tells how much room its file system has: what was used least recently makes more."""

    def __init__(self, directory: Path, *, free_bytes: Callable[[Path], int] | None = None) -> None:
        self._directory = directory
        self._free_bytes = free_bytes or (lambda path: shutil.disk_usage(path).free)

    def open(self) -> None:
        """Removes what an earlier agent did not finish. Raises HostError where the directory cannot be used."""
        try:
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            for path in self._directory.glob(f"{_UNFINISHED}*"):
                path.unlink()
        except OSError as error:
            raise HostError(str(self._directory), step=f"open: {error.strerror}") from error

    def fetch(self, file: GuestFile) -> Path:
        """Where the file is in the cache. Raises StartError where it is absent or another, HostError without room."""
        cached = self._directory / file.sha256
        with suppress(FileNotFoundError):
            os.utime(cached)
            return cached
        try:
            return self._copy(file, cached)
        except OSError as error:
            if error.filename == file.reference:
                raise StartError(f"{file.reference}: {error.strerror} on this node") from error
            raise HostError(str(self._directory), step=f"copy {file.reference}: {error.strerror}") from error

    def take(self, path: Path, sha256: str) -> None:
        """A file that was checked to be `sha256`, and stays where it is, into the cache. Raises OSError."""
        with suppress(FileExistsError):
            os.link(path, self._directory / sha256)

    def begin(self, size: int) -> tuple[int, Path]:
        """A file to fill with an image that comes from elsewhere, for `keep`. Raises OSError."""
        self._make_room(size)
        descriptor, name = tempfile.mkstemp(dir=self._directory, prefix=_UNFINISHED)
        return descriptor, Path(name)

    def keep(self, unfinished: Path, sha256: str) -> None:
        """It was found to be `sha256`."""
        unfinished.chmod(0o444)
        unfinished.rename(self._directory / sha256)

    def _copy(self, file: GuestFile, cached: Path) -> Path:
        # Not a device nor a pipe, which might never end, and no wait to open one.
        source = os.open(file.reference, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(source).st_mode):
            os.close(source)
            raise StartError(f"{file.reference} is no regular file")
        with os.fdopen(source, "rb", buffering=0) as reading:
            self._make_room(os.fstat(source).st_size)
            descriptor, name = tempfile.mkstemp(dir=self._directory, prefix=_UNFINISHED)
            unfinished = Path(name)
            try:
                with os.fdopen(descriptor, "wb", buffering=0) as writing:
                    _check(file, _copy_blocks(reading, descriptor))
                    writing.truncate(os.lseek(descriptor, 0, os.SEEK_CUR))
                    os.fsync(descriptor)
                unfinished.chmod(0o444)
                unfinished.rename(cached)
            finally:
                unfinished.unlink(missing_ok=True)
        return cached

    def _make_room(self, size: int) -> None:
        """A guest that runs keeps what it has open; one that starts again has its image fetched again."""
        oldest = sorted(_last_used(self._directory))
        while oldest and self._free_bytes(self._directory) < size + _RESERVE_BYTES:
            oldest.pop(0)[1].unlink(missing_ok=True)


def _last_used(directory: Path) -> Iterator[tuple[float, Path]]:
    """Of the files that are whole: another call's may come or go meanwhile."""
    for path in directory.iterdir():
        if not path.name.startswith(_UNFINISHED):
            with suppress(FileNotFoundError):
                yield path.stat().st_mtime, path


def disk_format(path: Path, reference: str, *, backing: str = "") -> tuple[str, int]:
    """("qcow2" or "raw", its virtual size in bytes). Raises StartError for a disk that leads to other files.

    `backing`: what a disk's header must say of the file below it: an overlay's.
    """
    with path.open("rb") as file:
        head = file.read(_FEATURES.size)
    for magic, name in _REFUSED.items():
        if head.startswith(magic):
            raise StartError(f"{reference} is a {name} disk: convert it, qemu-img convert -O qcow2")
    if not head.startswith(_MAGIC):
        return "raw", path.stat().st_size
    if len(head) < _FEATURES.size:
        raise StartError(f"{reference} is a qcow2 disk that ends within its header")
    _, version, at, length, _, size, encryption = _HEADER.unpack_from(head)
    if at and (not backing or _read_at(path, at, length) != backing.encode()):
        hint = "make it whole: qemu-img convert -O qcow2"
        raise StartError(f"{reference} has a backing file, which a guest's disk may not have; {hint}")
    if version > 2 and _FEATURES.unpack_from(head)[0] & _EXTERNAL_DATA:
        raise StartError(f"{reference} keeps its data in another file, which a guest's disk may not do")
    if encryption:
        raise StartError(f"{reference} is encrypted: no key for it travels with a job")
    return "qcow2", size


def _read_at(path: Path, at: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(min(length, 1024))


def _copy_blocks(reading: FileIO, descriptor: int) -> str:
    """The sha256 of all that was copied."""
    found = hashlib.sha256()
    while block := reading.read(_BLOCK_BYTES):
        found.update(block)
        _write(descriptor, block)
    return found.hexdigest()


def _check(file: GuestFile, found: str) -> None:
    if found != file.sha256:
        asked = f"the job asks for {file.sha256}"
        raise StartError(f"{file.reference} is another file: its sha256 is {found}, {asked}")


def _write(descriptor: int, block: bytes) -> None:
    """Zeroes become a hole: disks are mostly that."""
    if block == _ZEROES[: len(block)]:
        os.lseek(descriptor, len(block), os.SEEK_CUR)
        return
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
