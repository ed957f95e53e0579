"""Images as a node has them: from a registry with TLS and a password, pulled once, run, kept while needed."""

import asyncio
import json
import os
import signal
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web

from agent.sandbox.mounts import mount_tmpfs, resize_tmpfs, unmount
from outrider.ids import GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import AllocReport, AllocStatus, Assignment
from outrider.model.job import (
    MIB,
    Check,
    CheckKind,
    Group,
    Image,
    ImageKind,
    Network,
    Port,
    PullPolicy,
    Resources,
    RestartPolicy,
    Service,
    Task,
)
from tests.integration.agent_fleet import AgentFleet, agent_fleet, alloc_id, one_test
from tests.integration.network_lab import NODE, Lab, lab
from tests.integration.processes import until
from tests.integration.registry import Registry, digest_of, entry, layer, layout, shell_layer

pytestmark = [pytest.mark.host, pytest.mark.asyncio(loop_scope="module")]

CACHE_BYTES = 48 * MIB


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    """The network in which this thread then lives."""
    with lab() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def registry(place: Lab, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Registry]:  # noqa: ARG001
    """Each test has names of its own in it."""
    made = Registry(tmp_path_factory.mktemp("registry"))
    async with made.serving():
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node(registry: Registry) -> AsyncIterator[AgentFleet]:
    images = {
        "auth_file": str(registry.auth_file),
        "certificates": str(registry.certificates),
        "cache_bytes": CACHE_BYTES,
    }
    async with agent_fleet(images=images) as made:
        await made.start()
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(node: AgentFleet) -> AsyncIterator[AgentFleet]:
    async with one_test(node):
        yield node


def running(
    number: int,
    reference: str,
    *,
    kind: ImageKind = ImageKind.OCI,
    pull: PullPolicy = PullPolicy.IF_ABSENT,
    **changes: object,
) -> Assignment:
    fields = {"command": ("sh", "-c", "busybox sleep 1000"), "kill_timeout_s": 1.0, **changes}
    image = Image(kind=kind, reference=reference, pull=pull)
    task = Task(name=TaskName("app"), image=image, resources=Resources(disk_bytes=MIB), **fields)  # type: ignore[arg-type]
    group = Group(name=GroupName("web"), tasks=(task,), restart=RestartPolicy(attempts=0))
    job = JobName("job")
    return Assignment(alloc=alloc_id(number), job=job, job_version=1, group=group, index=0)


def script(number: int, reference: str, text: str, *, pull: PullPolicy = PullPolicy.IF_ABSENT) -> Assignment:
    """A batch job: it is over when its output is."""
    made = running(number, reference, pull=pull, command=("sh", "-c", text))
    return Assignment(alloc=made.alloc, job=made.job, job_version=1, group=made.group, index=0, batch=True)


def exposing(number: int, reference: str, *, static: int | None = None) -> Assignment:
    """Its service is where the image says; `static`: and published there."""
    made = running(number, reference, command=())
    port = Port(name=PortName("http"), static=static, from_image=True)
    service = Service(name=ServiceName("web"), port=port.name, check=Check(kind=CheckKind.HTTP, path="/index.html"))
    group = msgspec.structs.replace(made.group, network=Network(ports=(port,)), services=(service,))
    return msgspec.structs.replace(made, group=group, mesh_ports={service.name: 21_000 + number})


async def reached(fleet: AgentFleet, number: int, status: AllocStatus) -> AllocReport:
    alloc = alloc_id(number)
    await until(lambda: fleet.controller.status(alloc) is status, f"{alloc} is {status}: {fleet.controller.reports}")
    return fleet.controller.reports[alloc]


async def tried_again(fleet: AgentFleet, number: int) -> None:
    def waits() -> bool:
        report = fleet.controller.reports.get(alloc_id(number))
        return report is not None and "trying again in" in report.message

    await until(waits, "it waits to try again")


def app(tag: str = "") -> str:
    """What this test calls its image in the registry."""
    return f"test{alloc_id(0)}:{tag}".rstrip(":")


def own_layer(*more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A shell, in a layer that no other test has."""
    return shell_layer(entry(f"test{alloc_id(0)}"), *more)


def output(fleet: AgentFleet, number: int) -> list[str]:
    log = fleet.data / "allocations" / alloc_id(number) / "app" / "log"
    return [line.split(" ", 3)[3] for line in log.read_text().splitlines()]


def unpacked(fleet: AgentFleet) -> set[str]:
    return {path.name for path in (fleet.data / "roots").iterdir() if len(path.name) == 64}


def unfinished(fleet: AgentFleet) -> list[Path]:
    return list((fleet.data / "roots/unfinished").iterdir())


async def test_an_image_runs_as_it_says_and_as_the_job_says(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    text = "busybox id -u; busybox id -g; busybox pwd; echo $WHO $PATH; echo $0; busybox stat -c %u /srv/app/data"
    passwd = b"root:x:0:0::/:/bin/sh\napp:x:33:44::/srv:/bin/sh\n"
    data = entry("srv/app/data", b"x", uid=33, gid=44)
    made = layout(
        tmp_path / "a",
        own_layer(entry("etc/passwd", passwd), data),
        User="app",
        Env=["WHO=image", "PATH=/bin"],
        Entrypoint=["sh", "-c", text],
        Cmd=["by-image"],
        WorkingDir="/srv/app",
        packed="zstd",
    )
    reference = await registry.push(made, app("1"))
    fleet.controller.assign(running(1, reference, command=()), full=True)
    await reached(fleet, 1, AllocStatus.FAILED)  # no service ends by itself
    assert output(fleet, 1) == ["33", "44", "/srv/app", "image /bin", "by-image", "33"]
    history = [report for report in fleet.controller.history if report.alloc == alloc_id(1)]
    assert any(report.pulling and report.message == f"pulling oci:{reference}" for report in history)
    fetched = registry.fetched(app())
    assert fetched == 2  # its configuration and its layer
    changed = running(2, reference, command=(), args=("by-job",), env={"WHO": "job"}, user=55, workdir="/")
    fleet.controller.assign(changed)
    await reached(fleet, 2, AllocStatus.FAILED)
    assert output(fleet, 2) == ["55", "55", "/", "job /bin", "by-job", "33"]
    assert registry.fetched(app()) == fetched
    assert not any(report.pulling for report in fleet.controller.history if report.alloc == alloc_id(2))


async def test_the_port_that_the_image_exposes_serves(
    fleet: AgentFleet, registry: Registry, place: Lab, tmp_path: Path
) -> None:
    serve = ["sh", "-c", "echo $PORT_HTTP >/tmp/index.html; exec busybox httpd -f -p 8090 -h /tmp"]
    ports = {"8090/tcp": {}, "53/udp": {}}
    made = layout(tmp_path / "a", own_layer(), Entrypoint=serve, ExposedPorts=ports)
    reference = await registry.push(made, app("1"))
    fleet.controller.mesh()
    fleet.controller.assign(exposing(1, reference, static=18_090), full=True)
    await until(lambda: fleet.controller.passing(alloc_id(1)), "its check passes at the image's port")
    assert place.run(f"{' '.join(place.other_host)} busybox wget -q -O - http://{NODE}:18090/index.html") == "8090\n"
    # What it was told stays with it: over another agent, and over its assignment coming once more.
    assert fleet.kill() == -signal.SIGKILL
    await fleet.start()
    fleet.controller.mesh()
    fleet.controller.assign(exposing(1, reference, static=18_090), full=True)
    await until(lambda: fleet.controller.passing(alloc_id(1)), "its check passes again")
    assert place.run(f"{' '.join(place.other_host)} busybox wget -q -O - http://{NODE}:18090/index.html") == "8090\n"


async def test_a_port_that_the_image_does_not_say_is_asked_for(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    several = layout(tmp_path / "a", own_layer(), ExposedPorts={"80/tcp": {}, "443/tcp": {}})
    none = layout(tmp_path / "b", own_layer(entry("b")), ExposedPorts={"53/udp": {}})
    expected = {
        await registry.push(several, "several:1"): "more than one (task app 80, 443): write which, `to: 80`",
        await registry.push(none, "none:1"): "its image exposes none over TCP: write `to: NUMBER`",
        f"{registry.host}/nowhere:1": "no such image there",
    }
    fleet.controller.assign(*(exposing(number, name) for number, name in enumerate(expected, 1)), full=True)
    for number, words in enumerate(expected.values(), 1):
        assert words in (await reached(fleet, number, AllocStatus.FAILED)).message


async def test_twenty_at_once_pull_once(fleet: AgentFleet, registry: Registry, tmp_path: Path) -> None:
    reference = await registry.push(layout(tmp_path / "a", own_layer()), app("1"))
    before = unpacked(fleet)
    fleet.controller.assign(*(running(number, reference) for number in range(1, 21)), full=True)
    for number in range(1, 21):
        await reached(fleet, number, AllocStatus.RUNNING)
    assert registry.fetched(app()) == 2
    assert unpacked(fleet) - before == {digest_of(tmp_path / "a").removeprefix("sha256:")}
    assert unfinished(fleet) == []


@pytest.mark.parametrize("step", ["pull", "unpack"])
async def test_an_agent_killed_while_it_pulls_or_unpacks_leaves_nothing_half_done(
    fleet: AgentFleet, registry: Registry, tmp_path: Path, step: str
) -> None:
    # Either takes long enough to be met: what cannot be packed, and many files.
    large, many = entry("filler", os.urandom(8 * MIB)), (entry(f"many/{number}") for number in range(3_000))
    filler = (large,) if step == "pull" else tuple(many)
    before = unpacked(fleet)
    reference = await registry.push(layout(tmp_path / "a", own_layer(*filler)), app("1"))
    fleet.controller.assign(running(1, reference), full=True)
    begun = {
        "pull": lambda: any("skopeo" in line for line in fleet.processes()),
        "unpack": lambda: bool(list((fleet.data / "roots/unfinished").glob("*/root/bin"))),
    }
    await until(begun[step], f"the {step} has begun")
    fleet.kill()
    assert unpacked(fleet) == before
    assert unfinished(fleet) != []
    pulling = ("skopeo", "agent.pull.layers")
    await until(lambda: not [line for line in fleet.processes() if any(map(line.count, pulling))], "they end too")
    await fleet.start()
    fleet.controller.assign(running(1, reference), full=True)  # as a controller does: its record may not be on disk yet
    await reached(fleet, 1, AllocStatus.RUNNING)
    await until(lambda: unfinished(fleet) == [], "nothing is left over")
    fetched = registry.fetched(app())
    fleet.kill()
    await fleet.start()
    await reached(fleet, 1, AllocStatus.RUNNING)
    assert len(fleet.workload_pids("sleep 1000")) > 0
    assert registry.fetched(app()) == fetched


async def test_what_cannot_run_is_refused_by_name(fleet: AgentFleet, registry: Registry, tmp_path: Path) -> None:
    made = layout(tmp_path / "a", own_layer())
    await registry.push(made, app("1"))
    await registry.push(layout(tmp_path / "other", own_layer(), architecture="s390x"), app("other"))
    await registry.push(layout(tmp_path / "who", own_layer(), User="nobody-here"), app("who"))
    expected = {
        f"{registry.host}/{app('2')}": "no such image there",
        f"{registry.host}/{app()}@sha256:{'0' * 64}": "no such image there",
        f"{registry.host}/{app('other')}": "built for linux/s390x, this node is linux/",
        f"{registry.host}/{app('who')}": "its user 'nobody-here' is neither in its /etc/passwd",
        f"127.0.0.1:1{registry.port % 10}/app:1": "the registry does not answer as it should",
    }
    before = unpacked(fleet)
    for number, reference in enumerate(expected, 1):
        fleet.controller.assign(running(number, reference))
    for number, (reference, words) in enumerate(list(expected.items())[:-1], 1):
        report = await reached(fleet, number, AllocStatus.FAILED)
        assert report.message.startswith(f"image oci:{reference}: ")
        assert words in report.message
    away = alloc_id(len(expected))
    await tried_again(fleet, len(expected))
    assert list(expected.values())[-1] in fleet.controller.reports[away].message
    assert fleet.controller.status(away) is AllocStatus.STARTING
    assert unpacked(fleet) == before


async def test_a_pinned_image_is_the_one_that_was_pinned(fleet: AgentFleet, registry: Registry, tmp_path: Path) -> None:
    before = unpacked(fleet)
    first = await registry.push(layout(tmp_path / "a", own_layer()), app("1"))
    pinned = f"{first}@{digest_of(tmp_path / 'a')}"
    await registry.push(layout(tmp_path / "b", own_layer(entry("newer"))), app("1"))
    fleet.controller.assign(
        script(1, pinned, "busybox ls /newer 2>/dev/null || echo older"), script(2, first, "busybox ls /newer")
    )
    await reached(fleet, 1, AllocStatus.COMPLETE)
    await reached(fleet, 2, AllocStatus.COMPLETE)
    assert (output(fleet, 1)[-1], output(fleet, 2)) == ("older", ["/newer"])
    altered = layout(tmp_path / "c", own_layer(entry("altered")))
    reference = await registry.push(altered, "altered:1")
    manifest = json.loads((altered / "blobs/sha256" / digest_of(altered).removeprefix("sha256:")).read_bytes())
    name = manifest["layers"][0]["digest"].removeprefix("sha256:")
    (stored,) = registry.directory.glob(f"storage/docker/registry/v2/blobs/sha256/*/{name}/data")
    stored.write_bytes(bytes([stored.read_bytes()[0] ^ 1]) + stored.read_bytes()[1:])
    fleet.controller.assign(running(3, reference))
    report = await reached(fleet, 3, AllocStatus.FAILED)
    assert "the content is not what its digest promises" in report.message
    assert len(unpacked(fleet) - before) == 2


async def test_a_tag_that_moved_is_asked_for_again_only_where_the_job_says_so(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    reference = await registry.push(layout(tmp_path / "a", own_layer()), app("1"))
    fleet.controller.assign(running(1, reference), full=True)
    await reached(fleet, 1, AllocStatus.RUNNING)
    await registry.push(layout(tmp_path / "b", own_layer(entry("newer"))), app("1"))
    look = "busybox test -e /newer && echo newer || echo older"
    fleet.controller.assign(script(2, reference, look), script(3, reference, look, pull=PullPolicy.ALWAYS))
    await reached(fleet, 2, AllocStatus.COMPLETE)
    await reached(fleet, 3, AllocStatus.COMPLETE)
    assert (output(fleet, 2), output(fleet, 3)) == (["older"], ["newer"])
    fleet.controller.assign(running(4, f"{registry.host}/other:1", pull=PullPolicy.NEVER))
    report = await reached(fleet, 4, AllocStatus.FAILED)
    assert "it is not on this node, and the job says `pull: never`" in report.message


async def test_layouts_and_archives_on_the_node_need_no_registry(fleet: AgentFleet, tmp_path: Path) -> None:
    made, archive = layout(tmp_path / "made", own_layer(), Cmd=["sh", "-c", "echo hello"]), tmp_path / "made.tar"
    done = await asyncio.create_subprocess_exec(
        "skopeo", "copy", "-q", f"oci:{made}:image", f"docker-archive:{archive}"
    )
    assert await done.wait() == 0
    of_layout = running(1, f"{made}:image", kind=ImageKind.OCI_LAYOUT, command=())
    of_archive = running(2, str(archive), kind=ImageKind.DOCKER_ARCHIVE, command=())
    fleet.controller.assign(of_layout, of_archive, full=True)
    for number in (1, 2):
        await reached(fleet, number, AllocStatus.FAILED)  # no service ends by itself
        assert output(fleet, number) == ["hello"]


async def test_a_registry_that_has_had_enough_is_left_alone_for_longer(fleet: AgentFleet, registry: Registry) -> None:
    asked = 0

    async def refuse(_request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=429, headers={"retry-after": "0"})  # else skopeo is patient for a minute

    async with registry.odd(refuse) as host:
        fleet.controller.assign(running(1, f"{host}/app:1"))
        await tried_again(fleet, 1)
    report = fleet.controller.reports[alloc_id(1)]
    assert "the registry has had enough of requests for now" in report.message
    assert report.status is AllocStatus.STARTING
    assert asked > 0


async def test_a_registry_that_drops_the_connection_half_way_is_asked_again(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    made = layout(tmp_path / "a", own_layer(entry("filler", os.urandom(4 * MIB))))
    blobs, digest, mended = made / "blobs/sha256", digest_of(made), False

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        if "/manifests/" in path:
            headers = {"content-type": "application/vnd.oci.image.manifest.v1+json", "docker-content-digest": digest}
            return web.Response(body=(blobs / digest.removeprefix("sha256:")).read_bytes(), headers=headers)
        if "/blobs/" not in path:
            return web.Response()
        content = (blobs / path.rpartition(":")[2]).read_bytes()
        if mended or len(content) < MIB:
            return web.Response(body=content)
        response = web.StreamResponse(headers={"content-length": str(len(content))})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response

    before = unpacked(fleet)
    async with registry.odd(answer) as host:
        fleet.controller.assign(running(1, f"{host}/app:1"))
        await tried_again(fleet, 1)
        report = fleet.controller.reports[alloc_id(1)]
        assert "the registry does not answer as it should" in report.message
        assert (report.status, unpacked(fleet), unfinished(fleet)) == (AllocStatus.STARTING, before, [])
        mended = True
        await reached(fleet, 1, AllocStatus.RUNNING)


async def test_layers_that_reach_out_stay_inside(fleet: AgentFleet, registry: Registry, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("of the host")
    evil = layer(
        entry("../../../../../../../../../.." + str(outside / "up"), b"x"),
        entry("link", type=tarfile.SYMTYPE, linkname=str(outside)),
        entry("link/through", b"x"),
        entry("hard", type=tarfile.LNKTYPE, linkname="../../../../../../../../.." + str(outside / "secret")),
    )
    devices = layer(
        entry("disk", type=tarfile.BLKTYPE, devmajor=254, devminor=0, mode=0o666),
        entry("etc/passwd", type=tarfile.SYMTYPE, linkname="/../../../../../../../../../etc/passwd"),
        entry("here", type=tarfile.SYMTYPE, linkname=str(outside)),
    )
    await registry.push(layout(tmp_path / "evil", own_layer(), evil), "evil:1")
    reference = await registry.push(layout(tmp_path / "devices", own_layer(), devices, User="daemon"), "d:1")
    text = "busybox ls /here; busybox head -c1 /disk && echo read; true"
    fleet.controller.assign(running(1, f"{registry.host}/evil:1"), script(2, reference, text), full=True)
    report = await reached(fleet, 2, AllocStatus.FAILED)
    assert "its user 'daemon' is neither in its /etc/passwd" in report.message  # the host has one
    report = await reached(fleet, 1, AllocStatus.FAILED)
    assert "it cannot be unpacked" in report.message
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1
    await registry.push(layout(tmp_path / "plain", own_layer(), devices), "d:2")
    fleet.controller.assign(script(3, f"{registry.host}/d:2", text))
    await reached(fleet, 3, AllocStatus.COMPLETE)
    assert "read" not in output(fleet, 3)


async def test_a_disk_that_fills_up_while_it_unpacks_is_waited_for(registry: Registry, tmp_path: Path) -> None:
    images = {"auth_file": str(registry.auth_file), "certificates": str(registry.certificates)}
    small = await registry.push(layout(tmp_path / "small", own_layer()), "small:1")
    large = layout(tmp_path / "large", own_layer(entry("filler", bytes(20 * MIB))))  # packed it is small
    reference = await registry.push(large, "large:1")
    async with agent_fleet(images=images) as fleet:
        roots = fleet.data / "roots"
        roots.mkdir(parents=True)
        mount_tmpfs(roots, size_bytes=8 * MIB, uid=0, mode=0o700)
        try:
            await fleet.start()
            fleet.controller.assign(running(1, small), full=True)
            await reached(fleet, 1, AllocStatus.RUNNING)
            before = unpacked(fleet)
            fleet.controller.assign(running(2, reference))
            await tried_again(fleet, 2)
            report = fleet.controller.reports[alloc_id(2)]
            assert "the node's disk is full (layer 1, " in report.message
            assert "/filler: No space left on device" in report.message
            assert report.status is AllocStatus.STARTING
            assert (unpacked(fleet), fleet.controller.status(alloc_id(1))) == (before, AllocStatus.RUNNING)
            resize_tmpfs(roots, size_bytes=128 * MIB)
            await reached(fleet, 2, AllocStatus.RUNNING)
            await until(lambda: unfinished(fleet) == [], "nothing is left over")
        finally:
            unmount(roots)


async def test_what_was_used_least_goes_and_what_runs_stays(
    fleet: AgentFleet, registry: Registry, tmp_path: Path
) -> None:
    names, digests = ("one", "two", "three"), {}
    for name in names:
        made = layout(tmp_path / name, own_layer(entry(name, bytes([len(name)]) * 14 * MIB)))
        await registry.push(made, f"{name}:1")
        digests[name] = digest_of(made).removeprefix("sha256:")
    fleet.controller.assign(running(1, f"{registry.host}/one:1"), full=True)
    await reached(fleet, 1, AllocStatus.RUNNING)
    for number, name in ((2, "two"), (3, "three")):
        fleet.controller.assign(script(number, f"{registry.host}/{name}:1", f"busybox ls {name}"))
        await reached(fleet, number, AllocStatus.COMPLETE)
    await registry.push(layout(tmp_path / "four", own_layer(entry("f", b"4" * 14 * MIB))), "four:1")
    fleet.controller.assign(script(4, f"{registry.host}/four:1", "echo"))
    await reached(fleet, 4, AllocStatus.COMPLETE)
    assert digests["two"] not in unpacked(fleet)
    assert {digests["one"], digests["three"]} <= unpacked(fleet)
    huge = layout(tmp_path / "huge", own_layer(entry("h", bytes(CACHE_BYTES))))
    fleet.controller.assign(running(5, f"{huge}:image", kind=ImageKind.OCI_LAYOUT))
    report = await reached(fleet, 5, AllocStatus.FAILED)
    assert "it is larger than the 48 MiB that this node has for images" in report.message
    assert len(fleet.workload_pids("sleep 1000")) > 0
