"""Artifacts as a node has them: fetched, checked, gone on with after a break, shown to whoever names them."""

import asyncio
import hashlib
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from outrider.ids import GroupName, JobName, TaskName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment
from outrider.model.belongings import Artifact
from outrider.model.job import MIB, Group, RestartPolicy, Task
from tests.integration.agent_fleet import AgentFleet, agent_fleet, alloc_id, one_test
from tests.integration.network_lab import lab
from tests.integration.processes import free_port, until
from tests.integration.registry import Registry, layout

pytestmark = [pytest.mark.host, pytest.mark.asyncio(loop_scope="module")]

CACHE_BYTES = 32 * MIB
LARGE_BYTES = 6 * MIB


def archive(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server:
    """What it serves, and how badly."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.break_off_at = 0  # once
        self.refuse = 0  # so many times, with 429
        self.hold = asyncio.Event()
        self.hold.set()
        self.port = free_port()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.refuse:
            self.refuse -= 1
            return web.Response(status=429)
        data = self.content.get(request.match_info["name"])
        if data is None:
            return web.Response(status=404)
        self.ranges.append(request.headers.get("Range", ""))
        first = int(self.ranges[-1].removeprefix("bytes=").removesuffix("-") or 0)
        response = web.StreamResponse(status=206 if first else 200)
        response.content_length = len(data) - first
        await response.prepare(request)
        end = len(data)
        if self.break_off_at:
            end, self.break_off_at = self.break_off_at, 0
        await response.write(data[first:end])
        await self.hold.wait()
        if end < len(data):
            assert request.transport is not None
            request.transport.close()
        return response

    def serve(self, name: str, content: bytes) -> Artifact:
        self.content[name] = content
        return Artifact(
            path=name, source=f"http://127.0.0.1:{self.port}/{name}", sha256=hashlib.sha256(content).hexdigest()
        )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def registry(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Registry]:
    """In a network of its own, where this thread then lives."""
    with lab():
        made = Registry(tmp_path_factory.mktemp("registry"))
        async with made.serving():
            yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node(registry: Registry) -> AsyncIterator[AgentFleet]:
    images = {"auth_file": str(registry.auth_file), "certificates": str(registry.certificates)}
    async with agent_fleet(images=images, artifact_cache_bytes=CACHE_BYTES) as made:
        await made.start()
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def server(node: AgentFleet) -> AsyncIterator[Server]:  # noqa: ARG001 - where this thread lives
    made = Server()
    app = web.Application()
    app.router.add_get("/{name}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", made.port).start()
    yield made
    made.hold.set()
    await runner.cleanup()


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(node: AgentFleet, server: Server) -> AsyncIterator[AgentFleet]:  # noqa: ARG001 - it ends later
    async with one_test(node):
        yield node


def assignment(number: int, *artifacts: Artifact, script: str = "sleep 1000") -> Assignment:
    task = Task(name=TaskName("app"), command=("sh", "-c", script), artifacts=artifacts, kill_timeout_s=0.1)
    group = Group(name=GroupName("web"), tasks=(task,), restart=RestartPolicy(attempts=0))
    return Assignment(
        alloc=alloc_id(number), job=JobName("job"), job_version=1, group=group, index=0, batch=script != "sleep 1000"
    )


async def reached(fleet: AgentFleet, number: int, status: AllocStatus) -> AllocReport:
    alloc = alloc_id(number)
    await until(lambda: fleet.controller.status(alloc) is status, f"{status}: {fleet.controller.reports}")
    return fleet.controller.reports[alloc]


def output(fleet: AgentFleet, number: int) -> list[str]:
    log = fleet.data / "allocations" / alloc_id(number) / "app" / "log"
    return [line.split(" ", 3)[3] for line in log.read_text().splitlines()]


def kept(fleet: AgentFleet) -> set[str]:
    return {path.name for path in (fleet.data / "artifacts").iterdir() if len(path.name) == 64}


async def test_files_and_trees_are_there_read_only_and_fetched_once(fleet: AgentFleet, server: Server) -> None:
    tool = server.serve("tool", b"#!/bin/sh\necho tool\n")
    tree = server.serve("tree.tar.gz", archive(("bin/run", b"#!/bin/sh\necho run\n"), ("data", b"d")))
    wanted = (
        Artifact(path="tool", source=tool.source, sha256=tool.sha256, mode=0o755),
        Artifact(path="deep/tree", source=tree.source, sha256=tree.sha256, unpack=True),
    )
    script = "/artifacts/tool; /artifacts/deep/tree/bin/run; touch /artifacts/deep/tree/x 2>/dev/null || echo read-only"
    fleet.controller.assign(assignment(1, *wanted, script=script))
    await reached(fleet, 1, AllocStatus.COMPLETE)
    assert output(fleet, 1) == ["tool", "run", "read-only"]
    asked = len(server.ranges)
    fleet.controller.assign(assignment(2, *wanted, script="cat /artifacts/deep/tree/data"))
    await reached(fleet, 2, AllocStatus.COMPLETE)
    assert output(fleet, 2) == ["d"]
    assert len(server.ranges) == asked


async def test_a_download_goes_on_where_it_broke_off(fleet: AgentFleet, server: Server) -> None:
    large = server.serve("large", os.urandom(LARGE_BYTES))
    server.break_off_at = 2 * MIB
    fleet.controller.assign(assignment(1, large))
    await reached(fleet, 1, AllocStatus.RUNNING)
    assert server.ranges[0] == ""
    assert [each for each in server.ranges[1:] if each] == [f"bytes={2 * MIB}-"]


async def test_and_after_the_agent_was_killed_meanwhile(fleet: AgentFleet, server: Server) -> None:
    large = server.serve("large", os.urandom(LARGE_BYTES))
    server.break_off_at = 3 * MIB
    server.hold.clear()
    fleet.controller.assign(assignment(1, large))
    partial = fleet.data / "partial" / large.sha256
    await until(lambda: partial.exists() and partial.stat().st_size >= 2 * MIB, "some of it")
    fleet.kill(signal.SIGKILL)
    server.hold.set()
    await fleet.start()
    await reached(fleet, 1, AllocStatus.RUNNING)
    assert server.ranges[-1].startswith("bytes=")
    assert not partial.exists()


async def test_a_server_that_has_had_enough_is_asked_again(fleet: AgentFleet, server: Server) -> None:
    tool = server.serve("tool", b"x")
    server.refuse = 1
    fleet.controller.assign(assignment(1, tool))
    await until(
        lambda: any("answers 429" in report.message for report in fleet.controller.history), "it says what it waits for"
    )
    report = await reached(fleet, 1, AllocStatus.RUNNING)
    assert report.tasks[0].restarts == 0


@pytest.mark.parametrize(
    ("content", "unpack", "told"),
    [
        (b"another", False, "not what the job says: do not use it"),
        (None, False, "the server answers 404"),
        (b"no archive", True, "it is no archive that can be read"),
        (archive(("../out", b"x")), True, "'../out' leads out of the archive"),
        (archive(("bomb", bytes(CACHE_BYTES + 1))), True, "unpacked it is larger than"),
        (bytes(CACHE_BYTES + 1), False, "larger than"),
    ],
)
async def test_what_cannot_be_used_fails_with_the_culprit_and_leaves_nothing(
    fleet: AgentFleet, server: Server, content: bytes | None, told: str, *, unpack: bool
) -> None:
    before = kept(fleet)
    served = server.serve("thing", content or b"")
    if content is None:
        del server.content["thing"]
    sha256 = hashlib.sha256(b"wanted").hexdigest() if content == b"another" else served.sha256
    fleet.controller.assign(assignment(1, Artifact(path="thing", source=served.source, sha256=sha256, unpack=unpack)))
    report = await reached(fleet, 1, AllocStatus.FAILED)
    assert report.message.startswith(f"artifact thing, {served.source}: ")
    assert told in report.message
    assert kept(fleet) == before
    assert list((fleet.data / "artifacts" / "unfinished").iterdir()) == []


async def test_one_blob_in_a_registry_and_a_file_of_the_node(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    made = layout(tmp_path / "made", archive(("f", b"x")))
    reference = await registry.push(made, "things/tool:1")
    blobs = made / "blobs/sha256"
    (blob,) = (path for path in blobs.iterdir() if path.read_bytes()[:2] == b"\x1f\x8b")
    path = tmp_path / "file"
    path.write_bytes(b"of the node")
    wanted = (
        Artifact(path="blob", source=f"oci:{reference}", sha256=blob.name),
        Artifact(path="file", source=f"file:{path}", sha256=hashlib.sha256(b"of the node").hexdigest()),
    )
    fleet.controller.assign(assignment(1, *wanted, script="sha256sum < /artifacts/blob; cat /artifacts/file"))
    await reached(fleet, 1, AllocStatus.COMPLETE)
    assert output(fleet, 1) == [f"{blob.name}  -", "of the node"]
