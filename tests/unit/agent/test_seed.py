"""What a guest's seed says to cloud-init."""

import json
import os
from pathlib import Path

import pytest

from agent import seed
from agent.sandbox import process
from outrider.errors import InputError
from outrider.ids import AllocId, GroupName, JobName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import CloudInit, Driver, File, Group, Task


def assignment(task: Task) -> Assignment:
    group = Group(name=GroupName("guest"), tasks=(task,))
    return Assignment(alloc=AllocId("00000000a1"), job=JobName("j"), job_version=1, group=group, index=2)


def told(task: Task) -> dict[str, str]:
    return {file.path: file.content.decode() for file in seed.with_names(assignment(task), task)}


def test_cloud_init_is_told_of_user_keys_files_and_commands() -> None:
    wanted = CloudInit(
        user="ada",
        ssh_keys=("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5",),
        files=(File(path="/etc/motd", content=b"hello\n", mode=0o755),),
        commands=("systemctl start nginx",),
    )
    given = told(Task(name=TaskName("machine"), driver=Driver.VM, cloud_init=wanted))
    assert given["meta-data"] == "instance-id: 00000000a1\nlocal-hostname: guest-2\n"
    kind, _, text = given["user-data"].partition("\n")
    assert kind == "#cloud-config"
    config = json.loads(text)
    (user,) = config["users"]
    assert (user["name"], user["ssh_authorized_keys"]) == ("ada", ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"])
    assert config["write_files"] == [
        {"path": "/etc/motd", "encoding": "b64", "content": "aGVsbG8K", "permissions": "0755"}
    ]
    assert config["runcmd"] == ["systemctl start nginx"]


def test_keys_without_a_user_are_for_the_image_s_own() -> None:
    task = Task(name=TaskName("machine"), driver=Driver.VM, cloud_init=CloudInit(ssh_keys=("ssh-rsa A",)))
    assert json.loads(told(task)["user-data"].partition("\n")[2]) == {"ssh_authorized_keys": ["ssh-rsa A"]}


def test_a_job_s_own_user_data_stays_as_it_is() -> None:
    own = File(path="user-data", content=b"#!/bin/sh\n")
    assert told(Task(name=TaskName("machine"), driver=Driver.VM, files=(own,)))["user-data"] == "#!/bin/sh\n"


async def test_files_that_cannot_be_in_one_place_are_the_job_s_fault(tmp_path: Path) -> None:
    both = (File(path="a", content=b""), File(path="a/b", content=b""))
    task = Task(name=TaskName("machine"), driver=Driver.VM, files=both)
    with pytest.raises(InputError, match="files: a/b"):
        await seed.make(tmp_path / "seed.iso", assignment(task), task, {}, 0)


async def test_a_secret_is_a_file_of_root_s_on_a_disk_that_the_emulator_alone_may_read(tmp_path: Path) -> None:
    made = tmp_path / "seed.iso"
    task = Task(name=TaskName("machine"), driver=Driver.VM)
    await seed.make(made, assignment(task), task, {"secrets/db": b"hush"}, 0)
    assert made.stat().st_mode & 0o777 == 0o600
    listed = await process.run(["isoinfo", "-R", "-l", "-i", str(made)], timeout_s=10)
    (line,) = (line for line in listed.output.splitlines() if line.endswith(" db "))
    assert line.startswith("-r--------   1    0    0")
    assert [path.name for path in os.scandir(tmp_path)] == [made.name], "the tree that it was made of is gone"
