"""Unpacks an archive that somebody else made: into a new directory, and nowhere else.

Owns what is let in: files, directories, and links that stay within; no device, no way out, no more than was allowed.
Everything belongs to root and may be read by all; set-uid bits are dropped. Never follows a link that it made.
"""

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from outrider.errors import InputError

FILES_MAX = 200_000
_NAME_CHARS_MAX = 1024
_BLOCK_BYTES = 1024 * 1024
_LINK_BYTES_MAX = 4096


class Bounds:
    """What one archive may still bring."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = self._files = 0

    def entry(self) -> None:
        self._files += 1
        if self._files > FILES_MAX:
            raise InputError(f"it has more than {FILES_MAX} entries")

    def data(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._bytes_max:
            raise InputError(f"unpacked it is larger than the {self._bytes_max} bytes that this node allows")


def unpack(archive: Path, root: Path, *, bytes_max: int) -> None:
    """`root` must not exist. Raises InputError naming what is wrong, OSError where the disk is."""
    root.mkdir(mode=0o755)
    bounds = Bounds(bytes_max)
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, root, bounds)
        else:
            _unpack_tar(archive, root, bounds)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"it is no archive that can be read: {error}") from error


def _unpack_tar(archive: Path, root: Path, bounds: Bounds) -> None:
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            bounds.entry()
            target = _place(root, member.name)
            if target is None:
                continue
            if member.isdir():
                _directory(root, target)
            elif member.isreg():
                data = tar.extractfile(member)
                assert data is not None, "a regular file has data"
                _file(root, target, data, member.mode, bounds)
            elif member.issym():
                _link(root, target, member.name, member.linkname)
            elif member.islnk():
                _hard_link(root, target, member.name, member.linkname)
            else:
                raise InputError(
                    f"{member.name!r} is a device or a pipe: only files, directories and links are unpacked"
                )


def _unpack_zip(archive: Path, root: Path, bounds: Bounds) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            bounds.entry()
            target = _place(root, member.filename)
            if target is None:
                continue
            mode = member.external_attr >> 16
            kind = stat.S_IFMT(mode)
            if member.is_dir():
                _directory(root, target)
            elif kind == stat.S_IFLNK:
                with zipped.open(member) as data:
                    text = data.read(_LINK_BYTES_MAX).decode(errors="surrogateescape")
                _link(root, target, member.filename, text)
            elif kind in (0, stat.S_IFREG):
                with zipped.open(member) as data:
                    _file(root, target, data, mode, bounds)
            else:
                raise InputError(f"{member.filename!r} is a device or a pipe: only files and links are unpacked")


def _place(root: Path, name: str) -> Path | None:
    """Where it goes; None for the root itself."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > _NAME_CHARS_MAX:
        raise InputError(f"{name[:200]!r} leads out of the archive, or has more than {_NAME_CHARS_MAX} characters")
    return root.joinpath(*path.parts) if path.parts else None


def _directory(root: Path, target: Path) -> None:
    for path in (*_parents(root, target), target):
        if not path.is_symlink() and path.is_dir():
            continue
        try:
            path.mkdir(mode=0o755)
        except FileExistsError as error:
            inside = path.relative_to(root)
            raise InputError(f"{str(inside)!r} is a link or a file, and something else lies below it") from error


def _file(root: Path, target: Path, data: IO[bytes], mode: int, bounds: Bounds) -> None:
    _directory(root, target.parent)
    _vacate(root, target)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while block := data.read(_BLOCK_BYTES):
            bounds.data(len(block))
            file.write(block)
        os.fchmod(file.fileno(), 0o755 if mode & 0o100 else 0o644)


def _link(root: Path, target: Path, name: str, text: str) -> None:
    if not _stays(root, target.parent, text):
        raise InputError(f"the link {name!r} leads out of the archive, to {text[:200]!r}")
    _directory(root, target.parent)
    _vacate(root, target)
    target.symlink_to(text)


def _hard_link(root: Path, target: Path, name: str, text: str) -> None:
    source = _place(root, text)
    if source is None or any(parent.is_symlink() for parent in _parents(root, source)):
        raise InputError(f"the hard link {name!r} leads out of the archive, to {text[:200]!r}")
    if source.is_symlink() or not source.is_file():
        raise InputError(f"the hard link {name!r} is of {text[:200]!r}, which is no file before it")
    _directory(root, target.parent)
    _vacate(root, target)
    target.hardlink_to(source)


def _vacate(root: Path, target: Path) -> None:
    """An archive may bring a file twice; the later counts."""
    if target == root or (target.is_dir() and not target.is_symlink()):
        raise InputError(f"{str(target.relative_to(root))!r} is a directory already")
    target.unlink(missing_ok=True)


def _stays(root: Path, directory: Path, text: str) -> bool:
    """Whether a link there would end within `root`, whatever other links there are: each of those stays within too."""
    depth = len(directory.relative_to(root).parts)
    if not text or text.startswith("/") or "\0" in text:
        return False
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return False
    return True


def _parents(root: Path, target: Path) -> Iterator[Path]:
    """Between the two, the outermost first."""
    between = target.relative_to(root).parts[:-1]
    for length in range(1, len(between) + 1):
        yield root.joinpath(*between[:length])
