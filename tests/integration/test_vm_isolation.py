"""A process with `isolation: vm`: the same root and the same mesh as in a sandbox, under a kernel of its own."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from examples.vm import guest as example
from outrider.ids import AllocId, GroupName, JobName, TaskName
from outrider.model.allocation import AllocStatus, Assignment, Desired
from outrider.model.job import MIB, File, Group, Image, ImageKind, Isolation, Resources, RestartPolicy, Task
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.machines import BOOT_S, GUEST, calls, emulators, logs, mesh, neighbours, ran, serving, typed
from tests.integration.network_lab import Lab, node
from tests.integration.processes import until

__all__ = ["node"]
pytestmark = [pytest.mark.host, pytest.mark.timeout(400)]

SERVE = """
trap 'echo told to end >&2; exit 0' TERM
echo "$GREETING from $(id -u) in $PWD" | tee /task/www/index.html
busybox httpd -p 8080 -h /task/www
while true; do sleep 1; done
"""


@pytest.fixture(scope="module")
def built() -> Path:
    return example.build()


@pytest.fixture
async def fleet(node: Lab, built: Path) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - it is where this thread then lives
    named = {"kernel": "vmlinux", "modules": "modules", "busybox": "busybox", "agent": "qemu-ga"}
    async with agent_fleet(guest={key: str(built / name) for key, name in named.items()}) as made:
        yield made


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """An image's root file system, as `dir:` has it."""
    root = tmp_path / "root"
    for name in ("bin", "task", "tmp", "proc", "sys", "dev", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(built / "busybox", root / "bin/busybox")
    (root / "bin/busybox").chmod(0o755)
    for name in subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nworker:x:1000:1000::/task:/bin/sh\n")
    return root


def process(root: Path, command: tuple[str, ...], *files: File) -> Task:
    return Task(
        name=TaskName("machine"),
        command=command,
        isolation=Isolation.VM,
        image=Image(kind=ImageKind.DIR, reference=str(root)),
        env={"GREETING": "hello"},
        files=files,
        resources=Resources(cpu_millis=500, memory_bytes=128 * MIB, disk_bytes=64 * MIB),
        kill_timeout_s=30.0,
    )


def alone(task: Task, alloc: AllocId) -> Assignment:
    group = Group(name=GroupName("guest"), tasks=(task,), restart=RestartPolicy(attempts=0))
    return Assignment(alloc=alloc, job=JobName("machines"), job_version=1, group=group, index=0, batch=True)


async def test_a_process_serves_and_is_called_under_a_kernel_of_its_own(
    fleet: AgentFleet, built: Path, root: Path
) -> None:
    controller = fleet.controller
    await fleet.start()
    mesh(fleet)
    task = process(root, ("sh", "${task.dir}/serve.sh"), File(path="serve.sh", content=SERVE.encode()))
    files = (*task.files, File(path="www/index.html", content=b""))
    wish = serving(built)
    group = msgspec.structs.replace(wish.group, tasks=(msgspec.structs.replace(task, files=files),))
    wish = msgspec.structs.replace(wish, group=group)
    controller.assign(wish, *neighbours(), full=True)
    await until(lambda: controller.passing(GUEST), "serves", timeout_s=BOOT_S)
    mesh(fleet)
    await until(lambda: controller.mesh_applied == 2, "the mesh is known")
    assert await calls(fleet, "http://guest.mesh/") == "hello from 1000 in /task\n"
    assert await ran(fleet, "sh", "-c", "id -u; uname -r; wget -qO- http://api.mesh") == (
        f"1000\n{kernel(fleet)}\nfrom a process\n".encode(),
        0,
        "",
    )
    assert await logs(fleet, GUEST) == "hello from 1000 in /task\n", "and nothing else"
    assert await typed(fleet, "\nexpr 20 + $(id -u)\n", until_seen="1020") == ""
    controller.assign(msgspec.structs.replace(wish, desired=Desired.STOP))
    await until(lambda: controller.status(GUEST) is AllocStatus.COMPLETE, "ended", timeout_s=BOOT_S)
    assert controller.reports[GUEST].tasks[0].exit_code == 0
    assert "told to end\n" in await logs(fleet, GUEST)
    assert not emulators(fleet)
    assert not list((fleet.data / "microvms").glob(f"{GUEST}.*")), "its disk is thrown away with it"


def kernel(fleet: AgentFleet) -> str:
    found: str = fleet.controller.hellos[-1].node.fingerprint.runtimes["guest-kernel"]
    return found


async def test_its_exit_code_and_its_want_of_memory_are_told(fleet: AgentFleet, root: Path) -> None:
    controller = fleet.controller
    await fleet.start()
    mesh(fleet)
    fails, grows = AllocId("00000000a4"), AllocId("00000000a5")
    controller.assign(
        alone(process(root, ("sh", "-c", "exit 7")), fails),
        alone(process(root, ("tail", "/dev/zero")), grows),
        full=True,
    )
    await until(
        lambda: {controller.status(fails), controller.status(grows)} == {AllocStatus.FAILED},
        "both ended",
        timeout_s=2 * BOOT_S,
    )
    assert controller.reports[fails].tasks[0].exit_code == 7
    task = controller.reports[grows].tasks[0]
    assert (task.exit_code, task.oom_killed) == (137, True)
    assert "memory limit 128.0 MiB reached" in task.message
    assert not emulators(fleet)
