"""When a service's check runs, and what its outcomes mean. Runs none itself."""

import msgspec

from outrider.ids import ServiceName
from outrider.model.job import Check

# Until the first success. A workload that takes long is asked less often: never later than this share of what it took.
_EAGER_S = 0.025
_EAGER_SHARE = 0.05
_FAILURES_MIN = 2  # one after the other, before a service that passed is failing


class Probe(msgspec.Struct, kw_only=True):
    """The check of one service of one allocation. `due_s` is None while it must not run, or while one runs."""

    service: ServiceName
    check: Check
    port: int | None
    passing: bool = False
    output: str = ""
    failures: int = 0
    eager_since_s: float | None = None  # None once it succeeded
    due_s: float | None = None
    in_flight: bool = False


def begin(probe: Probe, now_s: float) -> None:
    """The workload runs, from now on: look for its first success."""
    probe.passing, probe.failures, probe.output = False, 0, "not checked yet"
    probe.eager_since_s = now_s
    probe.due_s = None if probe.in_flight else now_s


def resume(probe: Probe, now_s: float, *, passing: bool) -> None:
    """The workload ran on while the agent was away: what was true then holds until checks say otherwise."""
    begin(probe, now_s)
    if passing:
        probe.passing, probe.eager_since_s = True, None


def pause(probe: Probe, output: str) -> None:
    """The workload does not run: nothing to ask."""
    probe.passing, probe.output, probe.due_s, probe.eager_since_s = False, output, None, None


def launched(probe: Probe) -> None:
    probe.in_flight, probe.due_s = True, None


def outcome(probe: Probe, now_s: float, *, passing: bool, output: str, running: bool) -> None:
    """One came back. Passing after one success, failing after two failures in a row.

    `running`: the workload still (or again) runs; else nothing is due.
    """
    probe.in_flight = False
    if not running:
        return
    if passing:
        if not probe.passing:
            probe.output = output
        probe.passing, probe.failures, probe.eager_since_s = True, 0, None
    else:
        probe.failures += 1
        if probe.failures >= _FAILURES_MIN or not probe.passing:
            probe.passing, probe.output = False, output
    probe.due_s = now_s + _delay_s(probe, now_s)


def _delay_s(probe: Probe, now_s: float) -> float:
    if probe.eager_since_s is None:
        return probe.check.interval_s
    return min(max(_EAGER_S, _EAGER_SHARE * (now_s - probe.eager_since_s)), probe.check.interval_s)
