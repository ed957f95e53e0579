"""When a copy that failed is made again, and where not: back-off, giving up, and the fleet's rate of replacements.

Owns what is remembered of failures. Volatile: after a restart it is read from the allocations that are kept.
"""

from collections.abc import Mapping

import numpy as np

from controller.core import table as columns
from controller.core.groups import GroupEntry, current_group
from controller.core.state import State
from controller.core.table import Bools, Ints
from controller.core.volatile import Backoff
from outrider.model.job import JobType, ReschedulePolicy


def begin(state: State) -> None:
    """What failed since the newest version of its job was submitted, as if it were told again."""
    table = state.table
    status, kept = table.status[: table.size], table.desired[: table.size] == columns.RUN
    ended = np.flatnonzero(kept & np.isin(status, (columns.FAILED, columns.COMPLETE)))
    for row in ended[np.argsort(table.changed_s[ended], kind="stable")].tolist():
        entry = state.jobs[state.group_of(row).job]
        at_s = float(table.changed_s[row])
        recent = not entry.stopped and at_s >= entry.versions[entry.latest].submitted_at_s
        if recent and counts_as_failure(state, row, int(table.status[row])):
            note_failure(state, row, at_s)


def counts_as_failure(state: State, row: int, status: int) -> bool:
    """Of one that was to run and ended with `status`: a service never ends well by itself, batch work does."""
    group = state.group_of(row)
    if group.type is JobType.BATCH:
        return status == columns.FAILED and attempts_of(policy_of(state, group), group) != 0
    return status in (columns.FAILED, columns.COMPLETE)


def note_failure(state: State, row: int, now_s: float) -> None:
    """The copy of `row` failed where it is: its replacement waits, longer each time, and keeps away from there."""
    group, table = state.group_of(row), state.table
    policy = policy_of(state, group)
    copies = state.live.backoff.setdefault(group.family, {})
    index, ref = int(table.index[row]), int(table.node[row])
    before = copies.get(index)
    if before is not None and now_s - before.until_s >= policy.interval_s:
        before = None  # the one before this ran well for long enough
    failures = before.failures + 1 if before is not None else 1
    delay_s = min(policy.delay_s * 2.0 ** min(failures - 1, 30), policy.delay_max_s)
    nodes = dict(before.nodes) if before is not None else {}
    nodes[ref] = now_s
    copies[index] = Backoff(failures=failures, until_s=now_s + delay_s, nodes=nodes)


def policy_of(state: State, group: GroupEntry) -> ReschedulePolicy:
    return current_group(state.jobs[group.job].job, group).reschedule


def attempts_of(policy: ReschedulePolicy, group: GroupEntry) -> int | None:
    """None: as often as it takes."""
    if policy.attempts is None and group.type is JobType.BATCH:
        return 0
    return policy.attempts


def given_up(state: State, group: GroupEntry) -> dict[int, int]:
    """By index: how often those failed that are not made again."""
    attempts = attempts_of(policy_of(state, group), group)
    if attempts is None:
        return {}
    copies = state.live.backoff.get(group.family, {})
    return {index: one.failures for index, one in copies.items() if one.failures > attempts}


def held_back(state: State, group: GroupEntry, missing: Ints, now_s: float) -> tuple[Bools, float]:
    """Which of the indices have to wait, and until when the first of them."""
    held = np.zeros(len(missing), np.bool_)
    until_s = np.inf
    copies = state.live.backoff.get(group.family)
    if copies and len(missing):
        lost_causes = given_up(state, group)
        for at, index in enumerate(missing.tolist()):
            one = copies.get(index)
            if one is not None and (index in lost_causes or one.until_s > now_s):
                held[at] = True
                until_s = min(until_s, one.until_s if index not in lost_causes else np.inf)
    return held, until_s


def nodes_to_avoid(state: State, group: GroupEntry, indices: Ints, now_s: float) -> Mapping[int, tuple[int, ...]]:
    """By index: the nodes where it failed lately, the last one first."""
    copies = state.live.backoff.get(group.family)
    if not copies or not len(indices):
        return {}
    interval_s = policy_of(state, group).interval_s
    wanted = set(indices.tolist()) & copies.keys()
    found = {}
    for index in sorted(wanted):
        recent = [(at_s, ref) for ref, at_s in copies[index].nodes.items() if now_s - at_s < interval_s and ref >= 0]
        if recent:
            found[index] = tuple(ref for _, ref in sorted(recent, reverse=True))
    return found


def admit(state: State, count: int, now_s: float) -> tuple[int, float]:
    """How many of `count` replacements may be made now, and when the next may be: the fleet's pace, all jobs together.

    A bucket that fills at the policy's rate: many losses at once must not bury the nodes that are left.
    """
    live, policy = state.live, state.policy
    filled = live.replacements_left + (now_s - live.replacements_s) * policy.replacements_per_s
    live.replacements_left, live.replacements_s = min(filled, policy.replacements_burst), now_s
    admitted = min(count, int(live.replacements_left))
    live.replacements_left -= admitted
    if admitted == count:
        return admitted, np.inf
    return admitted, now_s + max(1.0 - live.replacements_left, 0.0) / policy.replacements_per_s + 0.001
