"""The nodes' attributes, column by column, and which nodes fulfil a demand. Owns these caches; never decides.

Nodes with the same value of an attribute are alike to whoever asks for it: a constraint is judged once for each value,
not once for each node. What was worked out is kept until a node describes itself anew.
"""

from collections.abc import Sequence

import numpy as np

from controller.core.table import Bools, Shorts
from outrider.model.attributes import attributes, satisfied
from outrider.model.job import Constraint, Value
from outrider.model.node import Node

_KEPT_MAX = 4096  # masks of each kind; more at once are worked out again


class Column:
    """`codes`: which of `values` each node has; -1, the last place of whatever is indexed by it: it is not set."""

    def __init__(self, found: Sequence[str | None]) -> None:
        places: dict[str, int] = {}
        codes = [-1 if value is None else places.setdefault(value, len(places)) for value in found]
        self.codes: Shorts = np.array(codes, np.int32)
        self.values: tuple[str, ...] = tuple(places)

    def passing(self, constraint: Constraint) -> Bools:
        passes = [satisfied(constraint, value) for value in (*self.values, None)]
        found: Bools = np.array(passes, np.bool_)[self.codes]
        return found


class Demand(Value, frozen=True, kw_only=True):
    """What a node must be, whatever it has given away. Groups with equal demands have the same nodes to choose from."""

    constraints: tuple[Constraint, ...] = ()
    attributes: tuple[str, ...] = ()  # that must be set: copies are counted by them
    processes: bool = True
    vms: bool = False
    host_image: bool = False
    snapshots: tuple[str, ...] = ()  # that its guests start from
    kvm: bool = False
    guest_kernel: bool = False  # of the node's configuration


class Attributes:
    def __init__(self) -> None:
        self._found: list[dict[str, str]] = []
        self._columns: dict[str, Column] = {}
        self._passing: dict[Constraint, Bools] = {}
        self._suited: dict[Demand, Bools] = {}
        self._values: dict[tuple[str, Demand], Bools] = {}

    def describe(self, ref: int, node: Node) -> None:
        """`ref` is `node` from here on."""
        found = attributes(node)
        if ref == len(self._found):
            self._found.append(found)
        elif self._found[ref] == found:
            return
        else:
            self._found[ref] = found
        self.forget()

    def forget(self) -> None:
        """Something about a node changed: every mask is worked out anew."""
        self._columns, self._passing, self._suited, self._values = {}, {}, {}, {}

    def column(self, attribute: str) -> Column:
        column = self._columns.get(attribute)
        if column is None:
            column = self._columns[attribute] = Column([found.get(attribute) for found in self._found])
        return column

    def passing(self, constraint: Constraint) -> Bools:
        mask = self._passing.get(constraint)
        if mask is None:
            if len(self._passing) >= _KEPT_MAX:
                self._passing = {}
            mask = self._passing[constraint] = self.column(constraint.attribute).passing(constraint)
        return mask

    def suited(self, demand: Demand) -> Bools | None:
        """As `keep` was told; None: not worked out yet."""
        return self._suited.get(demand)

    def keep(self, demand: Demand, mask: Bools) -> None:
        if len(self._suited) >= _KEPT_MAX:
            self._suited = {}
        self._suited[demand] = mask

    def values_suited(self, attribute: str, demand: Demand) -> Bools | None:
        """As `keep_values` was told; None: not worked out yet."""
        return self._values.get((attribute, demand))

    def keep_values(self, attribute: str, demand: Demand, there: Bools) -> None:
        if len(self._values) >= _KEPT_MAX:
            self._values = {}
        self._values[attribute, demand] = there
