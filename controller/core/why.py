"""Why an allocation is where it is, or is nowhere: the scheduler's filters and scores, asked again. Changes nothing.

Of a placed one the answer is what the scheduler would say now, if it had to place it again.
"""

from collections.abc import Iterator

import numpy as np

from controller.core import table as columns
from controller.core import views
from controller.core.copies import running
from controller.core.groups import GroupEntry
from controller.core.near import neighbours
from controller.core.reasons import counted_out
from controller.core.remedies import as_seen_by, remedies
from controller.core.scores import Near, Scores
from controller.core.snapshot import Snapshot
from controller.core.state import State
from outrider.ids import AllocId
from outrider.model.fleet import Explanation, FilteredNodes, NodeScore

_BEST_SHOWN = 5


def explanation(state: State, alloc: AllocId) -> Explanation | None:
    """None where there is no such allocation."""
    serial = state.serial(alloc)
    row = state.table.row(serial) if serial is not None else None
    told = views.allocation(state, alloc)
    if row is None or told is None:
        return None
    group = state.group_of(row)
    snapshot = as_seen_by(state, group)
    rows = running(state, state.family_rows(group.family))
    near = neighbours(state, group, rows[rows != row])
    ref = int(state.table.node[row])
    if ref >= 0 and state.table.status[row] == columns.LIVE:
        snapshot.give_back(ref, group, state.ports.get(int(state.table.serial[row]), ()))
    left = np.ones(snapshot.size, np.bool_)
    out = counted_out(snapshot, group, near, left)
    return Explanation(
        allocation=told,
        nodes=snapshot.size,
        filtered=tuple(FilteredNodes(reason=reason, nodes=count) for reason, count in out),
        best=tuple(_best(snapshot, group, near)),
        remedies=() if left.any() else tuple(remedies(snapshot, group, near)),
    )


def _best(snapshot: Snapshot, group: GroupEntry, near: Near) -> Iterator[NodeScore]:
    scores = Scores(snapshot, group, near)
    total = scores.first()
    for balance in scores.balances:
        total = total + balance.terms()[balance.codes]
    for limit in scores.limits:
        total = np.where(limit.open()[limit.codes], total, -np.inf)
    parts = scores.parts()
    order = np.argsort(-total, kind="stable")[:_BEST_SHOWN].tolist()
    for ref in order:
        if total[ref] > -np.inf:
            yield NodeScore(
                node=snapshot.nodes.nodes[ref].id,
                score=float(total[ref]),
                parts={name: float(part[ref]) for name, part in parts.items()},
            )
