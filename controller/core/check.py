"""Lints a plan before it is written down. Owns the invariants; never mends anything: a plan that breaks one is a bug.

The controller stops on a PlanError: better no decision than one that cannot be carried out.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np

from controller.core import table as columns
from controller.core.groups import FamilyKey, GroupEntry
from controller.core.records import Plan
from controller.core.state import State
from controller.core.table import Bools, Ints
from outrider.ids import JobName
from outrider.model.attributes import describe

_FEW = 32  # placements


class PlanError(AssertionError):
    """A programmer's error, with the plan's details."""


def check(state: State, plan: Plan) -> None:
    """Raises PlanError where `plan` cannot follow from `state`."""
    if plan.parent != state.generation or not plan.generation > plan.parent:
        raise PlanError(f"plan {plan.generation} of {plan.parent} does not follow {state.generation}")
    _check_serials(state, plan)
    placed = list(_placements(state, plan))
    _check_nodes(state, plan, placed)
    _check_ports(state, plan, placed)
    _check_distinct(state, plan, placed)
    _check_victims(state, plan)
    _check_names(state, plan)


Placed = tuple[GroupEntry, Ints, Ints]  # the group, nodes (-1: nowhere), ports (a row for each node)


def _placements(state: State, plan: Plan) -> list[Placed]:
    found = []
    for run in plan.runs:
        group = state.groups[state.group_keys[run.job, run.version, run.group]]
        found.append(_placed(plan, group, run.nodes, run.ports))
    for late in plan.late:
        row = int(state.table.rows(np.frombuffer(late.serials, np.int64))[0])
        found.append(_placed(plan, state.group_of(row), late.nodes, late.ports))
    return found


def _placed(plan: Plan, group: GroupEntry, nodes: bytes, ports: bytes) -> Placed:
    refs = np.frombuffer(nodes, np.int32).astype(np.int64)
    numbers = np.frombuffer(ports, np.int32).astype(np.int64)
    width = group.ports_width
    if len(numbers) != len(refs) * width:
        raise PlanError(f"plan {plan.generation}: {group.family}: {len(numbers)} ports for {len(refs)} allocations")
    return group, refs, numbers.reshape(len(refs), width)


def _check_serials(state: State, plan: Plan) -> None:
    """Every allocation is accounted for once, and is in a condition to be placed or stopped."""
    next_serial = state.next_serial
    for run in plan.runs:
        if run.first_serial != next_serial:
            raise PlanError(f"plan {plan.generation}: run begins at serial {run.first_serial}, not {next_serial}")
        next_serial += len(run.nodes) // 4
    _check_updates(state, plan)
    packed = [late.serials for late in plan.late] + [stop.serials for stop in plan.stops]
    touched = [np.frombuffer(serials, np.int64) for serials in packed]
    if not touched:
        return
    serials = np.concatenate(touched)
    if len(np.unique(serials)) != len(serials):
        raise PlanError(f"plan {plan.generation}: an allocation is placed or stopped twice")
    table = state.table
    for serial in serials.tolist():
        row = table.row(serial)
        if row is None or table.status[row] != columns.LIVE or table.desired[row] != columns.RUN:
            raise PlanError(f"plan {plan.generation}: {state.alloc_id(serial)} is not there to be placed or stopped")
    for late in plan.late:
        if (table.node[table.rows(np.frombuffer(late.serials, np.int64))] >= 0).any():
            raise PlanError(f"plan {plan.generation}: an allocation would move")


def _check_updates(state: State, plan: Plan) -> None:
    """Nothing that makes the process differs between what an allocation is made from and what it becomes."""
    for update in plan.updates:
        wanted = state.groups[state.group_keys[update.job, update.version, update.group]]
        rows = state.table.rows(np.frombuffer(update.serials, np.int64))
        for key in np.unique(state.table.group[rows]).tolist():
            if state.groups[key].spec != wanted.spec or state.groups[key].family != wanted.family:
                raise PlanError(f"plan {plan.generation}: {wanted.family}: other content cannot be told in place")


def _check_nodes(state: State, plan: Plan, placed: list[Placed]) -> None:
    """No node gives what it has not, or runs what it must not."""
    nodes, size = state.nodes, len(state.nodes)
    ready = state.ready_nodes
    counted: list[tuple[GroupEntry, Ints]] = []
    for group, refs, _ in placed:
        if refs.max(initial=-1) >= size or refs.min(initial=0) < -1:
            raise PlanError(f"plan {plan.generation}: {group.family} on a node that nobody knows")
        there = refs[refs >= 0]
        if not len(there):
            continue
        for problem, passing in (("is not ready", ready), ("does not suit it", nodes.suited(group.demand))):
            if not passing[there].all():
                bad = nodes.nodes[int(there[~passing[there]][0])].id
                raise PlanError(f"plan {plan.generation}: {group.family} on {bad}, which {problem}")
        counted.append((group, there))
    if not counted:
        return
    if sum(len(there) for _, there in counted) <= _FEW:
        _count_each(state, plan, counted)
        return
    touched, which = np.unique(np.concatenate([there for _, there in counted]), return_inverse=True)
    sizes = [len(there) for _, there in counted]
    takes = [dict(_takes(group)) for group, _ in counted]
    free = {"cpu": nodes.cpu_free, "memory": nodes.memory_free, "disk": nodes.disk_free}
    for what in dict.fromkeys(itertools.chain.from_iterable(takes)):
        sums = np.bincount(which, weights=np.repeat([each.get(what, 0) for each in takes], sizes))
        left = (free[what] if what in free else nodes.device_free(what))[touched]
        for at in np.flatnonzero((sums > 0) & (sums > left)).tolist():
            raise _over_committed(state, plan, int(touched[at]), what, int(sums[at]), int(left[at]))


def _count_each(state: State, plan: Plan, counted: list[tuple[GroupEntry, Ints]]) -> None:
    """The same for a few, for which columns would be the longer way."""
    nodes = state.nodes
    free = {"cpu": nodes.cpu_free, "memory": nodes.memory_free, "disk": nodes.disk_free}
    asked: Counter[tuple[str, int]] = Counter()
    for group, there in counted:
        for ref, (what, count) in itertools.product(there.tolist(), _takes(group)):
            asked[what, ref] += count
    for (what, ref), count in asked.items():
        left = int((free[what] if what in free else nodes.device_free(what))[ref])
        if count > max(left, 0):
            raise _over_committed(state, plan, ref, what, count, left)


def _over_committed(  # noqa: PLR0917  the words' parts
    state: State, plan: Plan, ref: int, what: str, asked: int, left: int
) -> PlanError:
    name = state.nodes.nodes[ref].id
    return PlanError(f"plan {plan.generation}: {name} over-committed: {what} {asked} of {left}")


def _takes(group: GroupEntry) -> Iterator[tuple[str, int]]:
    yield "cpu", group.need.cpu_millis
    yield "memory", group.need.memory_bytes
    yield "disk", group.need.disk_bytes
    yield from group.devices


def _check_distinct(state: State, plan: Plan, placed: list[Placed]) -> None:
    """No value of an attribute has more copies than a group or a job allows."""
    gone = {serial for stop in plan.stops for serial in np.frombuffer(stop.serials, np.int64).tolist()}
    for group in {one.family: one for one, _, _ in placed if one.distinct}.values():
        for distinct in group.distinct:
            families = _families(state, group.job) if distinct.whole_job else {group.family}
            stay = [_staying(state, family, gone) for family in families if family in state.families]
            new = [refs for one, refs, _ in placed if one.job == group.job and (distinct.whole_job or one is group)]
            new_refs = np.concatenate([refs[refs >= 0] for refs in new])
            codes = state.nodes.attributes.column(distinct.attribute).codes
            counts = Counter(codes[np.concatenate([*stay, new_refs])].tolist())
            touched = set(codes[new_refs].tolist())
            if any(counts[code] > distinct.most for code in touched):
                raise PlanError(
                    f"plan {plan.generation}: {group.family}: {describe(distinct.constraint)} does not hold"
                )


def _families(state: State, job: JobName) -> set[FamilyKey]:
    versions = state.jobs[job].versions.values()
    return {(job, group.name) for added in versions for group in added.job.groups}


def _staying(state: State, family: FamilyKey, gone: set[int]) -> Ints:
    """The nodes of what is there and is to stay."""
    table, rows = state.table, state.family_rows(family)
    rows = rows[(table.status[rows] == columns.LIVE) & (table.desired[rows] == columns.RUN) & (table.node[rows] >= 0)]
    if gone:
        rows = rows[[serial not in gone for serial in table.serial[rows].tolist()]]
    nodes: Ints = table.node[rows].astype(np.int64)
    return nodes


def _check_victims(state: State, plan: Plan) -> None:
    """Nobody goes for one of the same or a lower priority."""
    for stop in plan.stops:
        if stop.by is None:
            continue
        priority = state.jobs[stop.by].job.priority
        for row in state.table.rows(np.frombuffer(stop.serials, np.int64)).tolist():
            if state.group_of(row).priority >= priority:
                name = state.alloc_id(int(state.table.serial[row]))
                raise PlanError(f"plan {plan.generation}: {name} is not less important than {stop.by}")


def _check_ports(state: State, plan: Plan, placed: list[Placed]) -> None:
    given: dict[int, set[int]] = {}
    for group, refs, mesh_ports in placed:
        if not group.ports_width and not group.static_ports:
            continue
        for ref, row in zip(refs.tolist(), mesh_ports.tolist(), strict=True):
            if ref < 0:
                continue
            on_node = given.setdefault(ref, set())
            found = state.nodes.nodes[ref].fingerprint
            for port in (*row, *group.static_ports):
                if port in on_node or port in state.nodes.ports[ref]:
                    raise PlanError(f"plan {plan.generation}: port {port} twice on {state.nodes.nodes[ref].id}")
                on_node.add(port)
            if any(not found.port_first <= port <= found.port_last for port in row):
                raise PlanError(f"plan {plan.generation}: {group.family}: a port outside the range of its node")


def _check_names(state: State, plan: Plan) -> None:
    """No two allocations that are to run are the same copy of the same group, in the same role."""
    table = state.table
    is_stopped = _marked(state, b"".join(stop.serials for stop in plan.stops))
    is_settled = _marked(state, plan.settled)
    created: dict[FamilyKey, list[Ints]] = {}
    for run in plan.runs:
        group = state.groups[state.group_keys[run.job, run.version, run.group]]
        indices = np.arange(run.first_index, run.first_index + len(run.nodes) // 4)
        created.setdefault(group.family, []).append(indices * len(columns.ROLES) + run.role)
    for row in np.flatnonzero(is_settled).tolist():
        created.setdefault(state.group_of(row).family, [])
    for family, new in created.items():
        rows = state.family_rows(family)
        if not len(rows) and len(new) == 1:
            continue  # new indices alone, each once
        kept = rows[(table.status[rows] == columns.LIVE) & (table.desired[rows] == columns.RUN) & ~is_stopped[rows]]
        roles = np.where(is_settled[kept], columns.ORDINARY, table.role[kept])
        names = np.concatenate([*new, table.index[kept].astype(np.int64) * len(columns.ROLES) + roles])
        if np.bincount(names).max(initial=0) > 1:
            raise PlanError(f"plan {plan.generation}: two allocations of one index in {family}")


def _marked(state: State, serials: bytes) -> Bools:
    """By row: whether it is one of `serials`."""
    marked = np.zeros(state.table.size, np.bool_)
    marked[state.table.rows(np.frombuffer(serials, np.int64))] = True
    return marked
