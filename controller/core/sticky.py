"""Where the copies of a group with sticky disks had better go: to what the ones before them left. Pure."""

import numpy as np

from controller.core.groups import GroupEntry
from controller.core.state import State
from controller.core.table import Ints


def homes(state: State, group: GroupEntry, indices: Ints) -> dict[int, int]:
    """By index: the node of the newest copy that was there, for those of `indices` that had one."""
    table, rows = state.table, state.family_rows(group.family)
    rows = rows[(table.node[rows] >= 0) & np.isin(table.index[rows], indices)]
    rows = rows[np.argsort(table.serial[rows])]
    return dict(zip(table.index[rows].tolist(), table.node[rows].tolist(), strict=True))
