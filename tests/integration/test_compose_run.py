"""docker-compose.yml, run for real: every service but Grafana."""

import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.integration.compose_lab import Compose, compose, until

pytestmark = pytest.mark.deep
SERVICES = (
    "consul1", "consul2", "consul3", "controller1", "controller2", "broker", "n1", "n2", "n3", "prometheus",
)  # fmt: skip


@pytest.fixture(scope="module")
def fleet() -> Iterator[Compose]:
    with compose() as made:
        made("up", "--detach", "--build", *SERVICES, timeout_s=1200)
        try:
            until(lambda: set(made.health().values()) == {"healthy"}, "every service is healthy", 300)
        except AssertionError as error:
            raise AssertionError(f"{error}: {made.health()}\n{made('logs', '--tail', '25')}") from None
        yield made


def nodes(fleet: Compose, controller: str) -> dict[str, str]:
    found = json.loads(outrider(fleet, controller, "node", "ls", "--json"))
    return {state["node"]["id"]: state["status"] for state in found}


def outrider(fleet: Compose, controller: str, *words: str) -> str:
    return fleet.inside(controller, "outrider", "--address", "unix:/run/outrider/operator.sock", *words, timeout_s=240)


def asked(fleet: Compose, query: str) -> list[object]:
    url = f"http://localhost:9090/api/v1/query?query={quote(query)}"
    found: list[object] = json.loads(fleet.inside("prometheus", "wget", "-q", "-O", "-", url))["data"]["result"]
    return found


@pytest.mark.timeout(3000)
def test_the_file_gives_a_fleet_that_runs_the_shop_and_survives_its_controller(fleet: Compose) -> None:
    assert set(fleet.health()) == set(SERVICES)
    assert nodes(fleet, "controller1") == {"n1": "ready", "n2": "ready", "n3": "ready"}
    outrider(fleet, "controller1", "job", "run", "/opt/outrider/examples/shop/shop.yaml")
    running = json.loads(outrider(fleet, "controller2", "alloc", "ls", "--json"))
    assert {each["status"] for each in running} == {"running"}
    until(lambda: len(asked(fleet, "up == 1")) >= 4, "Prometheus scrapes a controller and three agents", 120)
    until(lambda: bool(asked(fleet, "outrider_agent_broker_connected == 1")), "an agent's events go to the broker", 120)
    before = {each["id"] for each in running}

    fleet("stop", "controller1")
    until(lambda: _answers(fleet, "controller2"), "the other controller leads", 60)
    until(lambda: set(nodes(fleet, "controller2").values()) == {"ready"}, "the agents found it", 60)
    after = {each["id"] for each in json.loads(outrider(fleet, "controller2", "alloc", "ls", "--json"))}
    assert after == before, "nothing was restarted for it"

    fleet("restart", "n1")  # all of its processes end: the agent starts its workloads anew
    until(lambda: nodes(fleet, "controller2")["n1"] == "ready", "the node is back", 120)

    def all_run() -> bool:
        found = json.loads(outrider(fleet, "controller2", "alloc", "ls", "--json"))
        return len(found) == len(before) and all(each["status"] == "running" and each["healthy"] for each in found)

    until(all_run, "what ran on it runs again", 180)


def _answers(fleet: Compose, controller: str) -> bool:
    try:
        return bool(nodes(fleet, controller))
    except AssertionError:
        return False
