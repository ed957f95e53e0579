"""When it is tried again, and when not any more."""
# ruff: noqa: S311 - jitter is no secret

import random

import pytest

from agent.core.restart import next_try
from outrider.model.job import RestartPolicy

POLICY = RestartPolicy(attempts=4, interval_s=60.0, delay_s=1.0, delay_max_s=5.0)


@pytest.mark.parametrize(
    ("tried_at_s", "delay_s"),
    [
        pytest.param((), 1.0, id="first"),
        pytest.param((99.0,), 2.0, id="doubles"),
        pytest.param((90.0, 99.0), 4.0, id="doubles again"),
        pytest.param((80.0, 90.0, 99.0), 5.0, id="ends at the maximum"),
        pytest.param((10.0, 20.0, 30.0, 39.0), 1.0, id="beyond the interval does not count"),
        pytest.param((500.0, 600.0, 700.0, 800.0), 1.0, id="of a clock before a reboot does not count"),
    ],
)
def test_the_delay_grows_with_the_tries_within_the_interval(tried_at_s: tuple[float, ...], delay_s: float) -> None:
    retry = next_try(POLICY, tried_at_s, 100.0, random.Random(1))
    assert retry is not None
    assert delay_s * 0.8 <= retry.at_s - 100.0 <= delay_s * 1.2
    assert retry.tried_at_s[-1] == 100.0


def test_no_more_than_the_attempts_within_the_interval() -> None:
    assert next_try(POLICY, (70.0, 80.0, 90.0, 99.0), 100.0, random.Random(1)) is None
    assert next_try(RestartPolicy(attempts=0), (), 100.0, random.Random(1)) is None


def test_neighbours_do_not_come_back_together() -> None:
    times = {next_try(POLICY, (), 100.0, random.Random(seed)).at_s for seed in range(20)}  # type: ignore[union-attr]
    assert len(times) == 20
