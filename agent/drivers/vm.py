"""A virtual machine as a sandbox: QEMU's command line, what it sees of the host, its limits.

Pure: owns the translation alone. `agent.vms` makes disks and speaks with the emulator, `agent.sandbox` runs it.
"""

import json
from collections.abc import Iterator, Mapping

from agent.belongings.volumes import Disk
from agent.drivers.microvm import LINES, TERMINALS
from agent.drivers.process import Place, sandbox_id
from agent.network.guest import GUEST_MAC, TAP
from agent.qmp.inside import BALLOON
from agent.sandbox.spec import INNER_USER, Device, HostRoot, Limits, Mount, SandboxSpec
from outrider.model.allocation import Assignment
from outrider.model.job import EMULATOR, MIB, Image, Isolation, Resources, Task, Value, has_seed

DIRECTORY = "/vm"  # inside; the emulator's own, with the names below
OVERLAY, QMP, CONSOLE, AGENT, TRACE = "overlay.qcow2", "qmp", "console", "agent", "trace"
SEED = "seed.iso"  # in the node's memory
DISK_SOCKET = "nbd"  # where the disk of a guest that comes from another node is written
SHUTDOWN_TRACE = "qemu_system_shutdown_request"

# Versioned: a guest must find the same machine under the next QEMU, and on the node that it is moved to.
MACHINE = "pc-q35-7.2"
_IMAGES, _VOLUMES, _MEMORY = "/images", "/volumes", "/memory"
_SERIAL_CHARS_MAX = 20  # of a virtio disk: the guest finds it by /dev/disk/by-id/virtio-SERIAL
_TRANSLATED_MIB = 64  # what TCG may keep of translated code: counted in EMULATOR
_CPUS_MAX = 64
# `panic=-1` resets a guest that panicked at once, which ends its run.
_KERNEL_ARGUMENTS = "console=ttyS0 panic=-1"
# A disk that fails is the guest's to see; by default QEMU would stop the guest, and tell only who asks.
_ERRORS = "werror=report,rerror=report"
_TUN = Device(name="net/tun", major=10, minor=200)
_KVM = Device(name="kvm", major=10, minor=232)


class GuestImages(Value, frozen=True, kw_only=True):
    """The image's files in the node's cache. `disk_format`: "qcow2" or "raw"."""

    disk: str = ""
    disk_format: str = ""
    kernel: str = ""
    initrd: str = ""


def guest_spec(
    assignment: Assignment,
    task: Task,
    place: Place,
    images: GuestImages,
    *,
    kvm: bool,
    waits: bool = False,
    identity: str = "auto",
) -> SandboxSpec:
    """The sandbox in which an emulator runs `task`. `place.task_directory` has its overlay, and gets its sockets.

    `waits`: it boots nothing, but waits to be given a guest's state. `identity`: the guest's generation id, where it
    comes with one; else it is a new one's.
    """
    resources = task.resources
    mounts = [Mount(source=place.task_directory, target=DIRECTORY, read_only=False), *place.mounts]
    for name, source in (("disk", images.disk), ("kernel", images.kernel), ("initrd", images.initrd)):
        if source:
            mounts.append(Mount(source=source, target=f"{_IMAGES}/{name}"))
    if has_seed(task):
        mounts.append(Mount(source=place.memory, target=_MEMORY))
    mounts += [
        Mount(source=volume.path, target=f"{_VOLUMES}/{volume.name}", read_only=volume.read_only)
        for volume in place.disks
    ]
    return SandboxSpec(
        id=sandbox_id(assignment.alloc, task.name),
        argv=(
            "qemu-system-x86_64",
            *_arguments(assignment, task, images, kvm=kvm, waits=waits, identity=identity),
            *_volumes(place.disks),
        ),
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        cwd=DIRECTORY,
        root=HostRoot(),
        mounts=tuple(mounts),
        devices=(_TUN, _KVM) if kvm else (_TUN,),
        network_namespace=place.network_namespace,
        uid_first=place.uid_first,
        user=INNER_USER,
        hostname="emulator",
        limits=Limits(
            cpu_millis=resources.cpu_millis + EMULATOR.cpu_millis,
            cpu_max_millis=resources.cpu_max_millis,
            memory_bytes=resources.memory_bytes + EMULATOR.memory_bytes,
            pids_max=resources.pids_max,
        ),
        directory=place.directory,
    )


def _volumes(disks: tuple[Disk, ...]) -> Iterator[str]:
    """Each a disk of its own, beside the guest's."""
    for number, disk in enumerate(disks):
        file = {"driver": "file", "filename": f"{_VOLUMES}/{disk.name}"}
        node = {"driver": "raw", "node-name": f"volume{number}", "read-only": disk.read_only, "file": file}
        serial = disk.name[:_SERIAL_CHARS_MAX]
        device = f"virtio-blk-pci,drive=volume{number},serial={serial},{_ERRORS}"
        yield from ("-blockdev", json.dumps(node), "-device", device)


def cpus(resources: Resources) -> int:
    """How many processors a guest sees."""
    return min(-(-(resources.cpu_max_millis or resources.cpu_millis) // 1000), _CPUS_MAX)


def _arguments(
    assignment: Assignment, task: Task, images: GuestImages, *, kvm: bool, waits: bool, identity: str
) -> Iterator[str]:
    resources = task.resources
    yield from ("-name", f"{assignment.alloc}.{task.name}", "-no-user-config", "-nodefaults", "-display", "none")
    # Without graphics the firmware speaks on the serial line: why a disk does not boot is in the logs. Of a process the
    # logs are its own words.
    isolated = task.isolation is Isolation.VM
    graphics = "on" if isolated else "off"
    yield from ("-machine", f"{MACHINE},usb=off,graphics={graphics}", "-cpu", "max", "-smp", str(cpus(resources)))
    yield from ("-accel", "kvm" if kvm else f"tcg,tb-size={_TRANSLATED_MIB}")
    yield from ("-m", f"size={resources.memory_bytes // MIB}M")
    # A guest that resets itself ends: its restart policy says whether and when it boots again. The trace says why.
    yield from ("-action", "reboot=shutdown", "-D", f"{DIRECTORY}/{TRACE}", "-trace", SHUTDOWN_TRACE)
    yield from ("-S", "-incoming", "defer") if waits else ()
    yield from _kernel(task.image, images)
    yield from ("-device", f"vmgenid,guid={identity}", "-device", "virtio-rng-pci")
    yield from ("-netdev", f"tap,id=mesh,ifname={TAP},script=no,downscript=no")
    # Without a boot ROM: nothing is booted from the network, and its first packet is the guest's own.
    yield from ("-device", f"virtio-net-pci,netdev=mesh,mac={GUEST_MAC},romfile=")
    if images.disk:
        yield from (
            "-blockdev",
            json.dumps(_disk(images)),
            "-device",
            f"virtio-blk-pci,drive=disk,bootindex=1,{_ERRORS}",
        )
    if has_seed(task):
        yield from ("-blockdev", json.dumps(_seed()), "-device", "virtio-blk-pci,drive=seed")
    control = f"socket,id=qmp,path={DIRECTORY}/{QMP},server=on,wait=off"
    yield from ("-chardev", control, "-mon", "chardev=qmp,mode=control")
    # Takes no memory from the guest: its driver says how the guest's own is used.
    yield from ("-device", f"virtio-balloon-pci,id={BALLOON}")
    # For the QEMU guest agent, under the name by which it looks for its line.
    line = f"socket,id=agent,path={DIRECTORY}/{AGENT},server=on,wait=off"
    yield from ("-device", "virtio-serial-pci", "-chardev", line)
    yield from ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0")
    # All that the guest writes goes to our output, whether or not somebody sits at the console.
    log = f"logfile=/dev/fd/{2 if isolated else 1},logappend=on"
    console = f"socket,id=console,path={DIRECTORY}/{CONSOLE},server=on,wait=off,{log}"
    yield from ("-chardev", console, "-serial", "chardev:console")
    yield from _lines() if isolated else ()


def _lines() -> Iterator[str]:
    """Those of a process with a kernel of its own."""
    for number, (name, path) in enumerate(LINES.items()):
        yield from ("-chardev", f"file,id=line{number},path={path},append=on")
        yield from ("-device", f"virtserialport,chardev=line{number},name={name}")
    for name in TERMINALS:
        yield from ("-chardev", f"socket,id={name},path={DIRECTORY}/{name},server=on,wait=off")
        yield from ("-device", f"virtserialport,chardev={name},name={name}")


def _kernel(image: Image, images: GuestImages) -> Iterator[str]:
    if images.kernel:
        yield from ("-kernel", f"{_IMAGES}/kernel")
        yield from ("-append", f"{_KERNEL_ARGUMENTS} {image.kernel_arguments}".strip())
    if images.initrd:
        yield from ("-initrd", f"{_IMAGES}/initrd")


def _seed() -> Mapping[str, object]:
    file = {"driver": "file", "filename": f"{_MEMORY}/{SEED}"}
    return {"driver": "raw", "node-name": "seed", "read-only": True, "file": file}


def _disk(images: GuestImages) -> Mapping[str, object]:
    """The whole chain by hand: what a header says of another file is never followed."""
    base: dict[str, object] = {
        "driver": images.disk_format,
        "read-only": True,
        "file": {"driver": "file", "filename": f"{_IMAGES}/disk"},
    }
    if images.disk_format == "qcow2":
        base["backing"] = None
    overlay = {"driver": "file", "filename": f"{DIRECTORY}/{OVERLAY}"}
    return {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": overlay, "backing": base}
