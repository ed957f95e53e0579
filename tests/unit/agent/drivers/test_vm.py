"""A guest's sandbox: the emulator's command line, what it sees, what it may use."""

import json

import msgspec
import pytest

from agent.belongings.volumes import Disk
from agent.drivers.process import Place
from agent.drivers.vm import GuestImages, guest_spec
from agent.sandbox.spec import SandboxSpec
from agent.seed import with_names
from outrider.ids import AllocId, GroupName, JobName, NodeId, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import (
    EMULATOR,
    MIB,
    Driver,
    File,
    Group,
    GuestFile,
    Image,
    ImageKind,
    Resources,
    Task,
)
from outrider.model.reservation import group_resources

PLACE = Place(
    node=NodeId("n1"), uid_first=65_536, network_namespace="/run/ns", directory="/d/box", task_directory="/d/box.vm"
)
KERNEL = GuestFile(reference="/srv/vmlinux", sha256="0" * 64)
IMAGES = GuestImages(disk="/c/disk", disk_format="qcow2", kernel="/c/kernel", initrd="/c/initrd")


def spec(
    images: GuestImages = IMAGES, *, kvm: bool = False, resources: Resources | None = None, place: Place = PLACE
) -> SandboxSpec:
    image = Image(kind=ImageKind.DISK, reference="/srv/d", kernel=KERNEL, kernel_arguments="root=/dev/vda")
    task = Task(name=TaskName("db"), driver=Driver.VM, image=image, resources=resources or Resources())
    group = Group(name=GroupName("g"), tasks=(task,))
    assignment = Assignment(alloc=AllocId("a1"), job=JobName("j"), job_version=1, group=group, index=0)
    return guest_spec(assignment, task, place, images, kvm=kvm)


def after(option: str, argv: tuple[str, ...]) -> list[str]:
    return [argv[place + 1] for place, word in enumerate(argv) if word == option]


def test_the_machine_is_versioned_and_has_what_was_asked_for() -> None:
    made = spec(resources=Resources(cpu_millis=1500, memory_bytes=512 * MIB))
    assert after("-machine", made.argv) == ["pc-q35-7.2,usb=off,graphics=off"]
    assert after("-smp", made.argv) == ["2"]
    assert after("-m", made.argv) == ["size=512M"]
    assert after("-append", made.argv) == ["console=ttyS0 panic=-1 root=/dev/vda"]


def test_the_emulator_is_counted_in_the_limit_and_in_placement() -> None:
    resources = Resources(cpu_millis=500, memory_bytes=512 * MIB, disk_bytes=1024 * MIB)
    limits = spec(resources=resources).limits
    assert limits.memory_bytes == 512 * MIB + EMULATOR.memory_bytes
    task = Task(name=TaskName("db"), driver=Driver.VM, resources=resources)
    need = group_resources(Group(name=GroupName("g"), tasks=(task,)))
    assert (need.memory_bytes, need.cpu_millis, need.disk_bytes) == (limits.memory_bytes, 550, 1024 * MIB)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_disks_chain_is_told_by_hand_and_its_base_is_never_written(kind: str) -> None:
    made = spec(GuestImages(disk="/c/disk", disk_format=kind))
    (text,) = after("-blockdev", made.argv)
    disk = json.loads(text)
    assert disk["file"]["filename"] == "/vm/overlay.qcow2"
    assert disk["backing"]["driver"] == kind
    assert disk["backing"]["read-only"] is True
    assert kind == "raw" or disk["backing"]["backing"] is None
    assert "-kernel" not in made.argv, "firmware boots it"


def test_the_jobs_files_are_a_disk_for_cloud_init_with_a_name_of_its_own() -> None:
    given = Task(name=TaskName("db"), driver=Driver.VM, files=(File(path="user-data", content=b"#cloud-config"),))
    group = Group(name=GroupName("g"), tasks=(given,))
    assignment = Assignment(alloc=AllocId("a1"), job=JobName("j"), job_version=1, group=group, index=2)
    files = {file.path: file.content for file in with_names(assignment, given)}
    assert files == {"user-data": b"#cloud-config", "meta-data": b"instance-id: a1\nlocal-hostname: g-2\n"}
    made = guest_spec(assignment, given, msgspec.structs.replace(PLACE, memory="/m"), IMAGES, kvm=False)
    assert ("/m", True) in {(mount.source, mount.read_only) for mount in made.mounts if mount.target == "/memory"}
    seed = json.loads(after("-blockdev", made.argv)[1])
    assert (seed["driver"], seed["read-only"], seed["file"]["filename"]) == ("raw", True, "/memory/seed.iso")


def test_it_sees_its_own_files_alone_and_writes_only_to_its_directory() -> None:
    made = spec()
    assert {mount.target for mount in made.mounts if mount.read_only} == {
        "/images/disk",
        "/images/kernel",
        "/images/initrd",
    }
    assert [mount.source for mount in made.mounts if not mount.read_only] == ["/d/box.vm"]


def test_kvm_is_used_only_where_it_works() -> None:
    assert [device.name for device in spec().devices] == ["net/tun"]
    assert after("-accel", spec().argv)[0].startswith("tcg")
    assert [device.name for device in spec(kvm=True).devices] == ["net/tun", "kvm"]
    assert after("-accel", spec(kvm=True).argv) == ["kvm"]


def test_a_volume_is_a_disk_that_the_guest_finds_by_its_name() -> None:
    disks = (
        Disk(name="data", path="/v/data/disk.img", read_only=False),
        Disk(name="models-of-a-long-name", path="/v/models/disk.img", read_only=True),
    )
    made = spec(place=msgspec.structs.replace(PLACE, disks=disks))
    drives = [json.loads(drive) for drive in after("-blockdev", made.argv)][1:]
    assert [(drive["driver"], drive["read-only"]) for drive in drives] == [("raw", False), ("raw", True)]
    serials = [word for word in after("-device", made.argv) if "drive=volume" in word]
    assert "serial=data" in serials[0]
    assert "serial=models-of-a-long-nam," in serials[1]
    shown = {mount.target: mount.read_only for mount in made.mounts if mount.target.startswith("/volumes/")}
    assert shown == {"/volumes/data": False, "/volumes/models-of-a-long-name": True}
