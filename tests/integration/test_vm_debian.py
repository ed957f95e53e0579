"""A whole Debian as a guest: systemd, and cloud-init that does what the job says. Nothing was prepared in it."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from examples.vm import debian
from examples.vm import guest as example
from outrider.model.allocation import AllocStatus, Assignment, Desired
from outrider.model.job import MIB, CloudInit, Driver, File, GuestFile, Image, ImageKind, Resources
from tests.integration.agent_fleet import AgentFleet, fleet
from tests.integration.machines import GUEST, calls, emulators, file, mesh, neighbours, ran, serving
from tests.integration.network_lab import node
from tests.integration.processes import until

__all__ = ["fleet", "node"]
pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(3600)]

BOOT_S = 900.0  # emulated, on a busy machine
UNIT = b"""[Service]
ExecStart=/usr/bin/python3 -m http.server 8080 --directory /srv
DynamicUser=yes
"""


@pytest.fixture(scope="module")
def built() -> Path:
    return debian.build()


def wanted(built: Path) -> Assignment:
    disk: GuestFile = file(built / "disk.qcow2")
    image = Image(
        kind=ImageKind.DISK,
        reference=disk.reference,
        sha256=disk.sha256,
        kernel=file(built / "vmlinuz"),
        initrd=file(built / "initrd"),
        kernel_arguments=debian.KERNEL_ARGUMENTS,
        boot_deadline_s=BOOT_S,
    )
    asked = CloudInit(
        user="worker",
        files=(
            File(path="/srv/index.html", content=b"from a whole Debian\n"),
            File(path="/etc/systemd/system/pages.service", content=UNIT),
        ),
        commands=("systemctl daemon-reload", "systemctl start pages"),
    )
    like = serving(example.build())
    (task,) = like.group.tasks
    task = msgspec.structs.replace(
        task,
        driver=Driver.VM,
        image=image,
        files=(),
        cloud_init=asked,
        resources=Resources(cpu_millis=1000, memory_bytes=512 * MIB, disk_bytes=2048 * MIB),
        kill_timeout_s=300.0,
    )
    return msgspec.structs.replace(like, group=msgspec.structs.replace(like.group, tasks=(task,)))


async def test_cloud_init_does_what_the_job_says_and_systemd_ends_in_order(fleet: AgentFleet, built: Path) -> None:
    controller, wish = fleet.controller, wanted(built)  # first: to sum up the disk takes longer than a session stands
    await fleet.start()
    mesh(fleet)
    controller.assign(wish, *neighbours(), full=True)
    await until(lambda: controller.passing(GUEST), "cloud-init did its work", timeout_s=BOOT_S)
    mesh(fleet)
    await until(lambda: controller.mesh_applied == 2, "the mesh is known")
    assert await calls(fleet, "http://guest.mesh/") == "from a whole Debian\n"
    fetch = "import urllib.request as r; print(r.urlopen('http://api.mesh', timeout=30).read().decode(), end='')"
    async with asyncio.timeout(BOOT_S):
        while "nobody answers" in (said := await ran(fleet, "python3", "-c", fetch))[2]:  # noqa: ASYNC110
            await asyncio.sleep(1)
    assert said == (b"from a process\n", 0, "")
    assert (await ran(fleet, "sh", "-c", "cat /proc/1/comm; id -un worker; hostname"))[
        0
    ] == b"systemd\nworker\nguest-0\n"

    controller.assign(msgspec.structs.replace(wish, desired=Desired.STOP))
    await until(lambda: controller.status(GUEST) is AllocStatus.COMPLETE, "ended", timeout_s=300)
    assert controller.reports[GUEST].tasks[0].exit_code == 0, "of itself, not killed"
    assert not emulators(fleet)
