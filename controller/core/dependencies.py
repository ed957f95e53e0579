"""Groups that wait for services of other jobs: for which, and who is to look again when one comes to be healthy.

Owns that reading of the state; a group that waits places nothing, and nothing of it is replaced.
"""

import numpy as np

from controller.core import copies
from controller.core.groups import GroupEntry
from controller.core.state import State
from outrider.ids import ServiceName


def unmet(state: State, group: GroupEntry) -> str:
    """What copies of the group wait for, in words; "" where they may be placed."""
    missing = [service for service in group.group.depends_on if not _well_since_s(state, service) < np.inf]
    return "; ".join(_words(state, service) for service in missing)


def met_s(state: State, group: GroupEntry) -> float:
    """Since when nothing is waited for; inf where something is, 0 where nothing ever was."""
    return max((_well_since_s(state, service) for service in group.group.depends_on), default=0.0)


def health_changed(state: State, group: GroupEntry) -> None:
    """Of `group`, or a copy of it: whoever waits for its services looks again."""
    for service in group.mesh_services:
        state.live.dirty_jobs.update(state.dependents.get(service, {}))


def _well_since_s(state: State, service: ServiceName) -> float:
    """Since when it has had a healthy instance; inf where it has none."""
    since_s = np.inf
    for job in state.providers.get(service, {}):
        for key in state.current_groups(job):
            provider = state.groups[key]
            if service in provider.mesh_services:
                rows = copies.running(state, state.family_rows(provider.family))
                since_s = min(since_s, float(state.table.healthy_since_s[rows].min(initial=np.inf)))
    return since_s


def _words(state: State, service: ServiceName) -> str:
    why = "no copy of it is healthy" if service in state.providers else "nobody provides it"
    return f"waits for service {service}: {why}"
