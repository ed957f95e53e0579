"""A sandbox whose root is an unpacked image: owners, writes, links that lead out, devices."""

import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.sandbox import logs, mounts
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import ImageRoot, Mount
from outrider.model.job import MIB
from tests.integration.sandboxes import Sandboxes, sandboxes

pytestmark = pytest.mark.host

BUSYBOX = Path("/bin/busybox")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    with sandboxes(tmp_path_factory.mktemp("roots")) as place:
        yield place


@pytest.fixture
async def runtime(place: Sandboxes) -> AsyncIterator[SandboxRuntime]:
    runtime = place.runtime()
    yield runtime
    await runtime.reap(())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A tree as an image's unpacking leaves it: owned by ids of the host that mean those of the image."""
    root = tmp_path / "image"
    for name in ("bin", "etc", "home/app"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(BUSYBOX.read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    (root / "etc/motd").write_text("of the image\n")
    os.chown(root / "home/app", 33, 44)
    return root


async def run(runtime: SandboxRuntime, place: Sandboxes, image: Path, script: str, **changes: object) -> list[str]:
    root = ImageRoot(path=str(image), writable_bytes=MIB)
    spec = msgspec.structs.replace(place.spec("sh", "-c", script), root=root, **changes)
    await runtime.start(spec)
    await runtime.wait(spec.id)
    pieces = [piece async for piece in logs.read(spec.directory)]
    await runtime.delete(spec.id)
    return b"".join(piece.data for piece in pieces).decode().splitlines()


async def test_files_belong_to_whom_the_image_says(runtime: SandboxRuntime, place: Sandboxes, image: Path) -> None:
    owners = "busybox stat -c '%u:%g' /home/app /etc/motd /; busybox id -u; busybox id -g"
    script = f"{owners}; echo mine >/home/app/x && busybox cat /home/app/x"
    lines = await run(runtime, place, image, script, user=33, group=44)
    assert lines == ["33:44", "0:0", "0:0", "33", "44", "mine"]
    assert (image / "home/app").stat().st_uid == 33
    assert list((image / "home/app").iterdir()) == []


async def test_what_is_written_is_bounded_and_gone_afterwards(
    runtime: SandboxRuntime, place: Sandboxes, image: Path
) -> None:
    fill = "busybox dd if=/dev/zero of=/home/app/big bs=64k count=64 2>/dev/null || echo full; busybox ls /home/app"
    assert await run(runtime, place, image, fill, user=33, group=44) == ["full", "big"]
    assert await run(runtime, place, image, "busybox ls /home/app", user=33, group=44) == []
    assert not [point for point in mounts.mount_points() if str(place.directory / "sandboxes") in point]


async def test_mount_points_below_links_stay_inside(
    runtime: SandboxRuntime, place: Sandboxes, image: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (image / "etc/resolv.conf").symlink_to("/../../../../../../../../../../.." + str(outside / "stub"))
    names = tmp_path / "resolv.conf"
    names.write_text("nameserver 198.18.0.1\n")
    mount = Mount(source=str(names), target="/etc/resolv.conf")
    lines = await run(
        runtime, place, image, "busybox cat /etc/resolv.conf; echo >/dev/null && echo ok", mounts=(mount,)
    )
    assert lines == ["nameserver 198.18.0.1", "ok"]
    assert list(outside.iterdir()) == []


async def test_devices_and_set_uid_programs_of_an_image_are_nothing(
    runtime: SandboxRuntime, place: Sandboxes, image: Path
) -> None:
    os.mknod(image / "disk", stat.S_IFBLK | 0o666, os.makedev(254, 0))
    os.mknod(image / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (image / "bin/busybox").chmod(0o4755)
    lines = await run(
        runtime,
        place,
        image,
        "busybox head -c1 /disk || echo no; echo >/null || echo no; busybox id -u; busybox head -2 /proc/self/uid_map",
    )
    assert [line for line in lines if "can't" not in line and "denied" not in line.lower()][:3] == ["no", "no", "1000"]
