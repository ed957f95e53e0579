"""Cron lines fire when Debian's cron would, and a bad one is said to be."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from outrider.cron import next_launch_s

BERLIN = ZoneInfo("Europe/Berlin")


def at(*parts: int, zone: object = UTC) -> float:
    return datetime(*parts, tzinfo=zone).timestamp()  # type: ignore[arg-type, misc]


def test_the_next_is_after_the_given_time_never_at_it() -> None:
    assert next_launch_s("*/5 * * * *", "UTC", at(2026, 1, 1, 12, 5)) == at(2026, 1, 1, 12, 10)
    assert next_launch_s("*/5 * * * *", "UTC", at(2026, 1, 1, 12, 4, 59)) == at(2026, 1, 1, 12, 5)


def test_a_line_is_read_in_its_time_zone() -> None:
    assert next_launch_s("30 6 * * MON-FRI", "Europe/Berlin", at(2026, 7, 4)) == at(2026, 7, 6, 4, 30)


def test_six_fields_begin_with_seconds() -> None:
    assert next_launch_s("*/10 * * * * *", "UTC", at(2026, 1, 1, 0, 0, 3)) == at(2026, 1, 1, 0, 0, 10)


def test_what_falls_into_the_gap_of_spring_runs_at_its_end() -> None:
    assert next_launch_s("30 2 * * *", "Europe/Berlin", at(2026, 3, 28, 12)) == at(2026, 3, 29, 1, 0)


def test_what_names_an_hour_that_autumn_has_twice_runs_once() -> None:
    first = next_launch_s("30 2 * * *", "Europe/Berlin", at(2026, 10, 24, 12))
    assert first == at(2026, 10, 25, 0, 30)
    assert next_launch_s("30 2 * * *", "Europe/Berlin", first) == at(2026, 10, 26, 1, 30)


def test_a_leap_day_is_waited_for() -> None:
    assert next_launch_s("0 0 29 2 *", "UTC", at(2026, 3, 1)) == at(2028, 2, 29)


@pytest.mark.parametrize("line", ["0 0 30 2 *", "0 0 31 2,4,6 *"])
def test_a_line_that_never_fires_is_said_to(line: str) -> None:
    with pytest.raises(ValueError, match="never fires: none of its months has that day"):
        next_launch_s(line, "UTC", 0.0)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("every day", "wrong number of fields; expected minute hour day month weekday"),
        ("61 * * * *", "bad minute"),
        ("* * 0 * *", "bad day-of-month"),
        ("*/0 * * * *", "bad minute"),
        ("", "wrong number of fields"),
    ],
)
def test_a_bad_line_says_which_field(line: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        next_launch_s(line, "UTC", 0.0)


@pytest.mark.parametrize("name", ["Mars/Base", "", "/etc/passwd", "../etc/passwd"])
def test_an_unknown_zone_is_said_to_be(name: str) -> None:
    with pytest.raises(ValueError, match="is no time zone; for example Europe/Berlin"):
        next_launch_s("* * * * *", name, 0.0)
