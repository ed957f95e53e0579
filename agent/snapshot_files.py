"""A snapshot as one file, for another fleet: a tar whose first members say what must follow, and with which checksums.

    manifest.sha256, manifest.json, then the manifest's files and images/SHA256, each once

Nothing in it is trusted: no member's name leads anywhere, nothing is kept unless all of it is as its manifest says.
Blocks its caller: run it in a thread.
"""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import IO

import msgspec

from agent.images import disk_format
from agent.sandbox.spec import StartError
from agent.snapshots import DISK, IMAGES, MANIFEST, FileSum, Manifest, Snapshots, read_manifest
from outrider.errors import HostError, RefusedError
from outrider.model.job import MIB

_DIGEST = "manifest.sha256"
_BLOCK_BYTES = 4 * MIB
_RESERVE_BYTES = 1024 * MIB  # for what guests write meanwhile


def write_snapshot(snapshots: Snapshots, manifest: Manifest, descriptor: int) -> None:
    """All of it into `descriptor`. Raises RefusedError where it is damaged."""
    snapshots.check(manifest)
    path = snapshots.path(manifest.name)
    text = (path / MANIFEST).read_bytes()
    digest = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
    try:
        with (
            os.fdopen(os.dup(descriptor), "wb") as pipe,
            tarfile.open(fileobj=pipe, mode="w|", bufsize=_BLOCK_BYTES) as tar,
        ):
            for name, data in ((_DIGEST, digest), (MANIFEST, text)):
                tar.addfile(_member(name, len(data)), io.BytesIO(data))
            for name, each in _members(manifest).items():
                with (path / name).open("rb", buffering=0) as file:
                    tar.addfile(_member(name, each.size_bytes), file)
    except BrokenPipeError:
        return  # whoever wanted it has gone
    except OSError as error:
        raise HostError(str(path), step=f"export: {error.strerror or error}") from error


def read_snapshot(snapshots: Snapshots, name: str, descriptor: int) -> Manifest:
    """What `write_snapshot` wrote, kept under `name`, or its own where that is "". Raises RefusedError or HostError."""
    try:
        with (
            os.fdopen(os.dup(descriptor), "rb") as pipe,
            tarfile.open(fileobj=pipe, mode="r|", bufsize=_BLOCK_BYTES) as tar,
        ):
            manifest = _head(tar)
            if name:
                manifest = msgspec.structs.replace(manifest, name=name)
            made = snapshots.begin(manifest.name)
            try:
                _make_sure_of_room(made, manifest)
                _fill(tar, manifest, made)
                snapshots.keep(made, manifest)
            finally:
                snapshots.drop(made)
            return manifest
    except (tarfile.TarError, EOFError) as error:
        raise RefusedError("damaged", f"no whole export of a snapshot: {error}") from error
    except OSError as error:
        raise HostError("snapshots", step=f"import: {error.strerror or error}") from error


def _head(tar: tarfile.TarFile) -> Manifest:
    told = _next(tar, _DIGEST, 1024).read().decode(errors="replace").split()
    text = _next(tar, MANIFEST, MIB).read()
    if told[:1] != [hashlib.sha256(text).hexdigest()]:
        raise RefusedError("damaged", f"{MANIFEST} is not what was exported: it was changed, or damaged")
    return read_manifest(text)


def _fill(tar: tarfile.TarFile, manifest: Manifest, made: Path) -> None:
    (made / IMAGES).mkdir()
    for name, expected in _members(manifest).items():
        file = _next(tar, name, expected.size_bytes)
        if _write(file, made / name) != expected:
            raise RefusedError("damaged", f"{name} is not what its manifest says: the file was changed, or damaged")
    extra = tar.next()
    if extra is not None:
        raise RefusedError("damaged", f"{extra.name[:80]!r} is none of the manifest's files")
    try:
        if "disk" in manifest.images:
            kind, size = disk_format(made / IMAGES / manifest.images["disk"].sha256, "its disk")
            if kind != manifest.disk_format or size > manifest.disk_bytes:
                raise RefusedError("damaged", f"its disk is {kind} of {size} bytes, and its manifest says otherwise")
        if DISK in manifest.files:
            disk_format(made / DISK, "what its guest wrote", backing="base")
    except StartError as error:
        raise RefusedError("damaged", str(error)) from error


def _next(tar: tarfile.TarFile, name: str, size_max: int) -> IO[bytes]:
    member = tar.next()
    if member is None:
        raise RefusedError("damaged", f"the file ends before {name}")
    if member.name != name or not member.isreg() or member.size > size_max:
        raise RefusedError("damaged", f"expected {name}, and found {member.name[:80]!r}")
    file = tar.extractfile(member)
    assert file is not None, "a regular file"
    return file


def _write(file: IO[bytes], path: Path) -> FileSum:
    found, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as target:
        path.chmod(0o444 if path.parent.name == IMAGES else 0o600)
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            size += len(block)
            if not block.strip(b"\0"):
                target.seek(len(block), os.SEEK_CUR)  # a hole
            else:
                target.write(block)
        target.truncate(size)
        os.fsync(target.fileno())
    return FileSum(sha256=found.hexdigest(), size_bytes=size)


def _members(manifest: Manifest) -> dict[str, FileSum]:
    images = {f"{IMAGES}/{each.sha256}": each for each in manifest.images.values()}
    return {**manifest.files, **images}


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _make_sure_of_room(made: Path, manifest: Manifest) -> None:
    status = os.statvfs(made)
    needed = sum(each.size_bytes for each in _members(manifest).values())
    if needed + _RESERVE_BYTES > status.f_bavail * status.f_frsize:
        raise RefusedError("no-room", f"the snapshot is {needed} bytes, and the node has no room for it")
