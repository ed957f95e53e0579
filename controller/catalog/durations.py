"""Go's durations, as Consul's API takes them: "10s", "1m30s", "500ms"."""

import re

from outrider.errors import InputError

_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_s(text: str) -> float:
    """Raises InputError."""
    if text == "0":
        return 0.0
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InputError(f'invalid duration {text!r}: expected a form like "10s" or "1m30s"')
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
