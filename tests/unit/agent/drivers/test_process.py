"""A process task becomes a sandbox: names filled in, limits and places carried over, the rest refused by name."""

import msgspec
import pytest

from agent.drivers import process
from agent.drivers.process import Place, sandbox_spec
from agent.drivers.task_directory import safe_path
from agent.pull.image import UnpackedImage
from agent.sandbox.spec import DirectoryRoot, HostRoot, ImageRoot, Mount, StartError
from outrider.errors import InputError
from outrider.ids import AllocId, GroupName, JobName, NodeId, PortName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import MIB, Group, Image, ImageKind, Network, Port, Resources, Task

TASK = Task(
    name=TaskName("server"),
    command=("python3", "${task.dir}/app.py", "--port=${port.http}", "$${HOME}"),
    env={"WHO": "${job}/${group}/${task}[${alloc.index}]@${node.id}:${alloc.id}"},
    resources=Resources(cpu_millis=200, memory_bytes=32 * MIB, cpu_max_millis=500, disk_bytes=8 * MIB, pids_max=9),
)
PLACE = Place(
    node=NodeId("node-1"),
    uid_first=1 << 26,
    network_namespace="/run/o/net/a",
    directory="/data/a/server",
    task_directory="/data/a/server.task",
    resolv_conf="/run/o/resolv.conf",
)


def assignment(task: Task = TASK) -> Assignment:
    network = Network(ports=(Port(name=PortName("http")), Port(name=PortName("my-admin"), to=9000)))
    group = Group(name=GroupName("web"), tasks=(task,), network=network)
    return Assignment(alloc=AllocId("00ff00ff00"), job=JobName("shop"), job_version=1, group=group, index=2)


def changed(**values: object) -> Task:
    return msgspec.structs.replace(TASK, **values)


def test_names_are_filled_in() -> None:
    spec = sandbox_spec(assignment(), TASK, PLACE)
    assert spec.id == "00ff00ff00.server"
    assert spec.argv == ("python3", "/task/app.py", "--port=8080", "${HOME}")
    assert spec.env["WHO"] == "shop/web/server[2]@node-1:00ff00ff00"


def test_arguments_are_taken_as_they_are() -> None:
    task = changed(command=("get", "${param.url}?w=${param.width}"), env={})
    given = msgspec.structs.replace(assignment(task), arguments={"url": "${job}}$", "width": ""})
    spec = sandbox_spec(given, task, PLACE)
    assert spec.argv == ("get", "${job}}$?w=")
    assert (spec.env["OUTRIDER_PARAM_URL"], spec.env["OUTRIDER_PARAM_WIDTH"]) == ("${job}}$", "")


def test_environment_tells_who_and_where() -> None:
    env = sandbox_spec(assignment(), TASK, PLACE).env
    assert {name: value for name, value in env.items() if name.startswith(("OUTRIDER_", "PORT_"))} == {
        "OUTRIDER_ALLOC_ID": "00ff00ff00",
        "OUTRIDER_ALLOC_INDEX": "2",
        "OUTRIDER_JOB": "shop",
        "OUTRIDER_GROUP": "web",
        "OUTRIDER_TASK": "server",
        "OUTRIDER_NODE": "node-1",
        "PORT_HTTP": "8080",
        "PORT_MY_ADMIN": "9000",
    }
    assert env["HOME"] == "/task"
    assert "/usr/bin" in env["PATH"].split(":")
    task = changed(env={"PATH": "/opt/bin"})
    assert sandbox_spec(assignment(task), task, PLACE).env["PATH"] == "/opt/bin"


def test_limits_and_places_are_carried_over() -> None:
    spec = sandbox_spec(assignment(), TASK, PLACE)
    limits = spec.limits
    assert (limits.cpu_millis, limits.cpu_max_millis, limits.memory_bytes, limits.pids_max) == (200, 500, 32 * MIB, 9)
    assert spec.mounts == (
        Mount(source="/data/a/server.task", target="/task", read_only=False),
        Mount(source="/run/o/resolv.conf", target="/etc/resolv.conf"),
    )
    assert [(tmpfs.target, tmpfs.size_bytes) for tmpfs in spec.tmpfs] == [("/tmp", 8 * MIB)]  # noqa: S108 - inside
    assert (spec.hostname, spec.uid_first, spec.user, spec.cwd) == ("web-2", 1 << 26, 1000, "/task")


@pytest.mark.parametrize("where", ["command", "env"])
def test_unknown_name_is_told(where: str) -> None:
    task = changed(command=("x", "${port.htp}")) if where == "command" else changed(env={"A": "${port.htp}"})
    with pytest.raises(InputError, match=r"job shop, task server, .*\$\{port\.htp\} is unknown; .* port\.http"):
        sandbox_spec(assignment(task), task, PLACE)


def test_no_command_is_told() -> None:
    with pytest.raises(InputError, match="task server: no command"):
        sandbox_spec(assignment(changed(command=())), changed(command=()), PLACE)


def test_images() -> None:
    assert sandbox_spec(assignment(), TASK, PLACE).root == HostRoot()
    task = changed(image=Image(kind=ImageKind.DIR, reference="/images/x"))
    assert sandbox_spec(assignment(task), task, PLACE).root == DirectoryRoot(path="/images/x")
    task = changed(image=Image(kind=ImageKind.DISK, reference="/images/x.qcow2"))
    with pytest.raises(StartError, match="say `driver: vm`"):
        sandbox_spec(assignment(task), task, PLACE)


UNPACKED = UnpackedImage(
    digest="sha256:aa",
    root="/data/roots/aa/root",
    entrypoint=("/bin/redis", "${literally}"),
    command=("--port", "1"),
    env={"PATH": "/opt/bin", "WHO": "image", "VERSION": "7"},
    workdir="/data",
    user=999,
    group=998,
)


def test_an_image_says_how_it_runs_and_the_job_has_the_last_word() -> None:
    image = Image(kind=ImageKind.OCI, reference="registry.test/redis:7")
    plain = changed(image=image, command=())
    spec = sandbox_spec(assignment(plain), plain, PLACE, UNPACKED)
    assert spec.root == ImageRoot(path=UNPACKED.root, writable_bytes=8 * MIB)
    assert spec.argv == ("/bin/redis", "${literally}", "--port", "1")
    assert (spec.user, spec.group, spec.cwd) == (999, 998, "/data")
    assert (spec.env["PATH"], spec.env["VERSION"]) == ("/opt/bin", "7")
    assert spec.env["WHO"].startswith("shop/")
    other = changed(image=image, command=(), args=("--port", "${port.http}"), user=5, workdir="/task")
    spec = sandbox_spec(assignment(other), other, PLACE, UNPACKED)
    assert spec.argv == ("/bin/redis", "${literally}", "--port", "8080")
    assert (spec.user, spec.group, spec.cwd) == (5, 5, "/task")
    whole = changed(image=image, command=("sh",))
    assert sandbox_spec(assignment(whole), whole, PLACE, UNPACKED).argv == ("sh",)


def test_interpolation_is_done_once() -> None:
    assert process.interpolate("${a}", {"a": "${b}"}, "x") == "${b}"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", ".", "a\0b"])
def test_files_stay_inside(path: str) -> None:
    with pytest.raises(InputError, match="no path inside"):
        safe_path(path)
