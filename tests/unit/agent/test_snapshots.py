"""Snapshots on disk: whole or absent, and found out where they were touched."""

from pathlib import Path

import msgspec
import pytest

from agent.guest_states import GuestStates, misfits
from agent.snapshots import DISK, IMAGES, MEMORY, FileSum, Manifest, Snapshots, copy_sparse, read_manifest, sum_of
from outrider.errors import RefusedError
from outrider.ids import TaskName
from outrider.model.job import MIB, Driver, GuestFile, Image, ImageKind, Resources, Task

KERNEL = GuestFile(reference="/srv/vmlinux", sha256="a" * 64)
TASK = Task(
    name=TaskName("machine"),
    driver=Driver.VM,
    image=Image(kind=ImageKind.DISK, kernel=KERNEL),
    resources=Resources(cpu_millis=500, memory_bytes=128 * MIB, disk_bytes=64 * MIB),
)


def manifest(name: str, **files: FileSum) -> Manifest:
    return Manifest(
        name=name,
        made_at_s=1.0,
        cluster="test",
        job="machines",
        group="guest",
        task="machine",
        qemu="7.2.22",
        machine="pc-q35-7.2",
        accelerator="tcg",
        processor="",
        cpus=1,
        memory_bytes=128 * MIB,
        disk_bytes=0,
        disk_format="",
        kernel_arguments="",
        images={"kernel": FileSum(sha256="a" * 64, size_bytes=6)},
        files=files,
    )


def kept(snapshots: Snapshots, name: str) -> Manifest:
    made = snapshots.begin(name)
    (made / MEMORY).write_bytes(b"memory")
    (made / IMAGES).mkdir()
    (made / IMAGES / ("a" * 64)).write_bytes(b"kernel")
    whole = manifest(name, memory=sum_of(made / MEMORY))
    snapshots.keep(made, whole)
    return whole


def test_a_snapshot_is_there_once_it_is_whole(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    half = snapshots.begin("warm")
    assert snapshots.names() == ()
    whole = kept(snapshots, "warm")
    assert snapshots.names() == ("warm",)
    assert snapshots.manifest("warm") == whole
    with pytest.raises(RefusedError, match="there is a snapshot 'warm'"):
        snapshots.keep(half, manifest("warm"))
    with pytest.raises(RefusedError, match="there is a snapshot 'warm'"):
        snapshots.begin("warm")
    snapshots.sweep()
    assert not half.exists()
    snapshots.remove("warm")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RefusedError, match="no snapshot 'warm'"):
        snapshots.remove("warm")


def test_a_name_leads_nowhere(tmp_path: Path) -> None:
    for name in ("../etc", "", ".new-1", "a/b"):
        with pytest.raises(RefusedError, match="no name of a snapshot"):
            Snapshots(tmp_path).begin(name)


def test_what_was_written_to_afterwards_is_refused(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    whole = kept(snapshots, "warm")
    snapshots.check(whole)
    (tmp_path / "warm" / MEMORY).write_bytes(b"Memory")
    with pytest.raises(RefusedError, match="memory is not what was kept"):
        snapshots.check(whole)
    (tmp_path / "warm" / MEMORY).unlink()
    with pytest.raises(RefusedError, match="No such file"):
        snapshots.check(whole)
    (tmp_path / "warm" / IMAGES / ("a" * 64)).unlink()
    with pytest.raises(RefusedError, match="damaged or absent"):
        snapshots.check(whole)


def test_a_manifest_of_another_format_or_with_other_files_is_refused() -> None:
    good = manifest("warm", memory=FileSum(sha256="b" * 64, size_bytes=6))
    assert read_manifest(msgspec.json.encode(good)) == good
    for bad, expected in (
        (msgspec.structs.replace(good, format=2), "a snapshot of format 2"),
        (msgspec.structs.replace(good, files={}), "a manifest of nothing"),
        (
            msgspec.structs.replace(good, files={**good.files, "../x": good.files["memory"]}),
            "a manifest of memory, ../x",
        ),
        (
            msgspec.structs.replace(good, images={"disk": FileSum(sha256="../x", size_bytes=1)}),
            "checksums that are none",
        ),
    ):
        with pytest.raises(RefusedError, match=expected):
            read_manifest(msgspec.json.encode(bad))
    with pytest.raises(RefusedError, match="no manifest"):
        read_manifest(b"[]")


def test_a_guest_that_is_another_does_not_go_on_from_it() -> None:
    good = manifest("warm", memory=FileSum(sha256="b" * 64, size_bytes=6))
    assert misfits(good, TASK) == []
    more = msgspec.structs.replace(TASK.resources, memory_bytes=256 * MIB, cpu_millis=1500)
    other = msgspec.structs.replace(TASK.image, kernel=GuestFile(reference="/srv/vmlinux", sha256="c" * 64))
    assert misfits(good, msgspec.structs.replace(TASK, resources=more, image=other)) == [
        "another kernel",
        f"memory {128 * MIB} there, {256 * MIB} here",
        "processors 1 there, 2 here",
    ]


def test_a_guest_does_not_go_on_under_another_emulator(tmp_path: Path) -> None:
    states = GuestStates(
        snapshots=Snapshots(tmp_path),
        cluster="test",
        qemu_version=lambda: "8.1.3",
        kvm=lambda: True,
        changed=lambda: None,
    )
    kept(states.snapshots, "warm")
    told = "it was made by QEMU 7.2.22, and this node has 8.1.3; it was made under tcg, and this node has kvm"
    with pytest.raises(RefusedError, match=f"snapshot warm does not fit: {told}"):
        states.fitting("warm", TASK)


def test_a_copy_keeps_its_holes_and_follows_no_link(tmp_path: Path) -> None:
    with (tmp_path / DISK).open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(8 * MIB)
        file.write(b"data")
    copy_sparse(tmp_path / DISK, tmp_path / "copy")
    assert sum_of(tmp_path / "copy") == sum_of(tmp_path / DISK)
    assert (tmp_path / "copy").stat().st_blocks * 512 < MIB
    (tmp_path / "link").symlink_to("/etc/shadow")
    with pytest.raises(OSError, match="symbolic links"):
        copy_sparse(tmp_path / "link", tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
