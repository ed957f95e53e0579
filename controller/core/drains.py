"""Nodes that operators close and empty. Owns when a drain is over; which copies leave when is `moving`'s."""

from typing import Final

from controller.core.outlook import system_copies
from controller.core.records import NodeSteered, Record
from controller.core.state import State

DRAIN: Final = "drain"  # the timer of a drain's deadline


def watch(state: State, ref: int) -> None:
    """Wake at the deadline of the node's drain: what is left must go then."""
    drain = state.nodes.drains.get(ref)
    if drain is None or drain.deadline_at_s is None:
        state.live.timers.cancel((DRAIN, ref))
    else:
        state.live.timers.set((DRAIN, ref), drain.deadline_at_s)


def deadline_over(state: State, ref: int) -> None:
    state.live.stirred[ref] = None


def begun(state: State, ref: int) -> None:
    """The node was steered: its drain begins, goes on with another deadline, or ended."""
    watch(state, ref)
    state.live.stirred[ref] = None
    state.live.drains_changed = True


def left(state: State, ref: int) -> None:
    """An allocation ended on the node."""
    if ref in state.nodes.drains:
        state.live.drains_changed = True
        state.live.dirty_jobs.update(dict.fromkeys(state.system_jobs))


def ended(state: State) -> list[Record]:
    """The drains whose nodes are empty: they stay closed."""
    if not state.live.drains_changed:
        return []
    state.live.drains_changed = False
    if not state.nodes.drains:
        return []
    kept = system_copies(state)
    return [
        NodeSteered(node=state.nodes.nodes[ref].id, eligible=False)
        for ref, drain in state.nodes.drains.items()
        if state.nodes.allocations[ref] <= (kept[ref] if drain.keep_system else 0)
    ]
