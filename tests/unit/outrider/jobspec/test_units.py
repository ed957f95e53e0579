"""Durations, sizes and CPU, as people write them."""

from collections.abc import Callable

import pytest

from outrider.jobspec.units import cpu_millis, duration_s, size_bytes


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (duration_s, "500ms", 0.5), (duration_s, "2s", 2.0), (duration_s, "1.5m", 90.0), (duration_s, "2h", 7200.0),
        (duration_s, "1d", 86400.0), (duration_s, "0s", 0.0),
        (size_bytes, "1Ki", 1024), (size_bytes, "64Mi", 64 << 20), (size_bytes, "1.5Gi", 3 << 29),
        (size_bytes, "2Ti", 2 << 40), (size_bytes, "5K", 5000), (size_bytes, "5M", 5 * 10**6),
        (size_bytes, "5G", 5 * 10**9),
        (cpu_millis, "200m", 200), (cpu_millis, "0.5", 500), (cpu_millis, "2", 2000), (cpu_millis, "0.25", 250),
    ],
)  # fmt: skip
def test_units_are_understood(read: Callable[[str], float], text: str, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize("read", [duration_s, size_bytes, cpu_millis])
@pytest.mark.parametrize("text", ["", "-1s", "s", "1 s", "1e3", "inf", "nan", "\u0661s", "9" * 40, "1x", "0x10"])
def test_what_is_no_quantity_is_refused(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        read(text)


def test_a_unit_is_never_guessed_but_suggested() -> None:
    with pytest.raises(ValueError, match=r"the unit is missing .* did you mean 5s"):
        duration_s("5")
    with pytest.raises(ValueError, match="did you mean 64Mi"):
        size_bytes("64")
    with pytest.raises(ValueError, match="finer than a thousandth"):
        cpu_millis("0.0001")
