"""Volumes in a fleet: they pull their users to where they are, outlive them, hold no more than they should."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host


class Keeper:
    """A job that sleeps beside its volumes."""

    def __init__(self, fleet: DevFleet, directory: Path) -> None:
        self.fleet, self.directory, self.name = fleet, directory, f"k{secrets.token_hex(3)}"

    def run(self, volumes: str, count: int = 1, name: str = "", more: str = "") -> str:
        """What `job run` says where it fails; "" where it does not."""
        file = self.directory / "job.yaml"
        file.write_text(
            f"""
job: {name or self.name}
groups:
  main:
    count: {count}
    update: {{min_healthy: 0s}}
    tasks: {{main: {{command: [sleep, infinity], volumes: {volumes}{more}}}}}
"""
        )
        done = self.fleet.outrider("job", "run", "--detach", str(file))
        return done.stderr if done.returncode else ""

    def allocation(self) -> dict[str, Any]:
        """The one that runs."""
        found: list[dict[str, Any]] = []

        def runs() -> bool:
            found[:] = [
                each
                for each in self.fleet.json("alloc", "ls", "--job", self.name)
                if each["desired"] == "run" and each["status"] == "running"
            ]
            return bool(found)

        eventually(runs, "running")
        return found[0]

    def sh(self, command: str) -> str:
        done = self.fleet.outrider("exec", "--no-tty", self.allocation()["id"], "--", "sh", "-c", command)
        return done.stdout + done.stderr

    def stop(self) -> None:
        self.fleet.outrider("job", "stop", self.name)
        eventually(lambda: not self.fleet.json("alloc", "ls", "--job", self.name), "the job's end")


@pytest.fixture
def keeper(fleet: DevFleet, tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(fleet, tmp_path)
    yield made
    made.stop()


def create(fleet: DevFleet, *words: str) -> str:
    name = f"v{secrets.token_hex(3)}"
    done = fleet.outrider("volume", "create", name, *words)
    assert done.returncode == 0, done.stderr
    return name


def test_it_pulls_its_user_and_outlives_it_and_is_not_deleted_meanwhile(fleet: DevFleet, keeper: Keeper) -> None:
    volume = create(fleet, "--size", "16Mi", "--node", "n2")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    assert keeper.allocation()["node"] == "n2"
    assert (
        keeper.sh("id -u; touch /data/x && echo kept > /data/file; ls -ld /data | cut -c1-10") == "1000\ndrwxr-xr-x\n"
    )

    refused = fleet.outrider("volume", "delete", volume)
    assert refused.returncode == 1
    assert f"volume {volume} is claimed: allocation {keeper.allocation()['id']} has it" in refused.stderr

    keeper.stop()
    assert keeper.run(f"{{/data: {volume}}}") == ""
    assert keeper.sh("cat /data/file") == "kept\n"
    keeper.stop()
    assert fleet.outrider("volume", "delete", volume).returncode == 0
    assert list(fleet.layout.data.glob(f"*/volumes/*{volume}*")) == []


def test_it_holds_no_more_than_its_size(fleet: DevFleet, keeper: Keeper) -> None:
    volume = create(fleet, "--size", "16Mi")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    assert "No space left on device" in keeper.sh("head -c 20000000 /dev/zero > /data/large")
    size = keeper.sh("stat -c %s /data/large")
    assert 8_000_000 < int(size) < 16 * 1024 * 1024


def test_one_for_one_at_a_time_waits_and_says_for_whom(fleet: DevFleet, keeper: Keeper, tmp_path: Path) -> None:
    volume = create(fleet, "--size", "16Mi")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    holder = keeper.allocation()["id"]
    second = Keeper(fleet, tmp_path)
    assert second.run(f"{{/data: {volume}}}") == ""
    eventually(
        lambda: (
            f"volume {volume} is for one at a time: allocation {holder} has it"
            in fleet.outrider("job", "status", second.name).stdout
        ),
        "the reason",
    )
    keeper.stop()
    assert second.allocation()["node"]
    second.stop()


def test_a_new_version_waits_for_the_old_one_to_let_go(fleet: DevFleet, keeper: Keeper) -> None:
    volume = create(fleet, "--size", "16Mi")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    keeper.sh("echo one > /data/file")
    before = keeper.allocation()["id"]
    assert keeper.run(f"{{/data: {{volume: {volume}, read_only: true}}}}") == ""
    eventually(lambda: keeper.allocation()["id"] != before, "the new version")
    assert keeper.sh("cat /data/file; touch /data/x").startswith("one\n")
    assert "Read-only file system" in keeper.sh("touch /data/x")


def test_a_snapshot_is_put_back_once_nobody_has_the_volume(fleet: DevFleet, keeper: Keeper) -> None:
    volume = create(fleet, "--size", "16Mi")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    keeper.sh("echo before > /data/file")
    made = fleet.outrider("volume", "snapshot", volume, "first")
    assert made.returncode == 0, made.stderr
    keeper.sh("echo after > /data/file")
    assert fleet.outrider("volume", "restore", volume, "first").returncode == 1
    keeper.stop()
    put_back = fleet.outrider("volume", "restore", volume, "first")
    assert put_back.returncode == 0, put_back.stderr
    assert keeper.run(f"{{/data: {volume}}}") == ""
    assert keeper.sh("cat /data/file") == "before\n"
    (listed,) = [each for each in fleet.json("volume", "ls") if each["volume"]["name"] == volume]
    assert [each["name"] for each in listed["snapshots"]] == ["first"]
    assert fleet.outrider("volume", "delete", volume, "--snapshot", "first").returncode == 0


def test_a_directory_of_the_node_is_shared_by_many(fleet: DevFleet, keeper: Keeper, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "hello").write_text("from the node\n")
    volume = create(fleet, "--path", str(shared), "--node", "n1", "--access", "many")
    assert keeper.run(f"{{/data: {volume}}}", count=2) == ""
    assert keeper.sh("cat /data/hello; echo 1 > /data/mine; stat -c %u /data/mine") == "from the node\n1000\n"
    assert (shared / "mine").read_text() == "1\n"
    keeper.stop()
    assert fleet.outrider("volume", "delete", volume).returncode == 0
    assert (shared / "hello").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--size", "1Mi"), "a volume has at least 8 MiB"),
        (("--path", "/nowhere", "--node", "n1"), "/nowhere is no directory on this node"),
        (("--path", "/srv"), "a path is one of a node: say which"),
        (("--size", "16Mi", "--node", "n9"), "no node 'n9'"),
        (("--size", "100000Gi", "--node", "n1"), "of disk to give away; take less"),
        (("--size", "100000Gi"), "no ready node has"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_left(fleet: DevFleet, words: tuple[str, ...], told: str) -> None:
    done = fleet.outrider("volume", "create", "refused", *words)
    assert done.returncode != 0
    assert told in done.stderr
    assert [each for each in fleet.json("volume", "ls") if each["volume"]["name"] == "refused"] == []
    assert list(fleet.layout.data.glob("*/volumes/*refused*")) == []


def test_a_job_naming_none_that_is_there_is_told_how_to_make_it(keeper: Keeper) -> None:
    assert "no volume 'absent' in namespace default; `outrider volume create absent" in keeper.run("{/data: absent}")


def test_it_is_there_again_when_its_node_comes_back(fleet: DevFleet, keeper: Keeper) -> None:
    volume = create(fleet, "--size", "16Mi", "--node", "n3")
    assert keeper.run(f"{{/data: {volume}}}") == ""
    keeper.sh("echo kept > /data/file")
    before = keeper.allocation()["id"]
    assert fleet.dev("kill", "n3").returncode == 0
    eventually(lambda: fleet.node_statuses()["n3"] != "ready", "the node's loss")
    assert fleet.dev("heal", "n3").returncode == 0
    eventually(lambda: fleet.node_statuses()["n3"] == "ready", "the node's return")
    eventually(lambda: keeper.sh("cat /data/file") == "kept\n", "the volume's return")
    assert before


def test_a_sticky_disk_is_found_again_by_the_copy_that_takes_the_place(fleet: DevFleet, keeper: Keeper) -> None:
    assert keeper.run("{}", more=", sticky: {/cache: 1Mi}") == ""
    keeper.sh("mkdir /cache/a && echo kept > /cache/a/file && ln -s /etc/passwd /cache/link")
    before = keeper.allocation()
    assert keeper.run("{}", more=", sticky: {/cache: 2Mi}") == ""
    eventually(lambda: keeper.allocation()["id"] != before["id"], "the new version")
    after = keeper.allocation()
    assert after["node"] == before["node"]
    assert keeper.sh("cat /cache/a/file; stat -c %u /cache /cache/a /cache/link") == "kept\n1000\n1000\n1000\n"
    assert int(keeper.sh("stat -f -c '%b %S' /cache | awk '{print $1 * $2}'")) == 2 * 1024 * 1024
    keeper.sh("echo more >> /cache/a/file")
    assert fleet.outrider("alloc", "stop", after["id"]).returncode == 0
    eventually(lambda: keeper.allocation()["id"] != after["id"], "the copy in its place")
    assert keeper.allocation()["node"] == after["node"]
    assert keeper.sh("cat /cache/a/file") == "kept\nmore\n"
