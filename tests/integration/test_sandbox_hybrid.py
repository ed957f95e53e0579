"""On a hybrid host the agent moves into a namespace of its own, once, and comes back to the same one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import hybrid
from agent.sandbox import mounts
from agent.sandbox.cgroup import Version, detect

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(detect() is not Version.HYBRID, reason="this host's control groups are not hybrid"),
]

PROGRAM = """
import os, sys; from pathlib import Path
from agent import hybrid
from agent.sandbox.cgroup import detect
hybrid.enter(Path(sys.argv[1]), [sys.executable, *sys.orig_argv[1:]])
print(detect(), os.stat('/proc/self/ns/mnt').st_ino, Path.cwd(), *sys.argv[2:])
"""


@pytest.fixture
def run_directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    hybrid.remove(tmp_path / "run")
    assert [point for point in mounts.mount_points() if point.startswith(str(tmp_path))] == []


def entered(run_directory: Path) -> list[str]:
    argv = [sys.executable, "-c", PROGRAM, str(run_directory), "an argument"]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout.strip().split(" ", 3)


def test_agent_lives_where_crun_works_and_every_later_one_too(run_directory: Path) -> None:
    first, second = entered(run_directory), entered(run_directory)
    assert first == second
    kind, inode, cwd, argument = first
    assert kind == "v1"
    assert int(inode) != os.stat("/proc/self/ns/mnt").st_ino  # noqa: PTH116 - a link that only stat follows
    assert (cwd, argument) == (str(Path.cwd()), "an argument")
    assert detect() is Version.HYBRID  # the host's own mounts are as they were


def test_run_directories_have_namespaces_of_their_own(run_directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    try:
        assert entered(run_directory)[1] != entered(other)[1]
    finally:
        hybrid.remove(other)


def test_remove_is_content_with_nothing(tmp_path: Path) -> None:
    hybrid.remove(tmp_path / "never")
