"""The node's cache of unpacked images: which there are, who needs them, which go first.

    DATA/roots/HEX/image.json    what the image says of itself; HEX is its digest's
    DATA/roots/HEX/root/         its files
    DATA/roots/HEX/durable       it has reached the disk; without that mark it is not believed after a reboot
    DATA/roots/names.json        what tags meant when they were asked for last
    DATA/roots/holds/ALLOC.json  the images that an allocation uses, until it is cleaned
    DATA/roots/unfinished/...    what is being made or removed; nothing of it outlives its agent

An image is there whole, by one rename, or not at all. Nobody but root may look inside: images have set-uid programs.
For one thread, but for what says otherwise. Never fetches anything.
"""

import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.pull.image import UnpackedImage
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.model.job import Value

V = TypeVar("V")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMES_MAX = 1000

_libc = ctypes.CDLL(None, use_errno=True)


class Entry(Value, frozen=True, kw_only=True):
    image: UnpackedImage
    size_bytes: int
    boot: str  # in which it was unpacked


class Cache:
    """`open` first. `bytes_max`: of all images together; what is held may exceed it."""

    def __init__(self, directory: Path, *, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._directory = directory
        self._unfinished = directory / "unfinished"
        self._holds_directory = directory / "holds"
        self._boot = _BOOT_ID.read_text().strip()
        self._entries: dict[str, Entry] = {}
        self._used_s: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self._holds: dict[AllocId, dict[str, str]] = {}

    def open(self, known: Collection[AllocId]) -> None:
        """Takes over what an earlier agent left. Raises HostError where the directory cannot be used."""
        try:
            for path in (self._directory, self._unfinished, self._holds_directory):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._unfinished.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            for path in self._directory.iterdir():
                if len(path.name) == 64:
                    self._load(path)
            for path in self._holds_directory.iterdir():
                alloc = AllocId(path.stem)
                self._holds[alloc] = _read(path, dict[str, str]) or {}
                if alloc not in known:
                    self.release(alloc)
        except OSError as error:
            raise HostError(str(self._directory), step=f"use it for images: {error.strerror}") from error
        self._names = _read(self._directory / "names.json", dict[str, str]) or {}

    def find(self, digest: str) -> UnpackedImage | None:
        entry = self._entries.get(digest)
        return entry.image if entry is not None else None

    def meaning(self, name: str) -> str:
        """The digest that `name` meant when it was asked for last; "" where it never was."""
        return self._names.get(name, "")

    def remember(self, name: str, digest: str) -> None:
        if self._names.pop(name, None) != digest:
            while len(self._names) >= _NAMES_MAX:
                del self._names[next(iter(self._names))]
            self._names[name] = digest
            _write(self._directory / "names.json", self._names)
        self._names[name] = digest

    def held(self, alloc: AllocId, name: str) -> UnpackedImage | None:
        """What `name` means for this allocation, for as long as it lives."""
        return self.find(self._holds.get(alloc, {}).get(name, ""))

    def hold(self, alloc: AllocId, name: str, digest: str) -> bool:
        """Keep it until `release`. False where it has gone meanwhile."""
        if digest not in self._entries:
            return False
        self._holds.setdefault(alloc, {})[name] = digest
        _write(self._holds_directory / f"{alloc}.json", self._holds[alloc])
        self._touch(digest)
        return True

    def release(self, alloc: AllocId) -> None:
        for digest in set(self._holds.pop(alloc, {}).values()):
            self._touch(digest)
        (self._holds_directory / f"{alloc}.json").unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A directory to make an image in, on the cache's own file system."""
        return Path(tempfile.mkdtemp(dir=self._unfinished))

    def root_of(self, digest: str) -> str:
        return str(self._path(digest) / "root")

    def publish(self, scratch: Path, image: UnpackedImage, size_bytes: int) -> None:
        """`scratch/root` is the whole image: from now on it is found."""
        entry = Entry(image=image, size_bytes=size_bytes, boot=self._boot)
        (scratch / "image.json").write_bytes(msgspec.json.encode(entry))
        scratch.rename(self._path(image.digest))
        self._entries[image.digest] = entry
        self._touch(image.digest)

    def make_durable(self, digest: str) -> None:
        """In a thread of its own: it waits for the disk."""
        path = self._path(digest)
        with suppress(OSError):  # removed meanwhile, or the disk is full: it is fetched again after a reboot
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _libc.syncfs(descriptor) == 0:
                    (path / "durable").touch()
            finally:
                os.close(descriptor)

    def evict(self, *, bytes_max: int, keep: str = "") -> tuple[Path, ...]:
        """Take out what was used least recently, until at most `bytes_max` are left: never what is held, nor `keep`.

        What it returns is to be `removed`.
        """
        kept = {keep, *(digest for names in self._holds.values() for digest in names.values())}
        total = sum(entry.size_bytes for entry in self._entries.values())
        taken = []
        for digest in sorted(self._entries.keys() - kept, key=lambda each: self._used_s[each]):
            if total <= bytes_max:
                break
            total -= self._entries.pop(digest).size_bytes
            aside = self.scratch()
            self._path(digest).rename(aside / "image")
            taken.append(aside)
        return tuple(taken)

    def _load(self, path: Path) -> None:
        entry = _read(path / "image.json", Entry)
        believed = entry is not None and (entry.boot == self._boot or (path / "durable").exists())
        if entry is None or not believed or self._path(entry.image.digest) != path or not (path / "root").is_dir():
            shutil.rmtree(path, ignore_errors=True)
            return
        self._entries[entry.image.digest] = entry
        self._used_s[entry.image.digest] = (path / "image.json").stat().st_mtime

    def _touch(self, digest: str) -> None:
        if digest in self._entries:
            self._used_s[digest] = time.time()
            with suppress(FileNotFoundError):
                os.utime(self._path(digest) / "image.json")

    def _path(self, digest: str) -> Path:
        return self._directory / digest.removeprefix("sha256:")


def removed(paths: Collection[Path]) -> None:
    """What `evict` took out is gone when this returns. For any thread."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def size_of(root: Path) -> int:
    """What a tree takes on its disk; a file of several names counts once. For any thread."""
    total, seen = 0, set()
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            status = os.lstat(f"{directory}/{name}")
            if status.st_nlink > 1 and name in files:
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
            total += status.st_blocks * 512
    return total


def _read(path: Path, kind: type[V]) -> V | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _write(path: Path, value: Mapping[str, str]) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_bytes(msgspec.json.encode(value))
    unfinished.replace(path)
