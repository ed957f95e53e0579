"""What the job brings along as a disk for a guest: a read-only ISO 9660 image labelled `cidata`, as NoCloud has it.

https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html: a guest with cloud-init takes `user-data` from
it; any other may mount it. Secrets and templates are files beside it, in `secrets` and `templates`: cloud-init copies
what it reads itself to the guest's disk, and those it does not read. Owns the image alone.
"""

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from agent.drivers.task_directory import safe_path
from agent.sandbox import process
from outrider.errors import HostError, InputError
from outrider.model.allocation import Assignment
from outrider.model.job import CloudInit, File, Task

LABEL = "cidata"
META_DATA, USER_DATA = "meta-data", "user-data"
_GENISOIMAGE_S = 30.0


async def make(path: Path, assignment: Assignment, task: Task, belongings: Mapping[str, bytes], owner: int) -> None:
    """`path`: in the node's memory; `belongings`: "secrets/NAME" and "templates/NAME", for the guest's root alone.

    Raises InputError for files that cannot be in one place, HostError where it cannot be made.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".seed-") as name:
        tree = Path(name)
        given = (File(path=inside, content=content, mode=0o400) for inside, content in belongings.items())
        _fill(tree, (*with_names(assignment, task), *given))
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        # Joliet and Rock Ridge: names and modes stay as they are, whatever the guest reads.
        argv = ["genisoimage", "-quiet", "-J", "-R", "-V", LABEL, "-o", str(path), str(tree)]
        done = await process.run(argv, timeout_s=_GENISOIMAGE_S)
    if done.code != 0:
        raise HostError("genisoimage", step=f"make {path}: {done.output.strip()}")
    os.chown(path, owner, owner)


def with_names(assignment: Assignment, task: Task) -> tuple[File, ...]:
    """The job's files, and what cloud-init wants beside them unless the job has its own."""
    group = assignment.group.name
    names = f"instance-id: {assignment.alloc}\nlocal-hostname: {group}-{assignment.index}\n"
    given = {file.path for file in task.files}
    ours = {META_DATA: names, USER_DATA: _user_data(task.cloud_init)}
    added = (File(path=path, content=text.encode()) for path, text in ours.items() if path not in given)
    return (*task.files, *added)


def _user_data(wanted: CloudInit | None) -> str:
    """https://cloudinit.readthedocs.io/en/latest/reference/modules.html; JSON is YAML."""
    config: dict[str, object] = {}
    if wanted is not None and wanted.user:
        user = {"name": wanted.user, "sudo": "ALL=(ALL) NOPASSWD:ALL", "shell": "/bin/sh", "lock_passwd": True}
        config["users"] = [{**user, "ssh_authorized_keys": wanted.ssh_keys}]
    elif wanted is not None and wanted.ssh_keys:
        config["ssh_authorized_keys"] = wanted.ssh_keys
    if wanted is not None and wanted.files:
        config["write_files"] = [
            {
                "path": file.path,
                "encoding": "b64",
                "content": base64.b64encode(file.content).decode(),
                "permissions": f"{file.mode:04o}",
            }
            for file in wanted.files
        ]
    if wanted is not None and wanted.commands:
        config["runcmd"] = wanted.commands
    return "#cloud-config\n" + (json.dumps(config, indent=1) + "\n" if config else "")


def _fill(tree: Path, files: tuple[File, ...]) -> None:
    tree.chmod(0o755)  # the guest's to list
    for file in files:
        _write(tree, file)


def _write(tree: Path, file: File) -> None:
    target = tree / safe_path(file.path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(file.mode & 0o777)
    except OSError as error:
        raise InputError(f"files: {file.path}: {error.strerror}") from error
