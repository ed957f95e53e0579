"""The node's cache of guests' files, and what a disk's header gives away."""

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.images import Images, disk_format
from agent.sandbox.spec import StartError
from outrider.model.job import GuestFile


def named(path: Path) -> GuestFile:
    return GuestFile(reference=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def qcow2(*, backing: int = 0, encryption: int = 0, features: int = 0) -> bytes:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, backing, 8, 16, 1 << 30, encryption)
    return head.ljust(72, b"\0") + struct.pack(">Q", features)


def opened(directory: Path, *, free_bytes: Callable[[Path], int] | None = None) -> Images:
    images = Images(directory, free_bytes=free_bytes)
    images.open()
    return images


def test_what_an_earlier_agent_did_not_finish_goes_and_what_another_call_fills_stays(tmp_path: Path) -> None:
    directory = tmp_path / "images"
    images = opened(directory, free_bytes=lambda _path: 0)
    _, unfinished = images.begin(1)
    (tmp_path / "disk").write_bytes(b"disk")
    cached = images.fetch(named(tmp_path / "disk"))
    assert {*directory.iterdir()} == {cached, unfinished}
    opened(directory)
    assert {*directory.iterdir()} == {cached}


def test_a_file_is_copied_once_and_stays_what_it_was(tmp_path: Path) -> None:
    original = tmp_path / "disk"
    content = b"begins" + bytes(5 * 1024 * 1024) + b"ends" + bytes(2 * 1024 * 1024)
    original.write_bytes(content)
    images, file = opened(tmp_path / "images"), named(original)
    cached = images.fetch(file)
    original.write_bytes(b"another")
    assert images.fetch(file) == cached
    assert cached.read_bytes() == content
    assert cached.stat().st_mode & 0o777 == 0o444
    assert cached.stat().st_blocks * 512 < len(content), "zeroes are a hole"


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    directory = tmp_path / "images"
    images = opened(directory, free_bytes=lambda path: (3 - len([*path.iterdir()])) << 30)
    files = []
    for number in range(3):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        files.append(named(tmp_path / str(number)))
    first, second = (images.fetch(file) for file in files[:2])
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    images.fetch(files[0])
    images.fetch(files[2])
    assert {path.name for path in directory.iterdir()} == {files[0].sha256, files[2].sha256}


def test_another_content_is_refused_and_not_kept(tmp_path: Path) -> None:
    original = tmp_path / "disk"
    original.write_bytes(b"tampered with")
    images = opened(tmp_path / "images")
    with pytest.raises(StartError, match=r"is another file: its sha256 is .*, the job asks for 0000"):
        images.fetch(GuestFile(reference=str(original), sha256="0" * 64))
    assert not list((tmp_path / "images").iterdir())


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    images = opened(tmp_path / "images")
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(StartError, match=why):
            images.fetch(GuestFile(reference=str(path), sha256="0" * 64))


def test_a_disk_that_stands_alone_has_a_format_and_a_size(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(qcow2())
    assert disk_format(disk, "disk") == ("qcow2", 1 << 30)
    disk.write_bytes(bytes(512))
    assert disk_format(disk, "disk") == ("raw", 512)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (qcow2(backing=512), "backing file"),
        (qcow2(features=4), "another file"),
        (qcow2(encryption=2), "encrypted"),
        (qcow2()[:40], "ends within its header"),
        (b"KDMV" + bytes(508), "VMDK"),
    ],
)
def test_a_disk_that_leads_elsewhere_is_refused(tmp_path: Path, head: bytes, why: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(head)
    with pytest.raises(StartError, match=why):
        disk_format(disk, "/srv/disk")
