"""How things look: JSON for scripts, tables for people, plain text where nobody looks. Never talks to the fleet."""

import base64
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum

import msgspec

from outrider.cron import zone
from outrider.model.job import Schedule


def plain(value: object) -> object:
    """`value` as JSON has it: all fields, defaults too, so that scripts can rely on them."""
    match value:
        case Enum():
            return value.value
        case bytes():
            return base64.b64encode(value).decode()
        case msgspec.Struct():
            return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case tuple() | list():
            return [plain(item) for item in value]
        case _:
            return value


def print_json(value: object) -> None:
    print(json.dumps(plain(value), indent=2))


def print_json_line(value: object) -> None:
    print(json.dumps(plain(value)), flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns, wide as their content: the same to a pipe and to a terminal, where colour shows states."""
    lines = [[*header], *([_one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if sys.stdout.isatty():
            cells = [f"\x1b[1m{cell}\x1b[0m" if number == 0 else _coloured(cell) for cell in cells]
        print("  ".join(cells).rstrip())


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    shown = [(name, str(value)) for name, value in fields if value not in {"", None}]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}")


def say(text: str) -> None:
    """Progress and warnings: beside what a script reads."""
    print(text, file=sys.stderr, flush=True)


def age(at_s: float) -> str:
    """How long ago, in one unit; "-" where it never was."""
    if not at_s:
        return "-"
    return _duration(max(0.0, time.time() - at_s))


def left(until_s: float) -> str:
    """How long until then, in one unit."""
    return _duration(max(0.0, until_s - time.time()))


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length_s:
            return f"{int(seconds // length_s)}{unit}"
    return f"{int(seconds)}s"


def until(at_s: float) -> str:
    """How long until then, in one unit."""
    left_s = max(0.0, at_s - time.time())
    unit, seconds = next((pair for pair in (("d", 86400), ("h", 3600), ("m", 60)) if left_s >= pair[1]), ("s", 1))
    return f"{left_s / seconds:.0f}{unit}"


def when(at_s: float, schedule: Schedule | None) -> str:
    """A time as the schedule that it is from counts: `2026-11-26 06:30:00 Europe/Berlin, in 3h`."""
    name = schedule.time_zone if schedule is not None else "UTC"
    shown = datetime.fromtimestamp(at_s, zone(name))
    return f"{shown:%Y-%m-%d %H:%M:%S} {name}, in {until(at_s)}"


def printable(text: str) -> str:
    """What a workload said, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f}Gi" if size_bytes >= 10 << 30 else f"{size_bytes >> 20}Mi"


def cores(millis: int) -> str:
    return f"{millis / 1000:g}"


_COLOURS = {
    "running": 32, "ready": 32, "healthy": 32, "successful": 32, "allow": 32, "yes": 32,
    "complete": 32, "waiting": 33,
    "pending": 33, "starting": 33, "stopping": 33, "gone": 33, "suspect": 33, "no": 33,
    "failed": 31, "lost": 31, "down": 31, "deny": 31,
}  # fmt: skip


def _coloured(cell: str) -> str:
    colour = _COLOURS.get(cell.strip())
    return cell if colour is None else f"\x1b[{colour}m{cell}\x1b[0m"


def _one_line(text: str) -> str:
    return " ".join(text.split()) if "\n" in text else text
