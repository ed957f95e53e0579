"""Durations, sizes and CPU with their units. Raises ValueError with what was expected."""

import re

_NUMBER = re.compile(r"^(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?)(?P<unit>[A-Za-z]*)$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
}  # fmt: skip


def duration_s(text: str) -> float:
    """`500ms`, `2s`, `1.5m`, `1h`, `1d` in seconds."""
    number, unit = _split(text, "a duration, for example 500ms, 2s, 1m, 1h or 1d")
    if unit not in _SECONDS:
        raise ValueError(_unit_message(text, unit, "a duration", "ms, s, m, h or d", "s"))
    return number * _SECONDS[unit]


def size_bytes(text: str) -> int:
    """`64Mi`, `1Gi`, `500K` in bytes."""
    number, unit = _split(text, "a size, for example 64Mi or 1Gi")
    if unit not in _BYTES:
        near = next((known for known in _BYTES if known.lower() == unit.removesuffix("B").lower()), "Mi")
        raise ValueError(_unit_message(text, unit, "a size", "Ki, Mi, Gi, Ti, K, M, G or T", near))
    return round(number * _BYTES[unit])


def cpu_millis(text: str) -> int:
    """`200m` or `0.5` (cores) in thousandths of a core."""
    number, unit = _split(text, "an amount of CPU, for example 200m (thousandths of a core) or 0.5")
    if unit not in {"", "m"}:
        raise ValueError(f"{text!r} is no amount of CPU: {unit!r} is no unit; write 200m or 0.2")
    millis = number if unit == "m" else number * 1000
    if millis != round(millis):
        raise ValueError(f"{text!r} is finer than a thousandth of a core")
    return round(millis)


def _split(text: str, expected: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is not {expected}")
    return float(match["number"]), match["unit"]


def _unit_message(text: str, unit: str, noun: str, units: str, near: str) -> str:
    problem = f"{unit!r} is no unit of it" if unit else "the unit is missing"
    number = text[: len(text) - len(unit)]
    return f"{text!r} is not {noun}: {problem} ({units}); did you mean {number}{near}?"
