"""`outrider dev`: a fleet on this machine starts, is disturbed, copes, and leaves nothing behind."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.cli.dev.front import supervisor_pid
from outrider.cli.dev.layout import Layout
from tests.integration.fleet import OUTRIDER, DevFleet, eventually, fleet, left_of, outrider, unique_name

__all__ = ["fleet"]
pytestmark = pytest.mark.host

WAIT_S = 30.0
SLEEPER = """
job: sleeper
groups:
  sleeper:
    count: 3
    tasks: {main: {command: [sleep, infinity]}}
"""


@pytest.fixture
def sleeper(fleet: DevFleet, tmp_path: Path) -> Iterator[DevFleet]:
    """One allocation on each node."""
    file = tmp_path / "sleeper.yaml"
    file.write_text(SLEEPER)
    done = fleet.outrider("job", "run", str(file))
    assert done.returncode == 0, done.stderr
    yield fleet
    assert fleet.outrider("job", "stop", "sleeper").returncode == 0


def test_the_fleet_is_ready_when_dev_returns(fleet: DevFleet) -> None:
    assert set(fleet.node_statuses().values()) == {"ready"}
    status = outrider("dev", "status", "--name", fleet.layout.name)
    assert status.returncode == 0
    assert "n3" in status.stdout


@pytest.mark.usefixtures("fleet")
def test_nothing_of_it_is_in_the_hosts_namespace() -> None:
    links = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    assert "10.99.0." not in links
    assert "bridge0" not in links


def test_a_name_is_taken_once(fleet: DevFleet) -> None:
    second = outrider("dev", "--name", fleet.layout.name, "--nodes", "1", "--detach")
    assert second.returncode == 64
    assert f"outrider dev down --name {fleet.layout.name}" in second.stderr
    assert set(fleet.node_statuses().values()) == {"ready"}


def test_a_partitioned_node_is_suspect_and_comes_back_with_its_work(sleeper: DevFleet) -> None:
    before = {each["id"] for each in sleeper.json("alloc", "ls")}
    assert sleeper.dev("partition", "n1").returncode == 0
    eventually(lambda: sleeper.node_statuses()["n1"] == "suspect", "n1's suspicion")
    assert sleeper.dev("heal", "n1").returncode == 0
    eventually(lambda: sleeper.node_statuses()["n1"] == "ready", "n1's return")
    assert {each["id"] for each in sleeper.json("alloc", "ls")} == before


def test_a_killed_node_runs_nothing_until_it_is_healed(sleeper: DevFleet) -> None:
    (victim,) = (each["id"] for each in sleeper.json("alloc", "ls", "--node", "n2"))
    assert sleeper.dev("kill", "n2").returncode == 0
    eventually(lambda: sleeper.node_statuses()["n2"] != "ready", "n2's loss")
    assert not any(_mentions(entry, victim) for entry in Path("/proc").iterdir())
    assert sleeper.dev("heal", "n2").returncode == 0
    eventually(lambda: sleeper.node_statuses()["n2"] == "ready", "n2's return")


def test_programs_that_die_are_started_again(fleet: DevFleet) -> None:
    (agent,) = _agents(fleet.layout, "n3")
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: _agents(fleet.layout, "n3") not in ([], [agent]), "another agent")
    eventually(lambda: fleet.node_statuses()["n3"] == "ready", "n3's return")


def test_what_a_killed_supervisor_left_is_found_and_removed(fleet: DevFleet) -> None:
    layout = Layout(name=unique_name(), node_count=1)
    started = outrider("dev", "--name", layout.name, "--nodes", "1", "--detach")
    assert started.returncode == 0, started.stderr
    pid = supervisor_pid(layout)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: supervisor_pid(layout) is None, "the supervisor's end")
    assert outrider("dev", "status", "--name", layout.name).returncode == 69
    stopped = outrider("dev", "down", "--name", layout.name)
    assert stopped.returncode == 0, stopped.stderr
    assert left_of(layout) == []
    assert set(fleet.node_statuses().values()) == {"ready"}, "the fleet beside it is untouched"


def test_ctrl_c_ends_and_removes_a_fleet_in_the_foreground() -> None:
    layout = Layout(name=unique_name(), node_count=1)
    process = subprocess.Popen(
        [OUTRIDER, "dev", "--name", layout.name, "--nodes", "1"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    while "is ready:" not in said:
        said = process.stderr.readline()
        assert said, "it ended before it was ready"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert left_of(layout) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("down", "--name", "nowhere"), 69, "no fleet 'nowhere' runs here"),
        (("status", "--name", "nowhere"), 69, "outrider dev --name nowhere"),
        (("kill", "n1", "--name", "nowhere"), 69, "no fleet 'nowhere'"),
        (("--name", "No"), 64, "cannot name a fleet"),
        (("--name", "claims"), 64, "cannot name a fleet"),
        (("--nodes", "0", "--name", "none"), 64, "0 nodes"),
    ],
)
def test_bad_input_says_what_to_do(words: tuple[str, ...], code: int, said: str) -> None:
    done = outrider("dev", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_a_node_that_is_none_is_named(fleet: DevFleet) -> None:
    done = fleet.dev("partition", "n9")
    assert done.returncode == 64
    assert "n1, n2, n3" in done.stderr


def _agents(layout: Layout, node: str) -> list[int]:
    words = f"\0--config\0{layout.config(f'{node}.yaml')}\0".encode()
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _says(entry, words)]


def _says(entry: Path, words: bytes) -> bool:
    try:
        return words in (entry / "cmdline").read_bytes()
    except OSError:
        return False


def _mentions(entry: Path, alloc: str) -> bool:
    try:
        return entry.name.isdigit() and f"OUTRIDER_ALLOC_ID={alloc}".encode() in (entry / "environ").read_bytes()
    except OSError:
        return False
