"""examples/shop on a real fleet: what the demo shows is true, and what is not true is said."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import examples.shop
from examples.shop.fleet import ShopFleet
from examples.shop.show import Show, UntrueError
from outrider.cli.address import Address
from outrider.cli.client import Fleet, open_channel
from outrider.model.mesh import Action
from tests.integration.certificates import Authority
from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host
_ASK = """
import ssl, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"host": "shop.example"})
try:
    print(urllib.request.urlopen(request, timeout=10, context=ssl._create_unverified_context()).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""


class Shown:
    def __init__(self, shop: ShopFleet) -> None:
        self.shop = shop
        self._text = io.StringIO()
        self.show = Show(shop, Console(file=self._text, width=200), wait_s=8.0)

    def take(self) -> str:
        """What was shown since the last time."""
        text = self._text.getvalue()
        self._text.seek(0)
        self._text.truncate()
        return text


@pytest.fixture(scope="module")
def shown(fleet: DevFleet) -> Iterator[Shown]:
    address = Address(target=fleet.address)
    with open_channel(address) as channel:
        shown = Shown(ShopFleet(fleet.layout, Fleet(address, channel)))
        shown.show.start_jobs()
        yield shown


def test_calls_are_balanced_over_the_replicas(shown: Shown) -> None:
    shown.show.balance()
    text = shown.take()
    for group in ("web", "api"):
        for replica in shown.shop.allocations("shop", group):
            assert replica.id in text
    assert "each visit once" in text


def test_both_sidecars_saw_the_right_identity(shown: Shown) -> None:
    shown.show.certificates()
    text = shown.take()
    for service in ("shopper", "web", "api", "redis"):
        assert f"/ns/default/dc/dc1/svc/{service}" in text


def test_the_refusal_names_the_intention_and_changes_when_it_is_taken_away(shown: Shown) -> None:
    shown.show.intruder()
    first, created, deleted, granted, last = shown.take().split("✔")[1:]
    assert "the default, deny" in first
    assert "intruder -> web deny “not from here”" in created
    assert "recorded: deny:intruder->web:" in created
    assert "the default, deny" in deleted
    assert "served" in granted
    assert "refused" in last


def test_a_refusal_that_does_not_happen_is_not_claimed(shown: Shown) -> None:
    shown.shop.create_intention("intruder", "web", Action.ALLOW, "in spite of the show")
    try:
        with pytest.raises(UntrueError, match="a refusal by default"):
            shown.show.intruder()
    finally:
        shown.shop.delete_intention("intruder", "web")


def test_sudden_death_of_a_replica_costs_no_request(shown: Shown) -> None:
    shown.show.sudden_death()
    assert "0 failed" in shown.take()


def test_prometheus_has_the_figures_of_each_pair(shown: Shown) -> None:
    shown.show.figures()
    text = shown.take()
    assert "shopper -> web" in text
    assert "api -> redis" in text


@pytest.mark.usefixtures("shown")
def test_the_command_line_tells_of_the_shop(fleet: DevFleet) -> None:
    assert {"shop", "shopper", "intruder"} <= {job["name"] for job in fleet.json("job", "ls")}
    status = fleet.json("job", "status", "shop")
    assert status["rollout"] == "successful"
    web = next(each for each in status["allocations"] if each["group"] == "web")
    assert "running" in fleet.outrider("alloc", "status", web["id"]).stdout
    assert fleet.outrider("exec", web["id"], "--", "sh", "-c", "cat; exit 7", text="typed").stdout == "typed"
    assert fleet.outrider("exec", "shopper", "--", "sh", "-c", "exit 7").returncode == 7
    assert "Ready to accept connections" in fleet.outrider("logs", "shop").stdout
    assert "shopper -> web" in fleet.outrider("intention", "check", "shopper", "web").stdout
    assert "rollout.successful" in fleet.outrider("events").stdout
    denied = fleet.outrider("intention", "check", "intruder", "web")
    assert (denied.returncode, "denied" in denied.stdout) == (1, True)


@pytest.mark.usefixtures("shown")
def test_the_command_line_tells_of_the_mesh(fleet: DevFleet) -> None:
    graph = fleet.json("mesh", "graph", "--over", "1s")
    edges = {(edge["source"], edge["destination"]): edge for edge in graph["edges"]}
    assert graph["silent"] == []
    assert {("shopper", "web"), ("web", "api"), ("api", "redis")} <= edges.keys()
    assert '"web" -> "api"' in fleet.outrider("mesh", "graph", "--over", "100ms", "--dot").stdout
    certificates = fleet.json("mesh", "certs")
    assert [root["active"] for root in certificates["roots"]] == [True]
    assert {leaf["service"] for leaf in certificates["leaves"]} == {"shopper", "intruder", "web", "api", "redis"}
    assert certificates["trust_domain"].endswith(".consul")


@pytest.mark.usefixtures("shown")
def test_a_gateway_lets_callers_from_outside_in_where_the_service_allows_it(fleet: DevFleet, tmp_path: Path) -> None:
    job = str(Path(examples.shop.__file__).with_name("edge.yaml"))
    missing = fleet.outrider("job", "run", job)
    assert (missing.returncode, "gateway edge: no secret 'edge-tls' in namespace default" in missing.stderr) == (
        1,
        True,
    )
    leaf = Authority("outside", "none").leaf("edge", "https://shop.example")
    pem = tmp_path / "edge.pem"
    pem.write_text(leaf.certificate_pem + leaf.key_pem)
    assert fleet.outrider("secret", "put", "edge-tls", "--file", str(pem)).returncode == 0
    run = fleet.outrider("job", "run", job)
    assert run.returncode == 0, run.stderr
    (alloc,) = fleet.json("job", "status", "edge")["allocations"]
    node = fleet.layout.address(alloc["node"])

    def ask(url: str) -> str:
        """From another host: the control namespace."""
        into = ("nsenter", f"--net={fleet.layout.control_namespace}", "--", sys.executable, "-c", _ASK, url)
        return subprocess.run(into, capture_output=True, text=True, check=False, timeout=60).stdout

    assert "svc/edge may not call service web" in ask(f"http://{node}:8480/")
    assert fleet.outrider("intention", "create", "edge", "web").returncode == 0
    eventually(lambda: '"web"' in ask(f"http://{node}:8480/"), "the shop, in the clear")
    assert '"web"' in ask(f"https://{node}:8443/")
    assert '"side":"gateway"' in fleet.outrider("alloc", "logs", alloc["id"], "sidecar").stdout
    assert fleet.outrider("mesh", "explain", "edge", "web").returncode == 0
    assert fleet.outrider("job", "stop", "edge").returncode == 0
    assert fleet.outrider("intention", "delete", "edge", "web").returncode == 0


@pytest.mark.usefixtures("shown")
def test_a_transparent_service_calls_by_name_whoever_lets_it_and_learns_of_it_while_it_runs(
    fleet: DevFleet, tmp_path: Path
) -> None:
    job = tmp_path / "walker.yaml"
    job.write_text(
        "job: walker\ngroups: {main: {services: [{name: walker, transparent: true}], "
        "tasks: {main: {command: [sleep, infinity]}}}}\n"
    )
    assert fleet.outrider("job", "run", str(job)).returncode == 0
    ask = ("exec", "walker", "--", "python3", "-c", _ASK, "http://web.mesh/")
    assert "Name or service not known" in fleet.outrider(*ask).stderr
    assert fleet.outrider("intention", "create", "walker", "web").returncode == 0
    eventually(lambda: '"web"' in fleet.outrider(*ask).stdout, "the shop, without upstreams")
    assert fleet.outrider("mesh", "explain", "walker", "web").returncode == 0
    assert fleet.outrider("intention", "delete", "walker", "web").returncode == 0
    eventually(lambda: "Name or service not known" in fleet.outrider(*ask).stderr, "the name has gone")
    assert fleet.outrider("job", "stop", "walker").returncode == 0


@pytest.mark.usefixtures("shown")
def test_the_command_line_explains_calls_by_the_first_thing_that_is_wrong(fleet: DevFleet) -> None:
    good = fleet.outrider("mesh", "explain", "web", "api")
    assert (good.returncode, good.stderr, "BAD" in good.stdout) == (0, "", False)
    assert "HTTP 200 from the workload" in good.stdout
    assert fleet.outrider("mesh", "explain", "api", "redis").returncode == 0
    for ends, why in (
        (("intruder", "web"), "denied: no intention names them"),
        (("web", "redis"), "web does not name redis under `upstreams`"),
        (("nobody", "web"), "no job of this fleet has a service nobody"),
    ):
        bad = fleet.outrider("mesh", "explain", *ends)
        assert (bad.returncode, why in bad.stderr) == (1, True), bad.stderr
    refused = json.loads(fleet.outrider("mesh", "explain", "intruder", "web", "--json").stdout)
    probe = refused["findings"][-1]
    assert (probe["part"], probe["good"]) == ("probe", False)
    assert "HTTP 403 from a sidecar: " in probe["text"]
    for words, why in (
        (("explain", "Web", "api"), "source: 'Web' is no service's name"),
        (("explain", "web", "api", "--path", "x"), "path: 'x' is none"),
        (("graph", "--over", "2h"), "over: 7200 s; from 0.1 to 60"),
        (("tap", "web", "api", "--sample", "0"), "sample: 0 %"),
        (("tap", "web", "redis"), "web does not name redis"),
        (("tap", "api", "redis"), "speaks tcp, which has no requests"),
    ):
        assert why in fleet.outrider("mesh", *words).stderr, words
