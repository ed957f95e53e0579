"""How often agents say that they are there, and how long silence is no sign. Owns both numbers; never judges a node.

Heartbeats stretch with the fleet, slower than it grows, so that one core can take them: up to 500 nodes the fastest
there is, at 1,000 every 0.5 s, at 5,000 every 1.5 s. Silence is worth noticing after the same number of heartbeats.
"""

import numpy as np

from controller.core.state import State

_STRETCH = 0.7
_WELCOMING = 3.0  # while so many of a large fleet are to come back that nothing is decided: room to welcome them
_SHRINK = 0.9  # of the silence, with each look: agents learn of a faster pace with their next heartbeat


def silence_s(state: State) -> float:
    """How long nothing is heard of a node before it is suspect."""
    return max(state.live.silence_s, state.policy.suspect_after_s)


def heartbeat_interval_s(state: State) -> float:
    """What agents are told, with each answer to a heartbeat."""
    return max(state.live.heartbeat_interval_s, state.policy.heartbeat_interval_s)


def take(state: State) -> None:
    """The pace that fits as many nodes as are there or may come back at any moment.

    The first of a fleet that returns to a controller which has just started would else beat as if they were alone, and
    keep it from welcoming the others. A large one beats slower still while more than the brake's share is away.
    """
    live, policy, known = state.live, state.policy, len(state.nodes)
    awaited = known - int(live.is_down[:known].sum())
    stretch = max(1.0, awaited / policy.fastest_nodes_max) ** _STRETCH
    if stretch > 1.0 and np.isfinite(live.heartbeat_s[:known]).sum() < (1 - policy.brake_share) * awaited:
        stretch *= _WELCOMING
    live.heartbeat_interval_s = policy.heartbeat_interval_s * stretch
    wanted_s = live.heartbeat_interval_s * policy.suspect_after_s / policy.heartbeat_interval_s
    live.silence_s = max(wanted_s, live.silence_s * _SHRINK)
