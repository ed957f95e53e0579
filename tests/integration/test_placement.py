"""Placement on three real nodes: each wish a job can have of its nodes, and what is said where none fulfils it."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

GIB = 1 << 30
# What the nodes' operator says of them: n1 and n2 share a rack, n2 is a pool of its own, n3 has devices.
NODES: dict[str, dict[str, Any]] = {
    "n1": {"meta": {"rack": "r1", "tags": "ssd,fast", "level": "7"}},
    "n2": {"meta": {"rack": "r1", "level": "3"}, "pool": "lab"},
    "n3": {"meta": {"rack": "r2"}, "devices": {"gpu": 2}, "reserved": {"memory_bytes": 2 * GIB}},
}


class Yard:
    """The fleet with described nodes, and jobs that leave nothing behind."""

    def __init__(self, fleet: DevFleet, directory: Path) -> None:
        self.fleet = fleet
        self._file = directory / "job.yaml"

    def write(self, name: str, text: str = "", *, group: str = "", resources: str = "") -> str:
        """A job of one group; `text` are lines of the job, `group` of the group."""
        task = "{command: [/bin/sleep, '600'], resources: {cpu: 10m, memory: 8Mi, disk: 1Mi" + resources + "}}"
        lines = [f"job: {name}", *text.splitlines(), "groups:", "  web:"]
        lines += [f"    {line}" for line in group.splitlines()]
        lines += ["    tasks:", f"      main: {task}", ""]
        self._file.write_text("\n".join(lines))
        return str(self._file)

    def run(self, name: str, text: str = "pool: all", *, group: str = "", resources: str = "") -> None:
        self.write(name, text, group=group, resources=resources)
        done = self.fleet.outrider("job", "run", "--detach", str(self._file))
        assert done.returncode == 0, done.stderr

    def allocations(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.fleet.json("job", "status", name)["allocations"] if one["desired"] == "run"]

    def nodes(self, name: str) -> list[str]:
        """Where its copies are, once all of them are somewhere and run."""
        eventually(lambda: all(one["status"] == "running" for one in self.allocations(name)), f"{name} does not run")
        return sorted(one["node"] for one in self.allocations(name))

    def waiting(self, name: str) -> dict[str, Any]:
        """The copy that has no node, once the others have one."""
        waits = [one for one in self.allocations(name) if one["node"] is None]
        assert len(waits) == 1, self.allocations(name)
        return waits[0]

    def stop(self, *names: str) -> None:
        for name in names:
            assert self.fleet.outrider("job", "stop", name).returncode == 0


@pytest.fixture(scope="module")
def yard(fleet: DevFleet, tmp_path_factory: pytest.TempPathFactory) -> Yard:
    """Every agent is started again with what its operator now says of the node."""
    for name, more in NODES.items():
        config = fleet.layout.config(f"{name}.yaml")
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | more))
        os.kill(agent_pid(config), signal.SIGTERM)

    def described() -> bool:
        states = {state["node"]["id"]: state for state in fleet.json("node", "ls")}
        return all(
            states[name]["status"] == "ready" and states[name]["node"]["fingerprint"]["meta"] == more["meta"]
            for name, more in NODES.items()
        )

    eventually(described, "the agents did not come back as they are described")
    return Yard(fleet, tmp_path_factory.mktemp("jobs"))


def agent_pid(config: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-m", b"agent"] and str(config).encode() in words:
            return int(entry.name)
    raise AssertionError(f"no agent runs with {config}")


@pytest.fixture
def job(yard: Yard, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that is stopped in the end."""
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:50]
    yield name
    if any(one["name"] == name for one in yard.fleet.json("job", "ls")):
        yard.stop(name)


@pytest.mark.parametrize(
    ("constraint", "nodes"),
    [
        ("meta.rack = r2", {"n3"}),
        ("meta.rack != r1", {"n3"}),
        ("meta.level > 5", {"n1"}),
        ("meta.level <= 3", {"n2"}),
        ("meta.rack matches 2$", {"n3"}),
        ("node.kernel version >= 2.6, < 4", set()),
        ("meta.tags contains fast, ssd", {"n1"}),
        ("meta.level is not set", {"n3"}),
        ("node.memory > 1Ti", set()),
    ],
)
def test_constraint(yard: Yard, job: str, constraint: str, nodes: set[str]) -> None:
    yard.run(job, "pool: all", group=f"constraints: ['{constraint}']")
    if nodes:
        assert set(yard.nodes(job)) <= nodes
    else:
        assert f"3 of 3 nodes: `{constraint}` does not hold" in yard.waiting(job)["reason"]


def test_distinct_hosts_and_values(yard: Yard, job: str) -> None:
    yard.run(job, "pool: all", group="count: 4\nconstraints: [distinct host]")
    eventually(
        lambda: sorted(str(one["node"]) for one in yard.allocations(job)) == ["None", "n1", "n2", "n3"], "not apart"
    )
    assert "3 of 3 nodes: `distinct host` is used up" in yard.waiting(job)["reason"]
    yard.run(job, "pool: all", group="count: 3\nconstraints: [distinct meta.rack]")
    eventually(lambda: len([one for one in yard.allocations(job) if one["node"] == "n3"]) == 1, "not on n3")
    eventually(lambda: any(one["node"] is None for one in yard.allocations(job)), "three copies on two racks")


def test_affinity_and_spread_decide_among_those_that_fit(yard: Yard, job: str) -> None:
    yard.run(job, "pool: all", group="affinities: [{prefer: meta.rack = r2, weight: 80}]")
    assert yard.nodes(job) == ["n3"]
    targets = "spread: [{attribute: meta.rack, targets: {r1: 25, r2: 75}}]"
    yard.run(job, "pool: all", group=f"count: 4\n{targets}")
    eventually(lambda: len(yard.allocations(job)) == 4, "four copies")
    assert yard.nodes(job).count("n3") == 3


def test_placement_packs_or_spreads(yard: Yard, job: str) -> None:
    yard.run(job, "pool: all\nplacement: pack", group="count: 3")
    assert len(set(yard.nodes(job))) == 1
    yard.stop(job)
    yard.run(job, "pool: all\nplacement: spread", group="count: 3")
    assert len(set(yard.nodes(job))) == 3


def test_pool_keeps_to_its_nodes(yard: Yard, job: str) -> None:
    yard.run(job, "pool: lab", group="count: 2")
    assert yard.nodes(job) == ["n2", "n2"]
    yard.stop(job)
    yard.run(job, "pool: default", group="count: 3")
    assert "n2" not in yard.nodes(job)
    yard.stop(job)
    yard.run(job, "pool: nowhere")
    assert "3 of 3 nodes: `node.pool = nowhere` does not hold" in yard.waiting(job)["reason"]


def test_devices_are_counted_and_kvm_is_there_or_not(yard: Yard, job: str) -> None:
    yard.run(job, "pool: all", group="count: 3", resources=", devices: {gpu: 1}")
    eventually(lambda: [one["node"] for one in yard.allocations(job)].count("n3") == 2, "two devices for two copies")
    reason = yard.waiting(job)["reason"]
    assert "device gpu 1 wanted, at most 0 free" in reason
    yard.stop(job)
    works = yard.fleet.json("node", "status", "n1")["node"]["node"]["fingerprint"]["kvm"] == "works"
    yard.run(job, "pool: all", resources=", devices: {kvm: 1}")
    if works:
        assert yard.nodes(job)
    else:
        assert "3 of 3 nodes: kvm does not work there" in yard.waiting(job)["reason"]


def test_reserved_memory_is_not_given_away(yard: Yard) -> None:
    host = yard.fleet.json("node", "status", "n3")["node"]["node"]["fingerprint"]
    wanted_mib = (host["memory_bytes"] - GIB) // (1 << 20)
    file = yard.write("reserve", "constraints: [node.id = n3]")
    Path(file).write_text(Path(file).read_text().replace("memory: 8Mi", f"memory: {wanted_mib}Mi"))
    planned = yard.fleet.json("job", "plan", file)["plan"]
    assert [step["action"] for step in planned["steps"]] == ["wait"]
    assert "memory" in planned["steps"][0]["reason"]


def test_static_ports_are_taken_once_and_dynamic_ones_answer(yard: Yard, job: str) -> None:
    yard.run(job, "pool: all", group="count: 4\nnetwork: {ports: {http: {static: 18080}}}")
    eventually(lambda: len([one for one in yard.allocations(job) if one["node"]]) == 3, "one for each node")
    assert "port 18080 is" in yard.waiting(job)["reason"]
    yard.stop(job)
    script = "mkdir www; echo $HOST_PORT_HTTP > www/i; exec busybox httpd -f -p $PORT_HTTP -h www"
    serve = f"[sh, -c, '{script}']"
    file = yard.write(job, "pool: all", group="network: {ports: {http: {dynamic: true}}}")
    Path(file).write_text(Path(file).read_text().replace("[/bin/sleep, '600']", serve))
    assert yard.fleet.outrider("job", "run", file).returncode == 0
    (one,) = yard.allocations(job)
    port, address = one["ports"]["http"], yard.fleet.layout.address(one["node"])
    assert 20000 <= port <= 29999
    control = yard.fleet.layout.control_namespace
    get = ["nsenter", f"--net={control}", "curl", "-sS", "--max-time", "5", f"http://{address}:{port}/i"]

    def answer() -> str:
        return subprocess.run(get, capture_output=True, text=True, check=False).stdout.strip()

    eventually(lambda: answer() == str(port), "the dynamic port does not answer with its own number")


def test_the_important_take_the_place_of_others_and_the_plan_shows_it_before(yard: Yard) -> None:
    fleet = yard.fleet
    most = max(node["node"]["fingerprint"]["memory_bytes"] for node in fleet.json("node", "ls"))
    large = f"memory: {most * 6 // 10 >> 20}Mi"

    def write(name: str, priority: int, count: int) -> str:
        file = yard.write(name, f"pool: all\npriority: {priority}", group=f"count: {count}")
        Path(file).write_text(Path(file).read_text().replace("memory: 8Mi", large))
        return file

    try:
        assert fleet.outrider("job", "run", write("humble", 20, 3)).returncode == 0
        equal = fleet.json("job", "plan", write("equal", 20, 1))["plan"]
        assert [step["action"] for step in equal["steps"]] == ["wait"]
        file = write("mighty", 70, 1)
        shown = fleet.outrider("job", "plan", file)
        assert shown.returncode == 0
        assert "! preempt humble web[" in shown.stdout
        assert "preempted by mighty, priority 70" in shown.stdout
        assert fleet.outrider("job", "plan", "--detailed-exitcode", file).returncode == 2
        assert yard.nodes("humble") == ["n1", "n2", "n3"], "a plan changes nothing"
        assert fleet.outrider("job", "run", file).returncode == 0
        assert fleet.outrider("job", "plan", "--detailed-exitcode", file).returncode == 0
        (winner,) = yard.allocations("mighty")
        loser = yard.waiting("humble")
        assert "memory" in loser["reason"]
        placed = fleet.outrider("alloc", "why", winner["id"]).stdout
        assert f"running, on {winner['node']}" in placed
        assert winner["node"] in placed.split("SCORE")[1]
        pending = fleet.outrider("alloc", "why", loser["id"]).stdout
        assert "0 of 3 nodes would take it" in pending
        assert "more memory on n" in pending
        status = fleet.outrider("job", "status", "humble").stdout
        assert "warning: group web would fit with" in status
        yard.stop("mighty")
        assert yard.nodes("humble") == ["n1", "n2", "n3"]
    finally:
        known = {one["name"] for one in fleet.json("job", "ls")}
        yard.stop(*({"humble", "mighty"} & known))


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ("constraints: [node.kernal = 6]", "no node has an attribute 'node.kernal'; did you mean 'node.kernel'?"),
        ("constraints: [meta.rack is r1]", "is no constraint; expected"),
        ("constraints: ['meta.rack matches (']", "is no regular expression"),
        ("constraints: [node.kernel version newer]", "is no range of versions"),
        ("constraints: [node.memory > plenty]", "is no number"),
        ("constraints: [distinct meta.rack at most none]", "expected a whole number"),
        ("affinities: [{prefer: meta.rack = r1, weight: 0}]", "0 is not within -100 and 100"),
        ("affinities: [{weight: 10}]", "missing; for example `prefer: meta.disk = ssd`"),
        ("spread: [{attribute: meta.rack, targets: {r1: 70, r2: 40}}]", "impossible: 110 percent"),
        ("network: {ports: {http: {static: 80, dynamic: true}}}", "static gives the number already"),
    ],
)
def test_what_cannot_be_wished_is_refused_with_its_place(yard: Yard, group: str, complaint: str) -> None:
    file = yard.write("wrong", group=group)
    done = yard.fleet.outrider("job", "plan", file)
    assert done.returncode == 64
    assert complaint in done.stderr
    assert f"{file}:4:" in done.stderr


def test_a_wish_that_no_node_fulfils_is_a_warning(yard: Yard, job: str) -> None:
    group = "constraints: [meta.color = red]\nspread: [{attribute: meta.planet}]"
    done = yard.fleet.outrider("job", "run", "--detach", yard.write(job, "pool: all", group=group))
    assert "warning: group web: no node has `meta.color = red`" in done.stderr
    assert "warning: group web: spread over meta.planet, which no node has" in done.stderr
    found = json.loads(yard.fleet.outrider("alloc", "why", yard.waiting(job)["id"], "--json").stdout)
    assert found["filtered"] == [{"reason": "`meta.color = red` does not hold: meta.color is not set", "nodes": 3}]
    assert found["remedies"] == [
        "on 3 nodes, were it not for this: `meta.color = red` does not hold: meta.color is not set"
    ]
