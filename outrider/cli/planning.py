"""`outrider job plan` and `outrider alloc why`: what the scheduler would do, and why it did what it did."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.exits import RemoteExit

if TYPE_CHECKING:
    from outrider.model.fleet import Explanation, JobPlan, PlannedStep

Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
_SIGNS = {"place": "+", "replace": "~", "stop": "-", "preempt": "!", "wait": "?"}
_WORDS = {
    "place": "placed",
    "replace": "replaced",
    "stop": "stopped",
    "preempt": "preempted",
    "wait": "waiting",
}
CHANGES_EXIT = 2


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")],
    detailed: Annotated[
        bool, typer.Option("--detailed-exitcode", help="Exit 2 where there would be changes, 0 where none.")
    ] = False,
    json: Json = False,
) -> None:
    """What `job run FILE` would change, place, move and preempt; nothing is done. Exit 1: it would be refused."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import RefusedError
    from outrider.job_diff import diff
    from outrider.jobspec.reader import read_job
    from outrider.model.fleet import JobPlan
    from outrider.v1 import job_pb2, operator_pb2

    job = read_job(file)
    with connect() as fleet:
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        found = codec.from_wire(fleet.call(fleet.stub.PlanJob, request, timeout_s=_TIMEOUT_S), JobPlan)
    if found.refusal:
        raise RefusedError("conflict", found.refusal)
    changes = diff(found.current, job)
    if json:
        output.print_json({"plan": found, "changes": changes})
    else:
        for line in (*_headline(found, len(changes)), *(f"  {change}" for change in changes)):
            print(line)
        for line in _outcome(found):
            print(line)
    if detailed and (found.changed or found.steps):
        raise RemoteExit(CHANGES_EXIT)


_TIMEOUT_S = 60.0


def why(
    alloc: Annotated[str, typer.Argument(metavar="ALLOC", help="An allocation's id, or the beginning of it.")],
    json: Json = False,
) -> None:
    """Why an allocation is on its node, or on none: nodes out for what, the best nodes' scores, what would help."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.fleet import Explanation
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.GetAllocationRequest(alloc=alloc)
        found = codec.from_wire(fleet.call(fleet.stub.ExplainAllocation, request), Explanation)
    if json:
        output.print_json(found)
        return
    for line in _explained(found):
        print(line)
    if found.best:
        print()
        parts = list(found.best[0].parts)
        output.print_table(
            ("NODE", "SCORE", *(part.upper() for part in parts)),
            (
                (one.node, f"{one.score:.4f}", *(f"{one.parts.get(part, 0.0):.4f}" for part in parts))
                for one in found.best
            ),
        )


def _headline(found: "JobPlan", changes: int) -> list[str]:
    if found.current is None:
        return [f"job {found.job}: new, as version {found.version}"]
    if not found.changed:
        return [f"job {found.job}, version {found.version}: the fleet has exactly this already"]
    return [f"job {found.job}, version {found.version - 1} -> {found.version}: {changes} changes"]


def _outcome(found: "JobPlan") -> list[str]:
    lines = [f"warning: {warning}" for warning in found.warnings]
    lines.extend(_line(found, step) for step in found.steps)
    total = sum(found.counts.values())
    if total > len(found.steps):
        lines.append(f"  ... and {total - len(found.steps)} more")
    counted = [f"{count} {_WORDS[action]}" for action, count in sorted(found.counts.items())]
    lines.append(", ".join([*counted, f"{found.kept} stay as they are"]))
    if found.rollout_reason:
        lines.append(f"rollout {found.rollout}: {found.rollout_reason}")
    elif found.rollout == "running" and found.changed and found.steps:
        lines.append("rollout running: then it waits, for a person or for room")
    return lines


def _line(found: "JobPlan", step: "PlannedStep") -> str:
    name = f"{step.group}[{step.index}]" if step.job == found.job else f"{step.job} {step.group}[{step.index}]"
    where = " -> ".join(node for node in (step.node_before, step.node_after) if node)
    if step.action == "replace" and step.node_before == step.node_after:
        where = f"{step.node_after}, again"
    reason = f": {step.reason}" if step.reason and step.action != "replace" else ""
    return f"  {_SIGNS[step.action]} {step.action} {name}{' on ' if where else ''}{where}{reason}"


def _explained(found: "Explanation") -> list[str]:
    one = found.allocation
    where = f"on {one.node}" if one.node else "on no node"
    lines = [
        f"{one.job} {one.group}[{one.index}] {one.id}: {one.status}, {where}{': ' if one.reason else ''}{one.reason}"
    ]
    if not found.nodes:
        return [*lines, "no node has joined the fleet"]
    passing = found.nodes - sum(each.nodes for each in found.filtered)
    again = ", if it had to be placed now" if one.node else ""
    lines.append(f"{passing} of {found.nodes} nodes would take it{again}")
    lines.extend(f"  {each.nodes} out: {each.reason}" for each in found.filtered)
    if found.remedies:
        lines.append("it would fit")
        lines.extend(f"  {remedy}" for remedy in found.remedies)
    return lines
