"""What becomes of the work of a node that is away: the disconnect policy of each group, or the fleet's.

Owns when copies are lost and when they want a stand-in; never whether the node itself is down: that is `liveness`'s.
"""

from typing import Final

import numpy as np

from controller.core import table as columns
from controller.core.groups import GroupEntry, current_group
from controller.core.state import State
from outrider.model.job import surely_stopped_s
from outrider.model.node import NodeStatus

GRACE: Final = "grace"  # the timer of a node that is away


def watch(state: State, ref: int, now_s: float) -> None:
    """Wake when the next of the policies that concern the node runs out."""
    link, policy = state.live.links[ref], state.policy
    due = [link.away_s + after_s for after_s in _durations(state, ref)]
    if link.status is not NodeStatus.DOWN:
        due.append(link.away_s + policy.disconnect_grace_s)
    later = [at_s for at_s in due if at_s > now_s]
    if later:
        state.live.timers.set((GRACE, ref), min(later))


def take_due(state: State, ref: int, now_s: float) -> None:
    """Copies whose time is over are lost with the next append; those that want a stand-in are looked at."""
    away_s = state.live.links[ref].away_s
    rows = state.node_rows(ref)
    table = state.table
    for key in np.unique(table.group[rows]).tolist():
        if away_s + _lost_after_s(state, state.groups[key]) <= now_s:
            lost = table.serial[rows[table.group[rows] == key]]
            state.live.losing.update(dict.fromkeys(lost.tolist(), ref))
    state.live.stirred[ref] = None


def lose_all(state: State, ref: int) -> None:
    """The node will not be let in again: no policy waits for it."""
    state.live.losing.update(dict.fromkeys(state.table.serial[state.node_rows(ref)].tolist(), ref))


def lost(state: State) -> list[int]:
    """Serials that are lost now: their nodes did not come back meanwhile."""
    losing, state.live.losing = state.live.losing, {}
    links, table = state.live.links, state.table
    found = []
    for serial, ref in losing.items():
        row = table.row(serial)
        back = links[ref].status is NodeStatus.READY or state.nodes.nodes[ref].id in state.live.registering
        if not back and row is not None and table.status[row] == columns.LIVE:
            found.append(serial)
    return found


def _durations(state: State, ref: int) -> set[float]:
    found = set()
    for key in np.unique(state.table.group[state.node_rows(ref)]).tolist():
        group = state.groups[key]
        found.add(_lost_after_s(state, group))
        replace_after_s = current_group(state.jobs[group.job].job, group).disconnect.replace_after_s
        if replace_after_s is not None:
            found.add(replace_after_s)
    return found


def _lost_after_s(state: State, group: GroupEntry) -> float:
    chosen = current_group(state.jobs[group.job].job, group).disconnect.lost_after_s
    after_s = state.policy.disconnect_grace_s if chosen is None else chosen
    # By the version that runs: its node knows no other.
    return max(after_s, surely_stopped_s(group.group) or 0.0)
