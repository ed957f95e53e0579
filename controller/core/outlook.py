"""The nodes as decisions about running copies see them: which are drained, which are silent, and for how long.

Made once for a plan. Owns no state and decides nothing.
"""

from dataclasses import dataclass

import numpy as np

from controller.core import table as columns
from controller.core.state import State
from controller.core.table import Bools, Ints, Shorts, Times
from outrider.model.node import NodeStatus


@dataclass(slots=True)
class Outlook:
    """Columns by node reference."""

    troubled: Bools  # of which anything below holds
    draining: Bools
    forced: Bools  # their drain's deadline has passed
    emptied: Bools  # drained of all but copies of system jobs, which leave last
    silent: Bools  # suspect or down: nobody reaches their copies
    away_s: Times  # since when; inf: it is ready

    def on(self, what: Bools, nodes: Shorts) -> Bools:
        """Whether `what` holds of the node of each; of those without one it does not."""
        if not len(what):
            return np.zeros(len(nodes), np.bool_)
        held: Bools = what[nodes] & (nodes >= 0)
        return held


def outlook(state: State, now_s: float) -> Outlook:
    nodes, size = state.nodes, len(state.nodes)
    draining = nodes.draining[:size].copy()
    forced = np.zeros(size, np.bool_)
    for ref, drain in nodes.drains.items():
        forced[ref] = drain.deadline_at_s is not None and drain.deadline_at_s <= now_s
    emptied = np.zeros(size, np.bool_)
    if nodes.drains:
        emptied = draining & ((nodes.allocations[:size] <= system_copies(state)) | forced)
        for ref, drain in nodes.drains.items():
            emptied[ref] &= not drain.keep_system
    silent = np.zeros(size, np.bool_)
    away_s = np.full(size, np.inf)
    unready = ~state.ready_nodes
    for ref in np.flatnonzero(unready).tolist():
        link = state.live.links[ref]
        silent[ref] = link.status in (NodeStatus.SUSPECT, NodeStatus.DOWN)
        away_s[ref] = link.away_s
    troubled = unready | draining
    return Outlook(troubled=troubled, draining=draining, forced=forced, emptied=emptied, silent=silent, away_s=away_s)


def system_copies(state: State) -> Ints:
    """How many allocations of system jobs each node has."""
    counts = np.zeros(len(state.nodes), np.int64)
    for job in state.system_jobs:
        for key in state.current_groups(job):
            rows = state.family_rows(state.groups[key].family)
            refs = state.table.node[rows[state.table.status[rows] == columns.LIVE]]
            counts += np.bincount(refs[refs >= 0], minlength=len(counts))
    return counts
