"""Where copies of a group and of its job are. Owns the counting; decides nothing."""

from collections.abc import Iterable

import numpy as np

from controller.core.copies import running
from controller.core.groups import GroupEntry
from controller.core.scores import Near
from controller.core.state import State
from controller.core.table import Ints


def neighbours(state: State, group: GroupEntry, rows: Ints, given: Iterable[Ints] = ()) -> Near:
    """`rows`: the group's copies that count. `given`: nodes that other groups of the job get in the same plan."""
    size = len(state.nodes)
    there = state.table.node[rows]
    of_group = np.bincount(there[there >= 0], minlength=size)
    if not any(distinct.whole_job for distinct in group.distinct):
        return Near(of_group)
    of_job = of_group.copy()
    for other in state.current_groups(group.job):
        family = state.groups[other].family
        if family != group.family:
            there = state.table.node[running(state, state.family_rows(family))]
            of_job += np.bincount(there[there >= 0], minlength=size)
    for nodes in given:
        of_job += np.bincount(nodes, minlength=size)
    return Near(of_group, of_job)
