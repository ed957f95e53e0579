"""Prometheus rules by promtool, and every dashboard's query on a fleet that runs the shop."""

import importlib.util
import json
import subprocess
import urllib.parse
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from examples.shop.fleet import ShopFleet
from examples.shop.show import Show
from outrider.cli.address import Address
from outrider.cli.client import Fleet, open_channel
from outrider.cli.dev.layout import CONTROL_ADDRESS, PROMETHEUS_PORT
from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host
DEPLOY = Path(__file__).parents[2] / "deploy"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", DEPLOY / "grafana/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rules_are_good_and_fire_when_they_should() -> None:
    for words in (("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")):
        done = subprocess.run(
            ["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_are_what_their_source_makes() -> None:
    made = generator()
    for name in made.DASHBOARDS:
        assert (DEPLOY / f"grafana/{name}.json").read_text() == made.dashboard(name), "run deploy/grafana/generate.py"


def test_every_panels_query_has_data_on_a_running_fleet(fleet: DevFleet) -> None:
    address = Address(target=fleet.address)
    with open_channel(address) as channel:
        show = Show(ShopFleet(fleet.layout, Fleet(address, channel)), Console(quiet=True), wait_s=8.0)
        show.start_jobs()
        show.balance()
        queries = {
            (name, panel.title): panel.query.replace('=~"$node"', '=~".+"').replace('=~"$job"', '=~".+"')
            for name, panels in generator().DASHBOARDS.items()
            for panel in panels
        }
        empty = set(queries)

        def all_answered() -> bool:
            empty.difference_update({key for key in set(empty) if _has_data(fleet, queries[key])})
            return not empty

        try:
            eventually(all_answered, "every query has data")
        except AssertionError:
            raise AssertionError(f"no data for {sorted(empty)}") from None


def _has_data(fleet: DevFleet, query: str) -> bool:
    url = f"http://{CONTROL_ADDRESS}:{PROMETHEUS_PORT}/api/v1/query?query={urllib.parse.quote(query)}"
    program = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=5).read().decode())"
    namespace = f"--net={fleet.layout.control_namespace}"
    done = subprocess.run(
        ["nsenter", namespace, "python3", "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    return done.returncode == 0 and bool(json.loads(done.stdout)["data"]["result"])
