"""Snapshots of a real controller's state: saved, restored, carried to Consul and back; the archive without secrets."""

import asyncio
import tarfile
from pathlib import Path

import grpc.aio
import pytest

from outrider.v1 import operator_pb2, stores_pb2, stores_pb2_grpc
from tests.integration.consul import real_consul
from tests.integration.controllers import CALL_S, Controller
from tests.integration.fleet import outrider
from tests.integration.processes import free_port, until

pytestmark = pytest.mark.host

JOB = "job: {name}\ngroups:\n  g:\n    tasks:\n      t: {{driver: process, command: [/bin/sleep, '100']}}\n"
SECRET = "the-secret-value-nobody-may-see"


async def run(controller: Controller, *words: str) -> str:
    done = await asyncio.to_thread(outrider, "--address", f"unix:{controller.socket}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


async def jobs(controller: Controller) -> set[str]:
    async with controller.operator() as stub:
        found = await stub.ListJobs(operator_pb2.ListJobsRequest(), timeout=CALL_S)
    return {job.name for job in found.jobs}


async def submit(controller: Controller, name: str) -> None:
    path = controller.directory / f"{name}.yaml"
    path.write_text(JOB.format(name=name))
    await run(controller, "job", "run", "--detach", str(path))


async def again(controller: Controller, terms: int) -> None:
    await until(lambda: len(controller.events("ready")) >= terms, "the controller leads again")


async def test_a_snapshot_is_saved_and_restored_and_moves_a_fleet_to_consul(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    controller = Controller(tmp_path / "a")
    await controller.start()
    await submit(controller, "old")
    file = tmp_path / "fleet.snapshot"
    await run(controller, "operator", "snapshot", "save", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    await submit(controller, "new")
    said = await run(controller, "operator", "snapshot", "restore", "--yes", str(file))
    assert "1 jobs" in said
    await again(controller, 2)
    assert await jobs(controller) == {"old"}
    await controller.stop()
    with real_consul(tmp_path) as consul:
        moved = Controller(
            tmp_path / "a",
            listen=f"127.0.0.1:{free_port()}",
            join_listen=f"127.0.0.1:{free_port()}",
            consul={"url": consul.url},
            journal="consul",
        )
        await moved.start()
        assert await jobs(moved) == set()
        await run(moved, "operator", "snapshot", "restore", "--yes", str(file))
        await again(moved, 2)
        assert await jobs(moved) == {"old"}
        await run(moved, "operator", "snapshot", "save", str(tmp_path / "back.snapshot"))
        await moved.stop()
    await controller.start()
    await submit(controller, "newer")
    await run(controller, "operator", "snapshot", "restore", "--yes", str(tmp_path / "back.snapshot"))
    await again(controller, 2)
    assert await jobs(controller) == {"old"}
    await controller.stop()


async def test_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    controller = Controller(tmp_path)
    await controller.start()
    await submit(controller, "kept")
    bad = tmp_path / "bad.snapshot"
    bad.write_bytes(b"no snapshot at all")
    done = outrider("--address", f"unix:{controller.socket}", "operator", "snapshot", "restore", "--yes", str(bad))
    assert done.returncode == 64
    assert "no snapshot of a fleet" in done.stderr
    assert await jobs(controller) == {"kept"}
    await controller.stop()


async def test_the_archive_has_what_helps_and_no_secret(tmp_path: Path) -> None:
    controller = Controller(tmp_path)
    await controller.start()
    await submit(controller, "shown")
    async with grpc.aio.insecure_channel(f"unix:{controller.socket}") as connection:
        secret = stores_pb2.PutSecretRequest(name="password", value=SECRET.encode())
        await stores_pb2_grpc.StoreServiceStub(connection).PutSecret(secret, timeout=CALL_S)
    file = tmp_path / "debug.tar.gz"
    await run(controller, "operator", "debug", str(file))
    with tarfile.open(file) as archive:
        names = set(archive.getnames())
        content = b"".join(archive.extractfile(name).read() for name in names)  # type: ignore[union-attr]
    wanted = ("configuration.json", "fleet.json", "nodes.json", "jobs.json", "allocations.json", "metrics.txt")
    assert {f"outrider-debug/{name}" for name in wanted} <= names
    assert b"shown" in content
    assert b"outrider_controller_journal_commits" in content
    assert SECRET.encode() not in content
    assert b"PRIVATE KEY" not in content
    await controller.stop()
