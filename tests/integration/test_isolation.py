"""Each wall of a sandbox, with an attempt to get through it."""
# ruff: noqa: ASYNC221, ASYNC240, S108 - a test may block its own loop; /tmp is the one inside

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.sandbox import logs
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import Exit, Limits, SandboxSpec
from outrider.model.job import MIB
from tests.integration.sandboxes import Sandboxes, sandboxes

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    with sandboxes(tmp_path_factory.mktemp("isolation")) as place:
        yield place


@pytest.fixture
async def runtime(place: Sandboxes) -> AsyncIterator[SandboxRuntime]:
    runtime = place.runtime()
    yield runtime
    await runtime.reap(())


async def ran(runtime: SandboxRuntime, spec: SandboxSpec) -> tuple[Exit, str]:
    await runtime.start(spec)
    async with asyncio.timeout(20):
        ended = await runtime.wait(spec.id)
    output = logs.last_lines(spec.directory, 100)
    return ended, output


async def shell(runtime: SandboxRuntime, place: Sandboxes, script: str) -> str:
    _, output = await ran(runtime, place.spec("sh", "-c", script))
    return output


async def test_workload_is_neither_root_nor_capable_and_stays_so(runtime: SandboxRuntime, place: Sandboxes) -> None:
    status = await shell(runtime, place, "cat /proc/self/status; cat /proc/self/uid_map")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert set(fields["Uid"].split()) == {"1000"}
    assert set(fields["Gid"].split()) == {"1000"}
    assert fields["Groups"].split() in ([], ["1000"])
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    assert status.splitlines()[-1].split() == ["0", str(place.uid_first), "65536"]


async def test_exec_gets_no_more_than_the_workload_has(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    async with await runtime.exec(spec.id, ["cat", "/proc/self/status"]) as process:
        output = b""
        while (piece := await process.read()) is not None:
            output += piece[1]
        assert await process.wait() == 0
    fields = dict(line.split(":", 1) for line in output.decode().splitlines())
    assert set(fields["Uid"].split()) == {"1000"}
    assert {int(fields[name], 16) for name in ("CapEff", "CapBnd", "CapAmb")} == {0}
    assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")


SYSTEM_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number, *arguments in [
    ("unshare", 272, 0x10000000), ("mount", 165, 0, 0, 0, 0, 0), ("keyctl", 250, 0, 0), ("bpf", 321, 0, 0, 0),
    ("ptrace", 101, 0, 0, 0, 0), ("io_uring_setup", 425, 1, 0), ("setns", 308, 0, 0), ("userfaultfd", 323, 0),
    ("clone new user namespace", 56, 0x10000000 | 17, 0, 0, 0, 0), ("perf_event_open", 298, 0, 0, 0, 0, 0),
]:
    result = libc.syscall(number, *arguments)
    print(name, result, errno.errorcode.get(ctypes.get_errno()))
print("clone3", libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()])
print("AF_PACKET", libc.socket(17, 3, 0), "AF_ALG", libc.socket(38, 5, 0), "AF_VSOCK", libc.socket(40, 1, 0))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the calls are those of x86_64")
async def test_system_calls_that_reach_the_host_are_refused(runtime: SandboxRuntime, place: Sandboxes) -> None:
    _, output = await ran(runtime, place.spec("python3", "-c", SYSTEM_CALLS))
    *refused, clone3, sockets = output.splitlines()
    assert len(refused) == 10
    assert [line for line in refused if not line.endswith(("-1 EPERM", "-1 ENOSYS"))] == []
    assert clone3 == "clone3 -1 ENOSYS"
    assert sockets == "AF_PACKET -1 AF_ALG -1 AF_VSOCK -1"


async def test_root_is_read_only(runtime: SandboxRuntime, place: Sandboxes) -> None:
    output = await shell(
        runtime,
        place,
        "for at in / /etc /usr /usr/bin /bin /dev /sys; do touch $at/x 2>/dev/null && echo wrote $at; done",
    )
    assert output == ""
    output = await shell(runtime, place, "cut -d' ' -f5,6 /proc/self/mountinfo")
    writable = {line.split()[0] for line in output.splitlines() if line.split()[1].startswith("rw")}
    assert {at for at in writable if not at.startswith("/dev")} == {"/proc", "/tmp"}


async def test_tmp_is_private_and_bounded(runtime: SandboxRuntime, place: Sandboxes) -> None:
    output = await shell(
        runtime, place, "exec 2>&1; ls -A /tmp; head -c 3M /dev/zero > /tmp/full; stat -c %s /tmp/full"
    )
    assert output.splitlines() == ["head: error writing 'standard output': No space left on device", str(MIB)]
    assert await shell(runtime, place, "ls -A /tmp") == ""


async def test_kernel_settings_are_masked(runtime: SandboxRuntime, place: Sandboxes) -> None:
    output = await shell(
        runtime,
        place,
        "head -c1 /proc/kcore /proc/keys /proc/kmsg 2>/dev/null | tr -d '\\n'; "
        "for at in /proc/sysrq-trigger /proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory"
        " /proc/sys/net/ipv4/ip_forward; do"
        ' sh -c "echo 1 > $at" 2>/dev/null && echo wrote $at; done; ls -A /sys',
    )
    assert "wrote" not in output
    assert {part for part in output.split("==>") if part.strip()} <= {
        f" /proc/{at} <==" for at in ("kcore", "keys", "kmsg")
    }


async def test_host_files_are_out_of_sight(runtime: SandboxRuntime, place: Sandboxes) -> None:
    output = await shell(
        runtime,
        place,
        "ls -d /home /root /var /srv /opt /mnt /run /boot /etc/shadow /etc/ssh 2>/dev/null; cat /etc/passwd",
    )
    assert [line.split(":")[0] for line in output.splitlines()] == ["root", "user", "nobody"]
    names = set((await shell(runtime, place, "ls /dev")).split())
    assert names <= {
        *("core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty"),
        *("urandom", "zero"),
    }


async def test_other_processes_are_out_of_sight_and_reach(runtime: SandboxRuntime, place: Sandboxes) -> None:
    other = place.spec("sleep", "60")
    status = await runtime.start(other)
    output = await shell(
        runtime,
        place,
        f"for at in /proc/[0-9]*; do echo pid; done; kill -9 {status.pid} 2>/dev/null && echo killed; "
        "kill -9 -1; echo alive",
    )
    lines = output.splitlines()
    assert lines.count("pid") <= 3  # its init, its shell, perhaps a child of it
    assert "killed" not in lines
    assert Path(f"/proc/{status.pid}").exists()


async def test_each_has_names_of_its_own(runtime: SandboxRuntime, place: Sandboxes) -> None:
    await shell(runtime, place, "exec ipcmk --shmem 4096")
    output = await shell(
        runtime, place, "cat /proc/sysvipc/shm | wc -l; uname -n; cut -d: -f3 /proc/self/cgroup | sort -u"
    )
    assert output.split() == ["1", "sandbox", "/"]


async def test_host_hands_out_no_uid_of_another_sandbox(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    status = await runtime.start(spec)
    children = Path(f"/proc/{status.pid}/task/{status.pid}/children").read_text().split()
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in (str(status.pid), *children)}
    assert owners == {spec.uid_first + 1000}


async def test_memory_limit_is_named_as_such(runtime: SandboxRuntime, place: Sandboxes) -> None:
    ended, _ = await ran(runtime, place.spec("python3", "-c", "bytearray(200 << 20)"))
    assert ended.oom_killed
    assert (ended.code, ended.signal) == (137, signal.SIGKILL)


async def test_death_without_want_of_memory_is_not_named_so(runtime: SandboxRuntime, place: Sandboxes) -> None:
    ended, _ = await ran(runtime, place.spec("python3", "-c", "import os; os.kill(os.getpid(), 9)"))
    assert not ended.oom_killed
    assert (ended.code, ended.signal) == (137, signal.SIGKILL)


FORK_BOMB = """
import os, time
born = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        born += 1
except OSError as error:
    print(born, error.strerror, flush=True)
"""


async def test_fork_bomb_is_bounded(runtime: SandboxRuntime, place: Sandboxes) -> None:
    limits = Limits(cpu_millis=100, memory_bytes=128 * MIB, pids_max=20)
    _, output = await ran(runtime, place.spec("python3", "-c", FORK_BOMB, limits=limits))
    born, why = output.split(" ", 1)
    assert 10 <= int(born) < 20
    assert why.strip() == "Resource temporarily unavailable"


async def test_cpu_quota_holds(runtime: SandboxRuntime, place: Sandboxes) -> None:
    limits = Limits(cpu_millis=100, cpu_max_millis=200, memory_bytes=64 * MIB, pids_max=20)
    busy = "import time; end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    _, output = await ran(runtime, place.spec("python3", "-c", busy, limits=limits))
    assert 0.1 < float(output) < 0.6  # a fifth of 1.5 s is 0.3 s


async def test_network_is_that_of_the_namespace(runtime: SandboxRuntime, place: Sandboxes) -> None:
    output = await shell(runtime, place, "tail -n +3 /proc/net/dev | cut -d: -f1; ip link set lo down 2>&1")
    assert output.splitlines()[0].strip() == "lo"
    assert "Operation not permitted" in output


async def test_links_in_an_image_do_not_lead_out_of_it(
    runtime: SandboxRuntime, place: Sandboxes, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    (image / "bin").mkdir(parents=True)
    subprocess.run(["cp", "/bin/busybox", image / "bin" / "busybox"], check=True)
    (image / "bin" / "sh").symlink_to("/bin/busybox")
    (image / "etc").symlink_to("/etc")
    (image / "tmp").symlink_to("/root")
    output_spec = place.spec(
        "/bin/sh", "-c", "/bin/busybox ls /etc/shadow; echo x > /tmp/mine; /bin/busybox id -u", image=image
    )
    _, output = await ran(runtime, output_spec)
    assert "1000" in output.splitlines()
    assert "ls: /etc/shadow: " in output  # a link to itself, once the root is the image's
    assert not Path("/root/mine").exists()
    assert sorted(entry.name for entry in image.iterdir()) == ["bin", "etc", "tmp"]  # never written to
