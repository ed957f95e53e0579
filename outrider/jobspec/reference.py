"""docs/JOB-KEYS.md, from reading a file with every key: `python -m outrider.jobspec.reference > docs/JOB-KEYS.md`.

What is shown is what the reader looked for: no list of keys is kept beside it.
"""

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path as FilePath
from typing import Any

import yaml

from outrider.jobspec.document import parse
from outrider.jobspec.fields import Asked, Faults, Path
from outrider.jobspec.reader import job_of

_HEAD = """\
# Every key of a job file

Made by `python -m outrider.jobspec.reference` from the reader itself; [JOBS.md](JOBS.md) says what they mean. `NAME` is
a name of your own, `[]` each item of a list. Without a default, absence means nothing, or what JOBS.md says.
"""
# Every mapping that a job file can have, and of each a key that is there or not. Its values mean nothing.
_WHOLE = """
placement: pack
schedule: {cron: x}
parameters: {payload: x}
affinities: [{weight: 1}]
spread: [{weight: 1}]
groups:
  NAME:
    count: 1
    update: {canary: 1, progress_deadline: 1s}
    restart: {attempts: 1}
    reschedule: {attempts: 1}
    disconnect: {lost_after: 1s, replace_after: 1s, stop_after: 1s}
    scaling: {min: 1, target: {requests: 1, concurrency: 1, cpu: 1%}}
    affinities: [{weight: 1}]
    spread: [{weight: 1}]
    network:
      bandwidth: 1K
      ports: {NAME: {static: 1, to: 1}}
      external: {NAME: {hosts: [x], ports: [{port: 1, to: 1}], tls: {ca: x}}}
    services:
      - name: x
        check: {http: x, interval: 1s}
        gateway: [{port: x, routes: [{to: x}], tls: {secret: x}}]
        upstreams: [{service: x, port: 1}]
        traffic:
          timeout: 1s
          routes: [{path: x, headers: {NAME: {exact: x}}, query: {NAME: {exact: x}}, retries: {attempts: 1}}]
          retries: {attempts: 1}
          sticky: {cookie: x}
          limits: {requests: 1}
          outliers: {errors: 1}
          mirror: {to: x}
          fault: {abort: 1}
          rate: {requests: 1}
    tasks:
      NAME:
        user: 1
        image: {disk: x, sha256: {disk: x}}
        cloud_init: {user: x}
        resources: {cpu: 1, cpu_max: 1, devices: {NAME: 1}, ulimits: {NAME: 1}, hugepages: {NAME: 2Mi}}
        secrets: {NAME: {env: x, version: 1}}
        volumes: {NAME: {volume: x}}
        artifacts: {NAME: {source: x}}
        templates: {NAME: {content: x}}
      OTHER:
        image: {oci: x, pull: always}
"""
_UNITS = {
    "duration_s": "duration", "size_bytes": "size", "cpu_millis": "CPU", "_percent": "percentage", "_number": "number",
    "_overlap": "`forbid` or `allow`", "_inner_number": "number or `image`",
}  # fmt: skip
_OPENS = {"http", "cpu", "oci"}  # without one of these the reader looks no further
_OWN = {"NAME"}

_Pattern = tuple[str, ...]


def reference() -> str:
    whole = yaml.safe_load(_WHOLE)
    found, required = _asked(whole)
    bare, _ = _asked(_pruned(whole))
    bare[()] = _asked({"groups": {}})[0][()]  # a schedule makes another type the default
    lines = [_HEAD]
    for path in sorted(found, key=lambda path: (len(path), path)):
        keys = [key for key in found[path] if key not in _OWN]
        if not keys:
            continue
        lines += [f"## {_title(path)}", "", "| key | value | default |", "|---|---|---|"]
        for key in keys:
            asked = bare.get(path, {}).get(key, Asked())
            kind = found[path][key].kind or asked.kind
            inner = sorted(other for other in found if other[: len(path) + 1] == (*path, key))
            where = f"{kind}, or {_inside(inner)}" if kind and inner else kind or _inside(inner) or "see JOBS.md"
            default = "required" if (*path, key) in required else _default(asked)
            lines.append(f"| `{key}` | {_UNITS.get(where, where)} | {default} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _asked(document: Mapping[str, Any]) -> tuple[dict[_Pattern, dict[str, Asked]], set[_Pattern]]:
    """What the reader looked for, by where, and what it must find; the items of a list are one."""
    faults = Faults()
    job_of(parse(yaml.safe_dump(document).encode()), FilePath(), faults)
    found: dict[_Pattern, dict[str, Asked]] = {}
    for path, keys in faults.asked.items():
        known = found.setdefault(_pattern(path), {})
        known.update({key: asked for key, asked in keys.items() if asked.kind or key not in known})
    return found, {_pattern(path) for path in faults.required}


def _pattern(path: Path) -> _Pattern:
    return tuple("[]" if isinstance(part, int) else "NAME" if part == "OTHER" else part for part in path)


def _pruned(value: Any) -> Any:
    """The same mappings, and in them what opens others alone: what is not there gets its default."""
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if isinstance(inner, dict | list) or key in _OPENS}
    if isinstance(value, list):
        return [_pruned(inner) for inner in value]
    return value


def _title(path: _Pattern) -> str:
    return f"`{'.'.join(path)}`" if path else "The file"


def _inside(inner: list[_Pattern]) -> str:
    return f"see `{'.'.join(inner[0])}`" if inner else ""


def _default(asked: Asked) -> str:
    if not asked.kind or asked.default is None or asked.default in {"", ()}:
        return ""
    match asked.default:
        case bool():
            return "`forbid`" if asked.kind == "_overlap" else f"`{str(asked.default).lower()}`"
        case StrEnum():
            return f"`{asked.default}`"
        case int() | float() as number:
            return f"`{_amount(asked.kind, number)}`"
        case other:
            return f"`{other}`"


def _amount(kind: str, number: float) -> str:
    if kind == "duration_s":
        return f"{number:g}s"
    if kind == "size_bytes":
        return f"{int(number) >> 20}Mi" if number and int(number) % (1 << 20) == 0 else f"{number:g}"
    return f"{number:g}m" if kind == "cpu_millis" else f"{number:g}"


if __name__ == "__main__":
    sys.stdout.write(reference())
