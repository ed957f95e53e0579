"""What a process with a kernel of its own is told, and what it says at its end."""

from collections.abc import Mapping

import pytest

from agent.drivers.microvm import ended, given
from agent.sandbox.spec import HostRoot, Limits, SandboxSpec
from outrider.errors import InputError
from outrider.ids import TaskName
from outrider.model.belongings import Artifact, VolumeUse
from outrider.model.job import MIB, File, Task

INSIDE = SandboxSpec(
    id="a1.web",
    argv=("serve", "it's $HOME"),
    root=HostRoot(),
    network_namespace="/run/ns",
    uid_first=65_536,
    limits=Limits(cpu_millis=100, memory_bytes=128 * MIB, pids_max=64),
    directory="/d/box",
    env={"GREETING": "hello; reboot"},
    cwd="/srv/my app",
    user=33,
    group=34,
    hostname="web-0",
)


def told(task: Task, belongings: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    return {entry.path: entry.content for entry in given(task, INSIDE, belongings or {})}


def test_words_reach_the_workload_as_they_are() -> None:
    files = told(Task(name=TaskName("web")))
    assert files["given/run"] == b"exec /given/inside serve 'it'\"'\"'s $HOME'\n"
    script = files["given/inside"].decode()
    assert "'GREETING=hello; reboot'" in script
    assert "-c 33:34" in script
    assert "/srv/my app" in script
    assert b"OWNER=33:34\n" in files["given/settings"]


def test_the_power_button_is_the_jobs_signal() -> None:
    files = told(Task(name=TaskName("web"), kill_signal="SIGQUIT"))
    assert b"kill -3 " in files["etc/acpi/PWRF/00000080"]


def test_volumes_are_found_by_the_first_of_their_names_letters() -> None:
    use = VolumeUse(volume="a-very-long-name-of-a-volume", target="/data", read_only=True)
    assert told(Task(name=TaskName("web"), volumes=(use,)))["given/volumes"] == b"a-very-long-name-of- ro /data\n"


def test_secrets_and_templates_are_for_the_guest_s_init_alone_until_they_have_an_owner() -> None:
    entries = {entry.path: entry for entry in given(Task(name=TaskName("web")), INSIDE, {"secrets/db/key": b"hush"})}
    assert (entries["given/secrets/db/key"].content, entries["given/secrets/db/key"].mode & 0o777) == (b"hush", 0o400)
    assert "given/secrets/db" in entries


def test_artifacts_are_one_disk_more() -> None:
    artifact = Artifact(path="model", source="https://x/m", sha256="0" * 64)
    assert told(Task(name=TaskName("web"), artifacts=(artifact,)))["given/volumes"] == (
        b"outrider.artifacts ro /artifacts\n"
    )


def test_files_stay_in_the_tasks_directory() -> None:
    files = told(Task(name=TaskName("web"), files=(File(path="www/index.html", content=b"here"),)))
    assert files["given/task/www/index.html"] == b"here"
    with pytest.raises(InputError, match="no path inside"):
        told(Task(name=TaskName("web"), files=(File(path="../init", content=b""),)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0\n", (0, False)),
        ("7\n", (7, False)),
        ("oom\n", (137, True)),
        ("", None),
        ("-1", None),
        ("256", None),
        ("x", None),
    ],
)
def test_an_end_is_believed_only_where_it_could_be_one(text: str, found: tuple[int, bool] | None) -> None:
    assert ended(text) == found
