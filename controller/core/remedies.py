"""What would make a group fit that fits nowhere, and what a job wishes that no node can fulfil. Changes nothing."""

import itertools
from collections.abc import Iterator

import numpy as np

from controller.core.copies import running
from controller.core.groups import GroupEntry
from controller.core.near import neighbours
from controller.core.reasons import Filter, amount, counted_out, filters, shortages
from controller.core.scores import Near
from controller.core.snapshot import Hold, Snapshot
from controller.core.state import State
from controller.core.table import Bools
from outrider.model.attributes import describe
from outrider.model.job import Job, Operator

_REMEDIES_SHOWN = 5


def would_fit(state: State, group: GroupEntry) -> tuple[str, ...]:
    """What would make one more copy of the group fit; () where it does, or nothing single would."""
    snapshot = as_seen_by(state, group)
    near = neighbours(state, group, running(state, state.family_rows(group.family)))
    left = np.ones(snapshot.size, np.bool_)
    counted_out(snapshot, group, near, left)
    return () if left.any() else tuple(remedies(snapshot, group, near))


def remedies(snapshot: Snapshot, group: GroupEntry, near: Near) -> Iterator[str]:
    """Single changes that would let a node take it, the nearest first."""
    every = list(filters(snapshot, group, near, np.ones(snapshot.size, np.bool_)))
    count = len(list(shortages(snapshot, group)))
    plain = every[:-count]
    suited = np.ones(snapshot.size, np.bool_)
    for _, passed in plain:
        suited &= passed
    lifted = _lifted(plain, [passed for _, passed in every[-count:]])
    yield from itertools.islice(itertools.chain(_closest(snapshot, group, suited), lifted), _REMEDIES_SHOWN)


def _closest(snapshot: Snapshot, group: GroupEntry, suited: Bools) -> Iterator[str]:
    """Of the nodes that suit it the one that lacks least."""
    refs = np.flatnonzero(suited)
    if not len(refs):
        return
    lacking = np.zeros(len(refs))
    for _, wanted, free in shortages(snapshot, group):
        if wanted:
            lacking += np.maximum(wanted - free[refs], 0) / wanted
    ref = int(refs[int(np.argmin(lacking))])
    short = [
        f"{amount(what, wanted - int(free[ref]))} more {what}"
        for what, wanted, free in shortages(snapshot, group)
        if free[ref] < wanted
    ]
    if short:
        yield f"with {' and '.join(short)} on {snapshot.nodes.nodes[ref].id}, which lacks least"


def _lifted(plain: list[Filter], counted: list[Bools]) -> Iterator[str]:
    """For each demand: how many nodes would take it without that one."""
    for at, (name, _) in enumerate(plain):
        passing = np.logical_and.reduce([passed for other, (_, passed) in enumerate(plain) if other != at] + counted)
        if found := int(passing.sum()):
            yield f"on {found} nodes, were it not for this: {name}"


def as_seen_by(state: State, group: GroupEntry) -> Snapshot:
    """With the room gone that is held against the group."""
    holds = []
    for serial, ref in state.live.nominated.items():
        row = state.table.row(serial)
        if row is not None and state.table.node[row] < 0:
            holds.append(Hold(ref=ref, group=state.group_of(row)))
    snapshot = Snapshot(state.nodes, state.open_nodes, state.policy.placement, tuple(holds))
    snapshot.keep_held(group, 1)
    return snapshot


def hopeless_wishes(state: State, job: Job) -> Iterator[str]:
    """Warnings at a submission: attributes and values that no node has."""
    if not len(state.nodes):
        return
    columns = state.nodes.attributes
    told = set()
    for wanted in job.groups:
        affinities = (*job.affinities, *wanted.affinities)
        for constraint in (*job.constraints, *wanted.constraints, *(one.prefer for one in affinities)):
            if not columns.passing(constraint).any() and constraint.operator is not Operator.IS_NOT_SET:
                told.add(f"group {wanted.name}: no node has `{describe(constraint)}`")
            if constraint.operator is Operator.DISTINCT and not columns.column(constraint.attribute).values:
                told.add(f"group {wanted.name}: no node has {constraint.attribute}, so it fits nowhere")
        for spread in (*job.spread, *wanted.spread):
            values = columns.column(spread.attribute).values
            missing = [target.value for target in spread.targets if target.percent and target.value not in values]
            if not values:
                told.add(f"group {wanted.name}: spread over {spread.attribute}, which no node has")
            elif missing:
                told.add(f"group {wanted.name}: spread over {spread.attribute}: no node has {', '.join(missing)}")
    yield from sorted(told)
