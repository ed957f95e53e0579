"""What makes a wish about nodes impossible: constraints, affinities and spread of a job or a group. Pure.

Owns limits and syntax. Never judges whether any node of the fleet fulfils it: that is the scheduler's.
"""

import difflib
from collections import Counter
from collections.abc import Iterator

from outrider.model.attributes import COMPARISONS, NAMES, is_known, members, number, ranges
from outrider.model.job import Affinity, Constraint, Group, Job, Operator, Spread
from outrider.model.patterns import fault

LIST_MAX = 64
_TEXT_CHARS_MAX = 1000
_VALUELESS = frozenset({Operator.IS_SET, Operator.IS_NOT_SET})

Path = tuple[str | int, ...]
Wrong = tuple[Path, str]


def wrong_wishes(owner: Job | Group) -> Iterator[Wrong]:
    """Where in `owner`, and what is wrong there."""
    for key in ("constraints", "affinities", "spread"):
        count = len(getattr(owner, key))
        if count > LIST_MAX:
            yield (key,), f"{count} of them; at most {LIST_MAX}"
    for at, constraint in enumerate(owner.constraints):
        yield from _constraint(("constraints", at), constraint)
    for at, affinity in enumerate(owner.affinities):
        yield from _affinity(("affinities", at), affinity)
    for at, spread in enumerate(owner.spread):
        yield from _spread(("spread", at), spread)
    repeated = Counter(spread.attribute for spread in owner.spread)
    for attribute, count in repeated.items():
        if count > 1:
            yield ("spread",), f"{attribute} stands here {count} times"


def _attribute(path: Path, attribute: str) -> Iterator[Wrong]:
    if not is_known(attribute):
        near = difflib.get_close_matches(attribute, NAMES, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
        yield path, f"no node has an attribute {attribute[:80]!r}; {meant} (or meta.NAME, runtime.NAME, device.NAME)"


def _constraint(path: Path, constraint: Constraint) -> Iterator[Wrong]:
    yield from _attribute(path, constraint.attribute)
    how, value = constraint.operator, constraint.value
    if len(value) > _TEXT_CHARS_MAX or "\0" in value:
        yield path, f"holds a NUL, or more than {_TEXT_CHARS_MAX} characters"
    elif how in _VALUELESS:
        if value:
            yield path, f"{how} takes no value"
    elif not value:
        yield path, f"{how} needs a value"
    elif how in COMPARISONS and number(value) is None:
        yield path, f"{value[:80]!r} is no number; for example 8, 1.5 or 64Gi"
    elif how is Operator.VERSION and ranges(value) is None:
        yield path, f"{value[:80]!r} is no range of versions; for example `>= 5.10, < 7` or `~> 6.1`"
    elif how is Operator.MATCHES:
        yield from _pattern(path, value)
    elif how in {Operator.CONTAINS, Operator.CONTAINS_ANY} and not members(value):
        yield path, f"{value[:80]!r} lists nothing; separate words by commas"
    elif how is Operator.DISTINCT and not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= 1_000_000):
        yield path, f"at most {value[:80]!r}: expected a whole number from 1 on"


def _pattern(path: Path, pattern: str) -> Iterator[Wrong]:
    if wrong := fault(pattern):
        yield path, f"{pattern[:80]!r} is no regular expression (RE2): {wrong}"


def _affinity(path: Path, affinity: Affinity) -> Iterator[Wrong]:
    yield from _constraint((*path, "prefer"), affinity.prefer)
    if affinity.prefer.operator is Operator.DISTINCT:
        yield (*path, "prefer"), "distinct is a constraint; copies are kept apart by `spread` where it is only a wish"
    if not -100 <= affinity.weight <= 100 or affinity.weight == 0:
        yield (*path, "weight"), f"{affinity.weight} is not within -100 and 100, and not 0"


def _spread(path: Path, spread: Spread) -> Iterator[Wrong]:
    yield from _attribute((*path, "attribute"), spread.attribute)
    if not 1 <= spread.weight <= 100:
        yield (*path, "weight"), f"{spread.weight} is not within 1 and 100"
    total = sum(target.percent for target in spread.targets)
    for target in spread.targets:
        if not 0 <= target.percent <= 100:
            yield (*path, "targets", target.value), f"{target.percent} is not within 0 and 100 percent"
    if len(spread.targets) > LIST_MAX:
        yield (*path, "targets"), f"{len(spread.targets)} of them; at most {LIST_MAX}"
    if total > 100:
        yield (*path, "targets"), f"impossible: {total} percent in all; at most 100"
    values = [target.value for target in spread.targets]
    if len(set(values)) < len(values):
        yield (*path, "targets"), "a value stands here twice"
