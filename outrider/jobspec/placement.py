"""`constraints:`, `affinities:` and `spread:` of a job or a group -> values. A constraint is one line of text."""

import re

from outrider.jobspec.document import Mapping, Node
from outrider.jobspec.fields import Faults, Fields, Path, listed, text_of
from outrider.model.attributes import HOST
from outrider.model.job import Affinity, Constraint, Operator, Spread, SpreadTarget

_DISTINCT = re.compile(r"^distinct\s+(?P<attribute>\S+)(\s+at most\s+(?P<most>\S+))?$")
_LINE = re.compile(
    r"^(?P<attribute>[A-Za-z0-9_.-]+)\s*"
    r"(?P<operator>!=|<=|>=|=|<|>|matches\b|version\b|contains\s+any\b|contains\b|is\s+set$|is\s+not\s+set$)"
    r"\s*(?P<value>.*)$"
)
_EXAMPLES = (
    "`meta.rack = r1`, `!=`, `<`, `<=`, `>`, `>=`, `node.kernel version >= 5.10`, `meta.zone matches ^eu-`, "
    "`meta.tags contains ssd,fast`, `contains any`, `is set`, `is not set`, `distinct host` or "
    "`distinct meta.rack at most 2`"
)
_AFFINITY_KEYS = ("prefer", "weight")
_SPREAD_KEYS = ("attribute", "weight", "targets")


def read_constraints(owner: Fields, faults: Faults) -> tuple[Constraint, ...]:
    node = owner.node("constraints")
    items = listed(node, (*owner.path, "constraints"), faults) if node is not None else ()
    found = (_constraint(item, path, faults) for path, item in items)
    return tuple(constraint for constraint in found if constraint is not None)


def read_affinities(owner: Fields, faults: Faults) -> tuple[Affinity, ...]:
    node = owner.node("affinities")
    items = listed(node, (*owner.path, "affinities"), faults) if node is not None else ()
    found = (_affinity(item, path, faults) for path, item in items)
    return tuple(affinity for affinity in found if affinity is not None)


def read_spread(owner: Fields, faults: Faults) -> tuple[Spread, ...]:
    node = owner.node("spread")
    items = listed(node, (*owner.path, "spread"), faults) if node is not None else ()
    return tuple(_spread(item, path, faults) for path, item in items)


def _constraint(node: Node, path: Path, faults: Faults) -> Constraint | None:
    text = text_of(node, path, faults)
    if text is None:
        return None
    if distinct := _DISTINCT.match(text.strip()):
        attribute = HOST if distinct["attribute"] == "host" else distinct["attribute"]
        found = Constraint(attribute=attribute, operator=Operator.DISTINCT, value=distinct["most"] or "1")
    elif line := _LINE.match(text.strip()):
        how = Operator(" ".join(line["operator"].split()))
        found = Constraint(attribute=line["attribute"], operator=how, value=line["value"].strip())
    else:
        faults.add(path, f"{text[:80]!r} is no constraint; expected {_EXAMPLES}")
        return None
    return found


def _affinity(node: Node, path: Path, faults: Faults) -> Affinity | None:
    fields = Fields(node, path, faults, _AFFINITY_KEYS)
    prefer = fields.required("prefer", "meta.disk = ssd")
    constraint = _constraint(prefer, (*path, "prefer"), faults) if prefer is not None else None
    weight = fields.integer("weight", 50)
    return Affinity(prefer=constraint, weight=weight) if constraint is not None else None


def _spread(node: Node, path: Path, faults: Faults) -> Spread:
    fields = Fields(node, path, faults, _SPREAD_KEYS)
    fields.required("attribute", "meta.zone")
    attribute = fields.text("attribute", "")
    return Spread(attribute=attribute, weight=fields.integer("weight", 100), targets=_targets(fields, faults))


def _targets(spread: Fields, faults: Faults) -> tuple[SpreadTarget, ...]:
    node = spread.node("targets")
    if node is None:
        return ()
    path = (*spread.path, "targets")
    values = [key.text for key, _ in node.entries] if isinstance(node, Mapping) else []
    shares = Fields(node, path, faults, values)
    return tuple(SpreadTarget(value=value, percent=shares.integer(value, 0)) for value in dict.fromkeys(values))
