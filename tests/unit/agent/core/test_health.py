"""When a check runs, and what its outcomes mean."""

import pytest

from agent.core import health
from agent.core.health import Probe
from outrider.ids import ServiceName
from outrider.model.job import Check, CheckKind


@pytest.fixture
def probe() -> Probe:
    made = Probe(service=ServiceName("web"), check=Check(kind=CheckKind.TCP, interval_s=5.0), port=8080)
    health.begin(made, 100.0)
    return made


def ran(probe: Probe, now_s: float, *, passing: bool, running: bool = True) -> None:
    health.launched(probe)
    health.outcome(probe, now_s, passing=passing, output="said", running=running)


def test_until_the_first_success_it_runs_every_25_ms(probe: Probe) -> None:
    assert probe.due_s == 100.0
    ran(probe, 100.0, passing=False)
    assert probe.due_s == pytest.approx(100.025)
    ran(probe, 100.3, passing=False)
    assert probe.due_s == pytest.approx(100.325)


def test_what_takes_long_is_asked_less_often(probe: Probe) -> None:
    ran(probe, 110.0, passing=False)
    assert probe.due_s == pytest.approx(110.5)
    ran(probe, 1000.0, passing=False)
    assert probe.due_s == pytest.approx(1005.0)


def test_one_success_passes_and_two_failures_in_a_row_fail(probe: Probe) -> None:
    ran(probe, 100.0, passing=True)
    assert probe.passing
    assert probe.due_s == 105.0
    for passing, expected in ((False, True), (True, True), (False, True), (False, False), (True, True)):
        ran(probe, 105.0, passing=passing)
        assert probe.passing is expected


def test_after_a_first_success_failures_do_not_bring_back_the_haste(probe: Probe) -> None:
    ran(probe, 100.0, passing=True)
    ran(probe, 105.0, passing=False)
    ran(probe, 110.0, passing=False)
    assert probe.due_s == 115.0


def test_a_restarted_workload_is_looked_at_in_haste_again(probe: Probe) -> None:
    ran(probe, 100.0, passing=True)
    health.pause(probe, "it exited")
    assert (probe.passing, probe.due_s, probe.output) == (False, None, "it exited")
    health.begin(probe, 200.0)
    ran(probe, 200.0, passing=False)
    assert probe.due_s == pytest.approx(200.025)


def test_an_outcome_that_comes_when_nothing_runs_means_nothing(probe: Probe) -> None:
    health.launched(probe)
    health.pause(probe, "it exited")
    health.outcome(probe, 101.0, passing=True, output="late", running=False)
    assert (probe.passing, probe.due_s) == (False, None)


def test_one_that_is_under_way_is_not_run_twice(probe: Probe) -> None:
    health.launched(probe)
    health.begin(probe, 101.0)
    assert probe.due_s is None
    health.outcome(probe, 101.5, passing=False, output="of the former workload", running=True)
    assert probe.due_s is not None


def test_what_passed_before_the_agent_restarted_passes_until_it_fails_twice(probe: Probe) -> None:
    health.resume(probe, 300.0, passing=True)
    assert probe.passing
    ran(probe, 300.0, passing=False)
    assert probe.passing
    ran(probe, 305.0, passing=False)
    assert not probe.passing
