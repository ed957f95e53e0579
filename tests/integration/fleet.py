"""A dev fleet that the tests of one module share, made and removed by the command line that people use."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.cli.dev.layout import Layout

OUTRIDER = str(Path(sys.executable).with_name("outrider"))
COMMAND_S = 90.0


class DevFleet:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.address = f"unix:{layout.operator_socket}"

    def outrider(self, *words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
        """`outrider WORDS` against this fleet, whatever else runs on the machine."""
        return outrider("--address", self.address, *words, text=text)

    def json(self, *words: str) -> Any:
        done = self.outrider(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def dev(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return outrider("dev", *words, "--name", self.layout.name)

    def node_statuses(self) -> dict[str, str]:
        return {state["node"]["id"]: state["status"] for state in self.json("node", "ls")}


def outrider(*words: str, text: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [OUTRIDER, *words],
        input=text,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
    )


def eventually(condition: Callable[[], object], what: str) -> None:
    """Waits until it is so."""
    deadline_s = time.monotonic() + COMMAND_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {COMMAND_S:g} s: {what}"
        time.sleep(0.1)


def unique_name() -> str:
    return f"t{secrets.token_hex(4)}"


def left_of(layout: Layout) -> list[str]:
    """What a removed fleet still has on this machine. Empty, or the removal is broken."""
    found = [str(path) for path in (layout.run, layout.data) if path.exists()]
    found.extend(str(path) for path in Path("/sys/fs/cgroup").glob(f"*/outrider/{layout.name}"))
    marks = (f"/{layout.name}/".encode(), f"\0{layout.name}\0".encode())
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue  # it ended meanwhile
        if any(mark in words for mark in marks):
            found.append(f"process {entry.name}: {words.decode(errors='replace')}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found.extend(line for line in mounts if f"/{layout.name}/" in line)
    return found


@pytest.fixture(scope="module")
def fleet() -> Iterator[DevFleet]:
    """Three nodes, ready; nothing of it is left afterwards."""
    layout = Layout(name=unique_name(), node_count=3)
    started = outrider("dev", "--name", layout.name, "--nodes", "3", "--detach")
    assert started.returncode == 0, started.stderr
    try:
        yield DevFleet(layout)
    finally:
        stopped = outrider("dev", "down", "--name", layout.name)
    assert stopped.returncode == 0, stopped.stderr
    assert left_of(layout) == []
