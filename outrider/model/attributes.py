"""The attributes of a node: the names under which jobs speak of it, and how a constraint reads one.

Owns names, values and the meaning of operators. Knows nothing of copies: `distinct` is the scheduler's.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from outrider.model.job import Constraint, Operator
from outrider.model.node import Node, countable
from outrider.model.patterns import found as pattern_found

HOST = "node.id"  # distinct in this one: one copy on a node
POOL = "node.pool"

_FIXED: Mapping[str, Callable[[Node], str]] = {
    HOST: lambda node: node.id,
    POOL: lambda node: node.fingerprint.pool,
    "node.address": lambda node: node.address,
    "node.version": lambda node: node.version,
    "node.kernel": lambda node: node.fingerprint.kernel,
    "node.architecture": lambda node: node.fingerprint.architecture,
    "node.cgroup": lambda node: node.fingerprint.cgroup,
    "node.kvm": lambda node: "works" if node.fingerprint.kvm == "works" else "",
    "node.cores": lambda node: f"{node.fingerprint.cpu_millis / 1000:g}",
    "node.memory": lambda node: str(node.fingerprint.memory_bytes),
    "node.disk": lambda node: str(node.fingerprint.disk_bytes),
}
NAMES = tuple(_FIXED)
PREFIXES = ("meta.", "runtime.", "device.")

COMPARISONS = frozenset({Operator.LESS, Operator.LESS_EQUAL, Operator.GREATER, Operator.GREATER_EQUAL})
_ORDER: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBER = re.compile(r"^(?P<number>-?\d{1,18}(\.\d{1,9})?)(?P<unit>|[KMGT]i?)$")
_UNITS = {"": 1, **{unit: 1000**power for power, unit in enumerate("KMGT", 1)}}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}
_VERSION = re.compile(r"^v?(\d{1,9}(?:\.\d{1,9})*)")
_RANGE = re.compile(r"^(?P<how>=|!=|<=|>=|<|>|~>)?\s*(?P<version>v?\d{1,9}(\.\d{1,9})*)$")
_Version = tuple[int, ...]


def is_known(attribute: str) -> bool:
    """Whether a node could have it. What is in `meta.` only its operators know."""
    return attribute in _FIXED or any(
        attribute.startswith(prefix) and len(attribute) > len(prefix) for prefix in PREFIXES
    )


def attributes(node: Node) -> dict[str, str]:
    """All that are set on `node`."""
    found = node.fingerprint
    every = {name: read(node) for name, read in _FIXED.items()}
    every |= {f"meta.{name}": value for name, value in found.meta.items()}
    every |= {f"runtime.{name}": version for name, version in found.runtimes.items()}
    every |= {f"device.{name}": str(count) for name, count in countable(found).items()}
    return {name: value for name, value in every.items() if value}


def satisfied(constraint: Constraint, value: str | None) -> bool:
    """Whether a node passes whose attribute is `value`; None: it is not set, and only `is not set` and != pass."""
    if value is None:
        return constraint.operator in {Operator.IS_NOT_SET, Operator.NOT_EQUAL}
    return _PASSES[constraint.operator](value, constraint.value)


def number(text: str) -> float | None:
    """`8`, `1.5`, `64Mi`; None for what is none."""
    match = _NUMBER.match(text.strip())
    return float(match["number"]) * _UNITS[match["unit"]] if match else None


def members(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def ranges(text: str) -> tuple[tuple[str, _Version], ...] | None:
    """`>= 5.10, < 7` as its parts; None where it is none."""
    parts = [_RANGE.match(part.strip()) for part in text.split(",")]
    if not all(parts):
        return None
    return tuple((part["how"] or "=", _version(part["version"]) or ()) for part in parts if part)


def in_range(text: str, value: str) -> bool:
    """Only the leading numbers of `value` count: 6.1.0-56-cloud is 6.1.0."""
    found, wanted = _version(value), ranges(text)
    return found is not None and wanted is not None and all(_within(how, found, other) for how, other in wanted)


def describe(constraint: Constraint) -> str:
    """As the job file writes it."""
    if constraint.operator is Operator.DISTINCT:
        if constraint.attribute == HOST:
            return "distinct host"
        most = f" at most {constraint.value}" if constraint.value != "1" else ""
        return f"distinct {constraint.attribute}{most}"
    return f"{constraint.attribute} {constraint.operator} {constraint.value}".rstrip()


def _version(text: str) -> _Version | None:
    match = _VERSION.match(text.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else None


def _within(how: str, found: _Version, wanted: _Version) -> bool:
    size = max(len(found), len(wanted))
    left, right = (version + (0,) * (size - len(version)) for version in (found, wanted))
    if how == "~>":  # ~> 1.2: from 1.2 on, below 2
        same = max(1, len(wanted) - 1)
        return left >= right and left[:same] == right[:same]
    return bool(_ORDER[how](left, right))


def _compares(how: Operator) -> Callable[[str, str], bool]:
    def passes(value: str, wanted: str) -> bool:
        left, right = number(value), number(wanted)
        return left is not None and right is not None and bool(_ORDER[how](left, right))

    return passes


_PASSES: Mapping[Operator, Callable[[str, str], bool]] = {
    Operator.EQUAL: operator.eq,
    Operator.NOT_EQUAL: operator.ne,
    **{how: _compares(how) for how in COMPARISONS},
    Operator.MATCHES: lambda value, pattern: pattern_found(pattern, value),
    Operator.VERSION: lambda value, wanted: in_range(wanted, value),
    Operator.CONTAINS: lambda value, wanted: members(wanted) <= members(value),
    Operator.CONTAINS_ANY: lambda value, wanted: bool(members(wanted) & members(value)),
    Operator.IS_SET: lambda _value, _wanted: True,
    Operator.IS_NOT_SET: lambda _value, _wanted: False,
    Operator.DISTINCT: lambda _value, _wanted: True,
}
