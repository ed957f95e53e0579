"""A process with `isolation: vm`: the same root and the same mesh as in a sandbox, under a kernel of its own."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from agent.drivers.microvm import TERMINALS
from outrider.ids import AllocId, GroupName, JobName, SecretName, TaskName
from outrider.model.allocation import AllocStatus, Assignment, Desired
from outrider.model.belongings import Artifact, OnChange, SecretUse, Template
from outrider.model.job import MIB, File, Group, Image, ImageKind, Isolation, Resources, RestartPolicy, Task
from outrider.v1 import fleet_pb2
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.machines import (
    BOOT_S,
    GUEST,
    built,
    calls,
    emulators,
    file,
    logs,
    mesh,
    neighbours,
    ran,
    serving,
    typed,
)
from tests.integration.network_lab import Lab, node
from tests.integration.processes import until

__all__ = ["built", "node"]
pytestmark = [pytest.mark.host, pytest.mark.timeout(400)]

SECRET, NEWER = b"a-word-that-is-nowhere-else", b"another-word-that-is-nowhere-else"
SERVE = """
trap 'echo told to end >&2; exit 0' TERM
trap 'echo "told of $(rev /secrets/db/key)"' HUP
echo "$GREETING from $(id -u) in $PWD" | tee /task/www/index.html
busybox httpd -p 8080 -h /task/www
while true; do sleep 1; done
"""


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
    task = msgspec.structs.replace(task, files=(*task.files, File(path="www/index.html", content=b"")))
    wish = serving(built)
    wish = msgspec.structs.replace(wish, secrets={SecretName("db"): 1, SecretName("key"): 1})
    wish = msgspec.structs.replace(wish, group=msgspec.structs.replace(wish.group, tasks=(given(task, fleet),)))
    controller.secrets = {"db": (1, SECRET), "key": (1, b"of-the-environment\n")}
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
    await has_its_belongings(fleet, wish)
    await has_a_terminal(fleet)
    assert await typed(fleet, "\nexpr 20 + $(id -u)\n", until_seen="1020") == ""
    controller.assign(msgspec.structs.replace(wish, desired=Desired.STOP))
    await until(lambda: controller.status(GUEST) is AllocStatus.COMPLETE, "ended", timeout_s=BOOT_S)
    assert controller.reports[GUEST].tasks[0].exit_code == 0
    assert "told to end\n" in await logs(fleet, GUEST)
    assert not emulators(fleet)
    assert not list((fleet.data / "microvms").glob(f"{GUEST}.*")), "its disk is thrown away with it"


def given(task: Task, fleet: AgentFleet) -> Task:
    """With one of each kind."""
    tool = fleet.directory / "tool"
    tool.write_text("#!/bin/sh\necho a tool\n")
    return msgspec.structs.replace(
        task,
        secrets=(
            SecretUse(name=SecretName("db"), file="db/key", on_change=OnChange.SIGNAL),
            SecretUse(name=SecretName("key"), env="KEY"),
        ),
        env={**task.env, "URL": "x:${secret.key}@y"},
        templates=(Template(path="app.conf", content="{{ alloc.group }} {{ secret('db') }}", on_change=OnChange.NONE),),
        artifacts=(
            Artifact(path="bin/tool", source=f"file:{tool}", sha256=file(tool).sha256, mode=0o755),
            Artifact(path="plain", source=f"file:{tool}", sha256=file(tool).sha256),
        ),
    )


async def has_its_belongings(fleet: AgentFleet, wish: Assignment) -> None:
    """As a process does, and they are on no disk of the node; what changes is replaced, and it is told."""
    seen = "cat /secrets/db/key; stat -c ' %a %u' /secrets/db/key; echo $KEY $URL; cat /templates/app.conf; "
    seen += "echo; /artifacts/bin/tool"
    expected = SECRET + b" 400 1000\nof-the-environment x:of-the-environment@y\nguest " + SECRET + b"\na tool\n"
    assert await ran(fleet, "sh", "-c", seen) == (expected, 0, "")
    touch = (
        "for at in secrets templates artifacts; do touch /$at/x || rm -f /$at/plain; done 2>/dev/null; ls /artifacts"
    )
    assert (await ran(fleet, "sh", "-c", touch))[0] == b"bin\nplain\n", "they are read-only"
    fleet.controller.secrets["db"] = (2, NEWER)
    fleet.controller.assign(msgspec.structs.replace(wish, secrets={SecretName("db"): 2, SecretName("key"): 1}))
    async with asyncio.timeout(BOOT_S):
        while f"told of {NEWER.decode()[::-1]}\n" not in await logs(fleet, GUEST):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)
        while (await ran(fleet, "cat", "/templates/app.conf"))[0] != b"guest " + NEWER:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert fleet.controller.reports[GUEST].tasks[0].restarts == 0
    for word in (SECRET, NEWER, b"of-the-environment"):
        assert not fleet.shell(f"grep -rlF {word.decode()} {fleet.data}"), "on no disk of the node"


async def has_a_terminal(fleet: AgentFleet) -> None:
    controller = fleet.controller
    command = ["sh", "-c", "stty size; tty | cut -c1-9; read -r word; stty size; echo $word $TERM; exit 5"]
    request = fleet_pb2.ExecRequest(alloc=GUEST, command=command, tty=True, rows=30, columns=100)
    tunnel = controller.open_tunnel(exec=request)
    sizes = fleet_pb2.TerminalSize(rows=50, columns=200)
    controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(resize=sizes))
    controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin=b"typed\r"))
    output, end = await controller.tunnelled(tunnel)
    assert (end.exit_code, end.error) == (5, "")
    assert output.replace(b"\r\n", b"\n").endswith(b"50 200\ntyped xterm-256color\n"), output
    large = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=GUEST, command=["seq", "20000"], tty=True))
    output, end = await controller.tunnelled(large)
    assert (output.split(), end.exit_code) == ([str(n).encode() for n in range(1, 20_001)], 0), "all of it"
    # One that is left hangs up, and its line is somebody else's.
    for _ in range(len(TERMINALS) + 1):
        left = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=GUEST, command=["sh"], tty=True))
        frame = await controller.tunnels[left].get()
        assert frame is not None
        assert frame.stdout, frame
        controller.tunnel_inputs[left].put_nowait(fleet_pb2.TunnelFrame(stdin=b"exit 3\r"))
        _, end = await controller.tunnelled(left)
        assert (end.exit_code, end.error) == (3, "")


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
