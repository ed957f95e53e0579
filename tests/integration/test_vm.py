"""Virtual machines under a real agent: real QEMU, a guest that the project builds, real sidecars around it."""
# ruff: noqa: ASYNC240 - a test may block its own loop

import json
import os
import platform
import re
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from agent.network.plan import next_address
from examples.vm import guest as example
from outrider.ids import AllocId, PortName, SecretName, ServiceName
from outrider.model.allocation import AllocStatus, Assignment, Desired
from outrider.model.belongings import SecretUse, Template
from outrider.model.job import (
    MIB,
    GuestFile,
    Image,
    ImageKind,
    Network,
    Port,
    Service,
)
from outrider.v1 import fleet_pb2
from outrider.v1.fleet_pb2 import VmVerb
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.machines import (
    API,
    BOOT_S,
    GUEST,
    VISITOR,
    built,
    calls,
    emulators,
    file,
    image,
    logs,
    machine,
    mesh,
    neighbours,
    ran,
    serving,
    typed,
)
from tests.integration.network_lab import NODE, Lab, node
from tests.integration.processes import until

__all__ = ["built", "node"]
pytestmark = pytest.mark.host
SECRET = b"a-word-that-is-nowhere-else\n"
METRICS = 9464  # in the node's own namespace


@pytest.fixture
async def fleet(node: Lab) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - it is where this thread then lives
    async with agent_fleet(metrics_listen=f"127.0.0.1:{METRICS}") as made:
        yield made


def told_inside() -> set[str]:
    """The names of the figures that guests tell of themselves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.removeprefix("outrider_guest_").partition("{")[0] for line in lines if line.startswith("outrider_guest_")
    }


def with_secrets(wish: Assignment) -> Assignment:
    (task,) = wish.group.tasks
    template = Template(path="name", content="{{ alloc.group }} of {{ alloc.job }}\n")
    given = msgspec.structs.replace(task, secrets=(SecretUse(name=SecretName("db"), file="db"),), templates=(template,))
    group = msgspec.structs.replace(wish.group, tasks=(given,))
    return msgspec.structs.replace(wish, group=group, secrets={SecretName("db"): 1})


async def test_a_guest_serves_and_calls_survives_the_agent_comes_back_and_ends_in_order(
    fleet: AgentFleet, built: Path
) -> None:
    controller = fleet.controller
    await fleet.start()
    mesh(fleet)
    controller.secrets["db"] = (1, SECRET)
    wish = (with_secrets(serving(built)), *neighbours())
    controller.assign(*wish, full=True)
    await until(lambda: all(map(controller.passing, (GUEST, API, VISITOR))), "all healthy", timeout_s=BOOT_S)
    mesh(fleet)
    await until(lambda: controller.mesh_applied == 2, "the mesh is known")
    assert await calls(fleet, "http://guest.mesh/") == "hello from a guest\n"
    assert await calls(fleet, "http://guest.mesh/cgi-bin/api") == "from a process\n"
    (emulator,) = emulators(fleet)
    status = Path(f"/proc/{emulator}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status

    fleet.kill(signal.SIGKILL)
    await fleet.start()
    assert {report.alloc: report for report in controller.hellos[-1].reports}[GUEST].checks[0].passing
    controller.assign(*wish, full=True)
    mesh(fleet)
    assert await calls(fleet, "http://guest.mesh/") == "hello from a guest\n"
    assert emulators(fleet) == [emulator], "the guest noticed nothing"

    assert await ran(fleet, "sh", "-c", "echo $((6 * 7)); echo oh >&2; exit 3") == (b"42\noh\n", 3, "")
    assert "the guest says" in (await ran(fleet, "/nowhere"))[2]
    assert "the QEMU guest agent runs programs, and it has no terminals" in (await ran(fleet, "sh", tty=True))[2]
    read = "stat -c '%a %u' /mnt/secrets/db; cat /mnt/secrets/db /mnt/templates/name"
    assert (await ran(fleet, "sh", "-c", read))[0] == b"400 0\n" + SECRET + b"guest of machines\n"
    assert not fleet.shell(f"grep -rlF {SECRET.decode().strip()} {fleet.data}"), "on no disk of the node"
    keep = fleet_pb2.VmCommand(verb=VmVerb.VM_VERB_SNAPSHOT, snapshot="warm")
    kept = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=GUEST, vm=keep))
    assert "a snapshot would keep them on disk" in (await controller.tunnelled(kept))[1].error
    assert await typed(fleet, "expr 20 + 22\n", until_seen="42") == ""
    await until(lambda: {"cpu_seconds_total", "memory_bytes", "memory_used_bytes"} <= told_inside(), "tells of itself")
    assert "no console" in await typed(fleet, "", until_seen="", alloc=VISITOR)

    os.kill(emulator, signal.SIGKILL)
    await until(lambda: controller.reports[GUEST].tasks[0].restarts == 1, "seen")
    await until(lambda: controller.passing(GUEST), "booted again", timeout_s=BOOT_S)
    assert await calls(fleet, "http://guest.mesh/") == "hello from a guest\n"

    stopped = msgspec.structs.replace(wish[0], desired=Desired.STOP)
    controller.assign(stopped)
    await until(lambda: controller.status(GUEST) is AllocStatus.COMPLETE, "ended", timeout_s=30)
    assert controller.reports[GUEST].tasks[0].exit_code == 0, "of itself, not killed"
    told = await logs(fleet, GUEST)
    assert told.count("guest serves") == 2, "both runs' consoles"
    assert "guest stops" in told
    assert not emulators(fleet)
    assert not list((fleet.data / "allocations" / GUEST).glob("*.vm")), "its disk is thrown away with it"


# What a guest tries that is root in it: the allocation's own addresses, the node, the world, and another's address.
PROBE = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t sysfs sys /sys
ip link set lo up; ip link set eth0 up
udhcpc -i eth0 -s /lease -q -n -t 10 -T 1 >/dev/null 2>&1
try() { if nc -w 2 "$1" "$2" </dev/null >/dev/null 2>&1; then echo "reached $1:$2"; else echo "refused $1:$2"; fi; }
try 198.18.0.1 53
try 192.0.2.1 22
try @local@ 15100
try @local@ 15001
try 198.18.1.1 80
try @node@ @port@
nslookup other.mesh >/dev/null 2>&1 && echo "knows other.mesh"
ip address add @local@/32 dev eth0
ip route del default; ip route add default via 192.0.2.1 src @local@
ip route replace 198.18.0.1/32 via 192.0.2.1 src @local@
try 198.18.0.1 53
echo "probe done"
poweroff -f
"""


async def test_a_guest_reaches_nothing_but_the_mesh(fleet: AgentFleet, built: Path) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    # The first address that a fresh agent gives out: the guest knows it, as a patient one would find it out.
    claims = Path("/run/outrider/claims").glob("addresses-*.json")
    (block,) = (int(path.stem.partition("-")[2]) for path in claims if fleet.run.name in path.read_text())
    local = next_address(block, ())
    with socket.create_server((NODE, 0)) as listener:
        assert local is not None
        text = PROBE.replace("@local@", local).replace("@node@", NODE)
        text = text.replace("@port@", str(listener.getsockname()[1]))
        disk = fleet.directory / "probe.qcow2"
        lease = (Path(example.__file__).parent / "lease.sh").read_text()
        example.make_disk({"init": text, "lease": lease}, {"bin/busybox": built / "busybox"}, disk)
        alone = machine(image(built, disk), GUEST)
        service = Service(name=ServiceName("guest"), port=PortName("http"))
        network = Network(ports=(Port(name=PortName("http")),))
        group = msgspec.structs.replace(alone.group, services=(service,), network=network)
        wish = msgspec.structs.replace(alone, group=group, mesh_ports={ServiceName("guest"): 20001}, batch=True)
        controller.assign(wish, full=True)
        await until(lambda: controller.status(GUEST) is AllocStatus.COMPLETE, "ended of itself", timeout_s=BOOT_S)
        assert any(report.local_address == local for report in controller.history)
    told = [line.strip() for line in (await logs(fleet, GUEST)).splitlines() if line.startswith(("re", "knows", "pro"))]
    assert told == [
        "reached 198.18.0.1:53",
        "refused 192.0.2.1:22",
        f"refused {local}:15100",
        f"refused {local}:15001",
        "refused 198.18.1.1:80",
        told[5],
        "refused 198.18.0.1:53",
        "probe done",
    ]
    assert told[5].startswith(f"refused {NODE}:")


async def test_what_cannot_boot_says_why(fleet: AgentFleet, built: Path) -> None:
    controller = fleet.controller
    await fleet.start()
    blank, based = fleet.directory / "blank.raw", fleet.directory / "based.qcow2"
    blank.write_bytes(bytes(MIB))
    corrupt = fleet.directory / "corrupt.qcow2"
    corrupt.write_bytes((built / "disk.qcow2").read_bytes()[:512] + os.urandom(MIB))
    fleet.shell(f"qemu-img create -q -u -f qcow2 -F raw -b /etc/shadow {based} 1M")
    good = image(built, built / "disk.qcow2")
    firmware = Image(kind=ImageKind.DISK, reference=str(blank), sha256=file(blank).sha256, boot_deadline_s=4.0)
    absent = GuestFile(reference="/nowhere/vmlinux", sha256="0" * 64)
    bad = {
        "panic": machine(image(built, None), AllocId("00000000d1")),
        "blank": machine(firmware, AllocId("00000000d2")),
        "checksum": machine(msgspec.structs.replace(good, sha256="1" * 64), AllocId("00000000d3")),
        "backing": machine(image(built, based), AllocId("00000000d4")),
        "large": machine(good, AllocId("00000000d5"), disk_bytes=8 * MIB),
        "corrupt": machine(image(built, corrupt), AllocId("00000000d7")),
        "absent": machine(msgspec.structs.replace(good, kernel=absent), AllocId("00000000d6")),
    }
    controller.assign(*bad.values(), full=True)

    def failed(name: str) -> bool:
        return controller.status(bad[name].alloc) is AllocStatus.FAILED

    await until(lambda: all(map(failed, bad)), "all failed", timeout_s=BOOT_S)
    reports = {name: controller.reports[each.alloc] for name, each in bad.items()}
    assert "the guest panicked, or reset itself" in reports["panic"].message
    assert "Kernel panic - not syncing" in reports["panic"].log_tail
    assert "no packet within 4 s of its start" in reports["blank"].message
    assert "No bootable device" in reports["blank"].log_tail
    assert "is another file: its sha256 is" in reports["checksum"].message
    assert "has a backing file" in reports["backing"].message
    assert reports["corrupt"].message
    assert "disk: 32Mi" in reports["large"].message
    assert "/nowhere/vmlinux: No such file or directory on this node" in reports["absent"].message
    assert not emulators(fleet)
    assert not list((fleet.data / "images").glob("new-*")), "what was refused is not kept"


async def test_kvm_is_open_to_the_emulator_where_the_self_test_booted_a_guest_with_it(
    fleet: AgentFleet, built: Path
) -> None:
    """That the guest gets far is not asked: a software KVM kills it sooner or later."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("this host has no /dev/kvm")
    version = re.search(r"\d+(\.\d+)+", fleet.shell("qemu-system-x86_64 --version"))
    assert version is not None
    fleet.data.mkdir(parents=True, exist_ok=True)
    verdict = {"kernel": platform.release(), "qemu": version[0], "kvm": "works"}
    (fleet.data / "kvm.json").write_text(json.dumps(verdict))
    controller = fleet.controller
    await fleet.start()
    controller.assign(machine(image(built, built / "disk.qcow2"), GUEST), full=True)
    await until(lambda: bool(emulators(fleet)), "it runs")
    (emulator,) = emulators(fleet)
    assert b"\0-accel\0kvm\0" in Path(f"/proc/{emulator}/cmdline").read_bytes()

    def has_a_machine() -> bool:
        return any("kvm-vm" in str(path.readlink()) for path in Path(f"/proc/{emulator}/fd").iterdir())

    await until(has_a_machine, "KVM made it a machine")
