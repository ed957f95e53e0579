"""Rollouts, drains, restarts and silent nodes on a real fleet of three nodes, as people see them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host

JOB = """
job: {job}
groups:
  web:
    count: {count}
    update: {{min_healthy: 200ms, healthy_deadline: {deadline}{update}}}
    {more}
    network: {{ports: {{http: {{}}}}}}
    services: [{{name: {job}, port: http, check: {{tcp: true, interval: {interval}}}}}]
    tasks:
      server:
        command: [python3, -m, http.server, "{port}"]
        env: {{VERSION: "{version}"}}
        kill_timeout: 1s
        resources: {{cpu: 50m, memory: 48Mi}}
"""
LISTENS = "${port.http}"


class Jobs:
    def __init__(self, fleet: DevFleet, directory: Path) -> None:
        self.fleet = fleet
        self.directory = directory

    def run(self, job: str, version: str, *, code: int = 0, detach: bool = False, **options: str | int) -> str:
        values = {
            "count": 3,
            "update": "",
            "more": "",
            "interval": "500ms",
            "port": LISTENS,
            "deadline": "20s",
            **options,
        }
        file = self.directory / "job.yaml"
        file.write_text(JOB.format(job=job, version=version, **values))
        return self.outrider("job", "run", str(file), *(["--detach"] if detach else []), code=code)

    def outrider(self, *words: str, code: int = 0) -> str:
        done = self.fleet.outrider(*words)
        assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def allocations(self, job: str) -> list[dict[str, Any]]:
        """Those that live, in the order of their indices."""
        found: list[dict[str, Any]] = self.fleet.json("alloc", "ls", "--job", job)
        return found

    def ids(self, job: str) -> set[str]:
        return {one["id"] for one in self.allocations(job)}

    def nodes(self, job: str) -> set[str]:
        return {one["node"] for one in self.allocations(job)}

    def has_stand_in(self, job: str) -> bool:
        return any(one.get("role") == "successor" and one["healthy"] for one in self.allocations(job))

    def rollout(self, job: str) -> str:
        return str(self.fleet.json("job", "status", job)["rollout"])

    def fewest_healthy(self, job: str, since: int) -> int:
        """How few copies were healthy at a time, by the events after number `since`."""
        healthy: set[str] = set()
        fewest = 1_000_000
        for event in self.events():
            if event["job"] == job and event["kind"] == "alloc.healthy":
                healthy.add(event["alloc"])
            elif event["job"] == job and event["kind"] in {"alloc.stopping", "alloc.unhealthy", "alloc.failed"}:
                healthy.discard(event["alloc"])
            if event["sequence"] > since:
                fewest = min(fewest, len(healthy))
        return fewest

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.outrider("events", "--json").splitlines()]

    def stop(self, job: str) -> None:
        self.outrider("job", "stop", job)


@pytest.fixture
def jobs(fleet: DevFleet, tmp_path: Path) -> Jobs:
    return Jobs(fleet, tmp_path)


def test_a_new_version_rolls_and_never_takes_more_than_its_share_away(jobs: Jobs) -> None:
    jobs.run("rolls", "1")
    before, since = jobs.ids("rolls"), jobs.events()[-1]["sequence"]
    jobs.run("rolls", "2")
    assert not before & jobs.ids("rolls")
    assert jobs.fewest_healthy("rolls", since) == 2
    jobs.stop("rolls")


def test_a_canary_proves_itself_and_is_promoted(jobs: Jobs) -> None:
    jobs.run("canary", "1")
    before = jobs.ids("canary")
    assert "outrider deployment promote canary" in jobs.run("canary", "2", update=", canary: 1")
    (canary,) = (one for one in jobs.allocations("canary") if one.get("role") == "canary")
    assert before < jobs.ids("canary")
    assert jobs.rollout("canary") == "proven"
    jobs.outrider("deployment", "promote", "canary")
    assert canary["id"] in jobs.ids("canary")
    assert not before & jobs.ids("canary")
    assert "nothing to promote" in jobs.outrider("deployment", "promote", "canary", code=1)
    jobs.stop("canary")


@pytest.mark.deep
def test_a_canary_that_does_not_answer_is_taken_back(jobs: Jobs) -> None:
    jobs.run("spoilt", "1")
    before = jobs.ids("spoilt")
    said = jobs.run("spoilt", "2", update=", canary: 1, auto_revert: true", port="1", code=1)
    assert "version 3 is version 1 again" in said
    eventually(lambda: jobs.ids("spoilt") == before, "the canary is gone")
    jobs.stop("spoilt")


@pytest.mark.deep
def test_a_blue_green_update_switches_at_once(jobs: Jobs) -> None:
    jobs.run("bluegreen", "1")
    before = jobs.ids("bluegreen")
    jobs.run("bluegreen", "2", update=", blue_green: true")
    assert len(jobs.ids("bluegreen")) == 6
    jobs.outrider("deployment", "promote", "bluegreen")
    eventually(lambda: len(jobs.ids("bluegreen")) == 3, "the first set is gone")
    assert not before & jobs.ids("bluegreen")
    jobs.stop("bluegreen")


@pytest.mark.deep
def test_a_rollout_is_paused_resumed_and_given_up(jobs: Jobs) -> None:
    jobs.run("held", "1")
    jobs.run("held", "2", update=", canary: 1")
    jobs.outrider("deployment", "pause", "held")
    assert jobs.rollout("held") == "paused"
    assert "is paused" in jobs.outrider("deployment", "promote", "held", code=1)
    jobs.outrider("deployment", "resume", "held", "--detach")
    assert "is not paused" in jobs.outrider("deployment", "resume", "held", code=1)
    jobs.outrider("deployment", "fail", "held")
    eventually(lambda: all(one.get("role") != "canary" for one in jobs.allocations("held")), "canaries are gone")
    assert jobs.rollout("held") == "failed"
    assert "no job 'nobody'" in jobs.outrider("deployment", "promote", "nobody", code=1)
    jobs.stop("held")


def test_what_does_not_make_the_process_changes_where_it_runs(jobs: Jobs) -> None:
    jobs.run("inplace", "1")
    before = jobs.ids("inplace")
    jobs.run("inplace", "1", interval="300ms", more="restart: {attempts: 7}", count=2)
    assert jobs.ids("inplace") < before
    versions = {one["job_version"] for one in jobs.allocations("inplace")}
    assert versions == {2}
    jobs.stop("inplace")


def test_one_allocation_is_restarted_where_it_is_and_stopped(jobs: Jobs) -> None:
    jobs.run("single", "1", count=1)
    (one,) = jobs.allocations("single")
    jobs.outrider("alloc", "restart", one["id"])
    (again,) = jobs.allocations("single")
    assert (again["id"], again["report"]["tasks"][0]["restarts"]) == (one["id"], 1)
    jobs.outrider("alloc", "stop", one["id"])
    eventually(lambda: not jobs.ids("single") & {one["id"]} and len(jobs.ids("single")) == 1, "another takes its place")
    assert "has ended" in jobs.outrider("alloc", "stop", one["id"], code=1)
    jobs.stop("single")


@pytest.mark.deep
def test_a_job_is_restarted_a_few_at_a_time(jobs: Jobs) -> None:
    jobs.run("again", "1")
    before, since = jobs.ids("again"), jobs.events()[-1]["sequence"]
    jobs.outrider("job", "restart", "again")
    assert not before & jobs.ids("again")
    assert jobs.fewest_healthy("again", since) == 2
    assert "the fleet has exactly this already" in jobs.run("again", "1")
    jobs.stop("again")


def test_a_node_is_drained_without_a_gap_and_stays_closed(jobs: Jobs) -> None:
    jobs.run("moved", "1")
    since = jobs.events()[-1]["sequence"]
    assert "drained" in jobs.outrider("node", "drain", "n1")
    assert "n1" not in jobs.nodes("moved")
    assert jobs.fewest_healthy("moved", since) == 3
    jobs.run("moved", "1", count=6)
    assert "n1" not in jobs.nodes("moved")
    jobs.outrider("node", "eligibility", "n1", "--enable")
    jobs.run("moved", "2", count=6)
    assert "n1" in jobs.nodes("moved")
    assert "no node 'n9'" in jobs.outrider("node", "drain", "n9", code=1)
    assert "--deadline" in jobs.outrider("node", "drain", "n1", "--deadline", "soon", code=64)
    jobs.stop("moved")


def test_a_silent_node_has_a_stand_in_until_it_is_back(jobs: Jobs) -> None:
    jobs.run("kept", "1", more="disconnect: {replace_after: 2s, lost_after: 5m}")
    before = jobs.ids("kept")
    jobs.fleet.dev("partition", "n2")
    try:
        eventually(lambda: jobs.has_stand_in("kept"), "a stand-in runs")
        assert before < jobs.ids("kept")
    finally:
        jobs.fleet.dev("heal", "n2")
    eventually(lambda: jobs.ids("kept") == before, "the original stays, and its stand-in goes")
    jobs.stop("kept")


def test_a_copy_whose_node_is_away_for_too_long_is_lost(jobs: Jobs) -> None:
    jobs.run("lost", "1", more="disconnect: {lost_after: 2s}")
    (on_n3,) = (one["id"] for one in jobs.allocations("lost") if one["node"] == "n3")
    jobs.fleet.dev("partition", "n3")
    try:
        eventually(lambda: on_n3 not in jobs.ids("lost") and len(jobs.ids("lost")) == 3, "another takes its place")
        assert jobs.nodes("lost") == {"n1", "n2"}
    finally:
        jobs.fleet.dev("heal", "n3")
    eventually(lambda: jobs.fleet.node_statuses()["n3"] == "ready", "the node is back")
    jobs.stop("lost")


def test_what_fails_again_and_again_is_given_up(jobs: Jobs) -> None:
    said = jobs.run(
        "hopeless", "1", count=1, port="nonsense", code=1,
        more="restart: {attempts: 0}\n    reschedule: {attempts: 1, delay: 100ms}",
    )  # fmt: skip
    assert "failed" in said
    eventually(lambda: "given up" in jobs.outrider("job", "status", "hopeless"), "it is given up")
    failed = jobs.fleet.json("alloc", "ls", "--job", "hopeless", "--all")
    assert len(failed) == 2
    assert len({one["node"] for one in failed}) == 2, "the second try is elsewhere"
    jobs.stop("hopeless")


@pytest.mark.deep
def test_a_rollout_that_makes_no_progress_fails_after_trying_elsewhere(jobs: Jobs) -> None:
    said = jobs.run("stuck", "1", count=1, port="1", deadline="2s", update=", progress_deadline: 8s", code=1)
    assert "made no progress within 8 s" in said
    tried = jobs.fleet.json("alloc", "ls", "--job", "stuck", "--all")
    assert len({one["node"] for one in tried}) > 1
    jobs.stop("stuck")


@pytest.mark.deep
def test_batch_work_may_end_on_a_drained_node_until_the_deadline(jobs: Jobs) -> None:
    file = jobs.directory / "work.yaml"
    file.write_text(
        "job: work\ntype: batch\ngroups: {main: {count: 3, constraints: [distinct host at most 1],"
        " tasks: {main: {command: [sleep, '300'], kill_timeout: 1s}}}}\n"
    )
    jobs.outrider("job", "run", "--detach", str(file))
    eventually(lambda: jobs.nodes("work") == {"n1", "n2", "n3"}, "one on each node")
    (on_n2,) = (one["id"] for one in jobs.allocations("work") if one["node"] == "n2")
    since = jobs.events()[-1]["sequence"]
    jobs.outrider("node", "drain", "n2", "--deadline", "4s")
    told = [event for event in jobs.events() if event["sequence"] > since]
    draining = next(event for event in told if event["kind"] == "node.draining")
    stopping = next(event for event in told if event["alloc"] == on_n2)
    assert (stopping["kind"], stopping["message"]) == ("alloc.stopping", "its node is drained")
    assert stopping["at_s"] - draining["at_s"] > 3.9
    jobs.outrider("node", "eligibility", "n2", "--enable")
    jobs.stop("work")


@pytest.mark.deep
def test_a_stand_in_that_is_to_survive_takes_the_place_of_the_original(jobs: Jobs) -> None:
    jobs.run("survives", "1", more="disconnect: {replace_after: 2s, lost_after: 5m, survivor: replacement}")
    (original,) = (one["id"] for one in jobs.allocations("survives") if one["node"] == "n2")
    jobs.fleet.dev("partition", "n2")
    try:
        eventually(lambda: jobs.has_stand_in("survives"), "a stand-in runs")
    finally:
        jobs.fleet.dev("heal", "n2")
    eventually(lambda: original not in jobs.ids("survives") and len(jobs.ids("survives")) == 3, "the original goes")
    assert all(one.get("role", "ordinary") == "ordinary" for one in jobs.allocations("survives"))
    jobs.stop("survives")


@pytest.mark.deep
def test_when_all_nodes_are_away_at_once_nothing_is_lost_then_nor_as_they_come_back(jobs: Jobs) -> None:
    jobs.run("braked", "1", more="disconnect: {lost_after: 20s}")
    before, since = jobs.ids("braked"), jobs.events()[-1]["sequence"]

    def told(kind: str) -> float | None:
        """When."""
        return next((one["at_s"] for one in jobs.events() if one["sequence"] > since and one["kind"] == kind), None)

    nodes = ("n1", "n2", "n3")
    for node in nodes:
        jobs.fleet.dev("partition", node)
    try:
        eventually(
            lambda: (at_s := told("fleet.braked")) is not None and time.time() > at_s + 12, "overdue, and braked"
        )
        assert jobs.ids("braked") == before
    finally:
        for node in nodes:
            jobs.fleet.dev("heal", node)
    eventually(lambda: set(jobs.fleet.node_statuses().values()) == {"ready"}, "all are back")
    assert told("fleet.released") is not None
    assert jobs.ids("braked") == before
    jobs.stop("braked")
