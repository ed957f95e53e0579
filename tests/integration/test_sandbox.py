"""The life of a sandbox: started, watched, found again, ended, removed; whatever kills the agent meanwhile."""
# ruff: noqa: ASYNC110, ASYNC221, ASYNC240 - a test may block its own loop

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.drivers import task_directory
from agent.sandbox import logs, mounts, process
from agent.sandbox.cgroup import Version, detect
from agent.sandbox.conmon import Directory
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, Mount, SandboxRecord, StartError
from outrider.errors import HostError, InputError
from outrider.model.job import MIB, File
from tests.integration.sandboxes import Sandboxes, sandboxes

pytestmark = pytest.mark.host

RECORD = msgspec.json.Decoder(SandboxRecord)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    with sandboxes(tmp_path_factory.mktemp("sandbox")) as place:
        yield place


@pytest.fixture
async def runtime(place: Sandboxes) -> AsyncIterator[SandboxRuntime]:
    runtime = place.runtime()
    yield runtime
    await runtime.reap(())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def leftovers(place: Sandboxes) -> list[str]:
    """What a removed sandbox must not leave: groups, containers, records, mounts."""
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{place.cgroup}/*") if path.is_dir()]
    files = [str(path) for path in (place.directory / "run").glob("crun/*")]
    files += [str(path) for path in (place.directory / "run").glob("sandboxes/*")]
    points = [point for point in mounts.mount_points() if point.startswith(str(place.directory / "sandboxes"))]
    return groups + files + points


async def test_exit_code_and_output_are_kept(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sh", "-c", "echo out; echo err >&2; printf unfinished; exit 7")
    status = await runtime.start(spec)
    ended = await runtime.wait(spec.id)
    assert (ended.code, ended.signal, ended.oom_killed) == (7, None, False)
    assert ended.finished_at_s >= status.started_at_s - 1
    pieces = [piece async for piece in logs.read(spec.directory)]
    assert b"".join(piece.data for piece in pieces if piece.stream == "stdout") == b"out\nunfinished"
    assert b"".join(piece.data for piece in pieces if piece.stream == "stderr") == b"err\n"
    await runtime.delete(spec.id)
    await runtime.delete(spec.id)
    assert leftovers(place) == []
    assert "err" in logs.last_lines(spec.directory, 10)


async def test_start_says_which_command_is_missing(runtime: SandboxRuntime, place: Sandboxes) -> None:
    for command in ("no-such-program", "/usr/bin", "/etc/passwd", "./app"):
        with pytest.raises(StartError, match=f"command '{command}' is not an executable file in the host image"):
            await runtime.start(place.spec(command))
    assert leftovers(place) == []


async def test_start_says_what_is_missing_on_the_node(
    runtime: SandboxRuntime, place: Sandboxes, tmp_path: Path
) -> None:
    with pytest.raises(StartError, match=r"image directory .*/absent is not there"):
        await runtime.start(place.spec("true", image=tmp_path / "absent"))
    with pytest.raises(StartError, match="what should be mounted at /data"):
        await runtime.start(place.spec("true", mounts=(Mount(source=str(tmp_path / "absent"), target="/data"),)))
    assert leftovers(place) == []


async def test_sigterm_ends_a_program_that_does_not_handle_it(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    await runtime.signal(spec.id, signal.SIGTERM)
    async with asyncio.timeout(5):
        ended = await runtime.wait(spec.id)
    assert (ended.code, ended.signal) == (143, signal.SIGTERM)


async def test_restarted_agent_finds_what_runs_and_what_ended(runtime: SandboxRuntime, place: Sandboxes) -> None:
    running, done = place.spec("sh", "-c", "sleep 0.3; exit 5"), place.spec("sh", "-c", "exit 4")
    await runtime.start(running)
    await runtime.start(done)
    await runtime.wait(done.id)
    later = place.runtime()
    found = {status.id: status.running for status in await later.list()}
    assert found == {running.id: True, done.id: False}
    assert (await later.wait(done.id)).code == 4
    assert (await later.wait(running.id)).code == 5


async def test_a_renamed_sandbox_is_the_same_under_its_new_name(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sh", "-c", "sleep 0.2; seq 600; exit 3", log_bytes_max=80_000)
    started = await runtime.start(spec)
    moved = place.directory / "sandboxes" / "moved"
    runtime.rename(spec.id, "alloc.other", str(moved))
    with pytest.raises(HostError, match="no such sandbox"):
        await runtime.wait(spec.id)
    later = place.runtime()  # an agent that was killed right then
    (found,) = await later.list()
    assert (found.id, found.pid, found.directory) == ("alloc.other", started.pid, str(moved))
    assert (await later.wait("alloc.other")).code == 3
    written = logs.last_lines(str(moved), 600).split()
    assert written == [str(number) for number in range(1, 601)], "all of it after the move, the log turned meanwhile"
    await later.delete("alloc.other")
    assert leftovers(place) == []
    assert not Path(spec.directory).is_symlink()


async def test_sandboxes_outlive_the_agent_and_are_reaped_when_unknown(place: Sandboxes) -> None:
    """A process of its own starts one and is killed; the next agent keeps what it knows and removes the rest."""
    kept, unknown = place.spec("sleep", "60"), place.spec("sleep", "60")
    program = (
        "import asyncio, os, signal, sys; from pathlib import Path; import msgspec\n"
        "from agent.sandbox.runtime import SandboxRuntime; from agent.sandbox.spec import SandboxSpec\n"
        "from outrider.log import Log\n"
        "async def main():\n"
        "    runtime = SandboxRuntime(run_directory=Path(sys.argv[1]), cgroup=sys.argv[2], log=Log('t'))\n"
        "    for text in sys.argv[3:]: await runtime.start(msgspec.json.decode(text, type=SandboxSpec))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    texts = [msgspec.json.encode(spec).decode() for spec in (kept, unknown)]
    argv = [sys.executable, "-c", program, str(place.directory / "run"), place.cgroup, *texts]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    runtime = place.runtime()
    assert await runtime.reap([kept.id]) == (unknown.id,)
    assert [(status.id, status.running) for status in await runtime.list()] == [(kept.id, True)]
    assert await runtime.reap([]) == (kept.id,)
    assert leftovers(place) == []


@pytest.mark.parametrize("step", ["record", "bundle", "conmon", "created"])
async def test_start_cut_short_at_any_step_is_reaped(
    runtime: SandboxRuntime, place: Sandboxes, tmp_path: Path, step: str
) -> None:
    spec = place.spec("sleep", "60", image=busybox(tmp_path))
    await runtime.start(spec)
    path = place.directory / "run" / "sandboxes" / f"{spec.id}.json"
    whole = RECORD.decode(path.read_bytes())
    # What the record says when an agent is killed after that step; the rest of the sandbox is there already, at worst.
    cut = msgspec.structs.replace(whole, pid=0)
    if step in ("record", "bundle"):
        cut = msgspec.structs.replace(cut, conmon_pid=0, conmon_started_ticks=0)
    if step == "record":
        os.kill(whole.conmon_pid, signal.SIGKILL)
    path.write_bytes(msgspec.json.encode(cut))
    again = place.runtime()
    assert await again.list() == ()
    assert await again.reap([spec.id]) == (spec.id,)
    assert leftovers(place) == []
    assert not process.is_running(whole.pid, whole.started_ticks)


async def test_host_that_refuses_is_told_from_the_job_at_fault(place: Sandboxes, runtime: SandboxRuntime) -> None:
    spec = msgspec.structs.replace(place.spec("true"), network_namespace=str(place.directory / "no-namespace"))
    with pytest.raises((StartError, HostError), match="no-namespace"):
        await runtime.start(spec)
    assert leftovers(place) == []


async def test_many_at_once(place: Sandboxes, runtime: SandboxRuntime) -> None:
    specs = [place.spec("sh", "-c", f"exit {number}") for number in range(8)]
    async with asyncio.TaskGroup() as group:
        for spec in specs:
            group.create_task(runtime.start(spec), name=f"start-{spec.id}")
    assert [(await runtime.wait(spec.id)).code for spec in specs] == list(range(8))


async def test_killed_monitor_ends_its_sandbox(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    record = RECORD.decode((place.directory / "run" / "sandboxes" / f"{spec.id}.json").read_bytes())
    os.kill(record.conmon_pid, signal.SIGKILL)
    assert (await runtime.wait(spec.id)).code == 137
    assert not process.is_running(record.pid, record.started_ticks)


async def test_wait_is_told_of_a_delete(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiting = group.create_task(runtime.wait(spec.id), name="wait")
        await asyncio.sleep(0)
        await runtime.delete(spec.id)
    assert waiting.result().code == 137
    with pytest.raises(HostError, match="no such sandbox"):
        await runtime.wait(spec.id)


async def test_exec_streams_and_tells_its_code(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    async with await runtime.exec(spec.id, ["sh", "-c", "cat; echo bad >&2; exit 3"]) as started:
        await started.write(b"given\n")
        started.close_stdin()
        output = {"stdout": b"", "stderr": b""}
        while (piece := await started.read()) is not None:
            output[piece[0]] += piece[1]
        assert output == {"stdout": b"given\n", "stderr": b"bad\n"}
        assert await started.wait() == 3
    with pytest.raises(StartError, match="'nothing' is not an executable"):
        await runtime.exec(spec.id, ["nothing"])


async def test_exec_left_open_is_killed(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    async with asyncio.timeout(5):
        async with await runtime.exec(spec.id, ["sh", "-c", "echo ready; exec sleep 61"]) as started:
            assert await started.read() == ("stdout", b"ready\n")
    async with await runtime.exec(spec.id, ["ps", "ax"]) as started:
        piece = await started.read()
        assert piece is not None
        assert b"sleep 61" not in piece[1]


async def test_exec_with_a_terminal_can_be_resized(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    script = "trap 'stty size; exit 0' WINCH; tty; while :; do sleep 0.02; done"
    async with asyncio.timeout(10):
        async with await runtime.exec(spec.id, ["sh", "-c", script], tty=True, rows=10, columns=20) as started:
            assert await started.read() == ("stdout", b"/dev/pts/0\r\n")
            started.resize(33, 99)
            assert await started.read() == ("stdout", b"33 99\r\n")
            assert await started.wait() == 0


async def test_usage_counts_cpu_and_memory(runtime: SandboxRuntime, place: Sandboxes) -> None:
    program = "import time; x = b'x' * (16 << 20); sum(range(10**6)); print(1, flush=True); time.sleep(60)"
    spec = place.spec("python3", "-c", program)
    await runtime.start(spec)
    await until(lambda: logs.last_lines(spec.directory, 1) == "1\n")
    usage = runtime.usage(spec.id)
    assert usage.cpu_s > 0.01
    assert 16 * MIB < usage.memory_bytes < 64 * MIB
    await runtime.delete(spec.id)
    assert runtime.usage(spec.id).memory_bytes == 0


async def test_flat_out_writer_stays_within_its_bound_and_loses_only_the_oldest(
    runtime: SandboxRuntime, place: Sandboxes
) -> None:
    bound = 8 * MIB
    spec = place.spec("sh", "-c", "seq 1 400000", log_bytes_max=bound)
    most = 0
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        turning = group.create_task(runtime.rotate_logs(), name="rotate")
        await runtime.start(spec)
        waiting = group.create_task(runtime.wait(spec.id), name="wait")
        while not waiting.done():
            most = max(most, on_disk(spec.directory))
            await asyncio.sleep(0.002)
        turning.cancel()
    assert bound // 8 < most <= bound
    text = b"".join([piece.data async for piece in logs.read(spec.directory)])
    numbers = [int(line) for line in text.split()]
    assert numbers == list(range(numbers[0], 400_001))
    assert logs.last_lines(spec.directory, 2) == "399999\n400000\n"


async def test_log_is_bounded_while_the_agent_is_away(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("seq", "1", "300000", log_bytes_max=MIB)  # nobody runs `rotate_logs`
    for _ in range(2):
        await runtime.start(spec)
        await runtime.wait(spec.id)
        assert on_disk(spec.directory) <= MIB


async def test_follower_sees_every_line_until_the_end(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.03; done", log_bytes_max=1200)
    await runtime.start(spec)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        turning = group.create_task(runtime.rotate_logs(), name="rotate")
        waiting = group.create_task(runtime.wait(spec.id), name="wait")
        seen = [piece.data async for piece in logs.read(spec.directory, following=lambda: not waiting.done())]
        turning.cancel()
    assert b"".join(seen) == b"1\n2\n3\n4\n5\n"


async def test_task_directory_is_the_workloads_alone_and_bounded(
    runtime: SandboxRuntime, place: Sandboxes, tmp_path: Path
) -> None:
    task = tmp_path / "task"
    files = (File(path="bin/app.sh", content=b"#!/bin/sh\necho from a file\n", mode=0o755),)
    task_directory.prepare(task, files=files, size_bytes=MIB, owner=place.uid_first + INNER_USER)
    try:
        mount = Mount(source=str(task), target="/task", read_only=False)
        script = (
            "/task/bin/app.sh; head -c 2M /dev/zero > /task/big 2>/dev/null || echo full; echo mine > /task/bin/app.sh"
        )
        spec = place.spec("sh", "-c", script, mounts=(mount,))
        await runtime.start(spec)
        assert (await runtime.wait(spec.id)).code in (0, 1)
        assert logs.last_lines(spec.directory, 2) == "from a file\nfull\n"
        task_directory.prepare(task, files=files, size_bytes=MIB, owner=place.uid_first + INNER_USER)
        assert (task / "big").exists()  # what a task left is there when it is restarted
        too_large = (File(path="x", content=bytes(2 * MIB)),)
        with pytest.raises(InputError, match="No space left"):
            task_directory.prepare(
                tmp_path / "other", files=too_large, size_bytes=MIB, owner=place.uid_first + INNER_USER
            )
    finally:
        task_directory.remove(task)
        task_directory.remove(tmp_path / "other")
    assert not task.exists()


async def test_start_takes_milliseconds(runtime: SandboxRuntime, place: Sandboxes) -> None:
    taken_s = []
    for _ in range(5):
        spec = place.spec("true")
        began_s = time.monotonic()
        await runtime.start(spec)
        taken_s.append(time.monotonic() - began_s)
        await runtime.delete(spec.id)
    assert min(taken_s) < 0.1  # some 12 ms on a machine at rest


@pytest.mark.skipif(detect() is not Version.V2, reason="this host's control groups are v1 or hybrid")
async def test_limits_hold_on_version_2(runtime: SandboxRuntime, place: Sandboxes) -> None:
    spec = place.spec("sleep", "60")
    await runtime.start(spec)
    group = Path("/sys/fs/cgroup", place.cgroup, spec.id)
    assert (group / "memory.max").read_text().strip() == str(spec.limits.memory_bytes)
    assert (group / "memory.swap.max").read_text().strip() == "0"
    assert (group / "pids.max").read_text().strip() == str(spec.limits.pids_max)


def on_disk(directory: str) -> int:
    where = Directory(directory)
    sizes = {}
    for path in (where.log, where.log_held, where.log_older):
        if path.exists():
            stat = path.stat()
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def busybox(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    (image / "bin").mkdir(parents=True)
    subprocess.run(["cp", "/bin/busybox", image / "bin" / "busybox"], check=True)
    (image / "bin" / "sleep").symlink_to("busybox")
    return image
