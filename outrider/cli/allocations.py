"""`outrider alloc`, `logs` and `exec`: what runs, what it says, and commands beside it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli import planning
from outrider.cli.exits import RemoteExit

if TYPE_CHECKING:
    from outrider.model.allocation import Allocation

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Alloc = Annotated[str, typer.Argument(metavar="ALLOC", help="An allocation's id, or the beginning of it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")]
Tail = Annotated[int, typer.Option("--tail", "-n", min=-1, help="Only the last lines; -1: all that is kept.")]
Stderr = Annotated[bool, typer.Option("--stderr", help="Only standard error.")]
Stdout = Annotated[bool, typer.Option("--stdout", help="Only standard output.")]


@app.command()
def ls(
    job: Annotated[str, typer.Option(help="Only this job's.")] = "",
    node: Annotated[str, typer.Option(help="Only this node's.")] = "",
    all_: Annotated[bool, typer.Option("--all", "-a", help="Those that ended too.")] = False,
    json: Json = False,
) -> None:
    """What runs, or waits to."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.allocation import Allocation
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.ListAllocationsRequest(job=job, node=node, terminal=all_)
        found = fleet.call(fleet.stub.ListAllocations, request).allocations
    allocations = [codec.from_wire(allocation, Allocation) for allocation in found]
    if json:
        output.print_json(allocations)
    else:
        print_allocations(allocations)


@app.command()
def status(alloc: Alloc, json: Json = False) -> None:
    """One allocation: its tasks, checks and ports, and why it is as it is."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.rollout import copy_name
    from outrider.model.allocation import Allocation
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.stub.GetAllocation, operator_pb2.GetAllocationRequest(alloc=alloc))
    allocation = codec.from_wire(answer, Allocation)
    if json:
        output.print_json(allocation)
        return
    report = allocation.report
    output.print_fields(
        (
            ("allocation", allocation.id),
            ("job", f"{allocation.job}, version {allocation.job_version}"),
            ("group", copy_name(allocation)),
            ("node", allocation.node or "none yet"),
            ("status", f"{allocation.status}, wanted: {allocation.desired}"),
            ("healthy", "yes" if allocation.healthy else "no"),
            ("reason", allocation.reason),
            ("message", report.message if report else ""),
            ("age", output.age(allocation.created_at_s)),
            ("address", report.local_address if report else ""),
            ("sidecar ports", _ports(allocation.mesh_ports.items())),
            ("static ports", _ports(allocation.ports.items())),
        )
    )
    if report is None:
        return
    print()
    output.print_table(
        ("TASK", "STATUS", "RESTARTS", "EXIT", "AGE", "MESSAGE"),
        (
            (
                task.name,
                task.status,
                str(task.restarts),
                _exit(task.exit_code, task.signal, oom_killed=task.oom_killed),
                output.age(task.started_at_s or 0.0),
                task.message,
            )
            for task in report.tasks
        ),
    )
    if report.checks:
        print()
        output.print_table(
            ("SERVICE", "PASSING", "CHECK SAYS"),
            ((check.service, "yes" if check.passing else "no", check.output) for check in report.checks),
        )


@app.command()
def restart(
    alloc: Alloc, detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it is healthy.")] = False
) -> None:
    """Start an allocation's tasks anew, where it is. Its restart policy does not count it."""
    from outrider.cli.steering import restart_allocation

    restart_allocation(alloc, detach=detach)


@app.command()
def stop(
    alloc: Alloc, detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it has ended.")] = False
) -> None:
    """Stop an allocation; another takes its place, as long as its job wants one."""
    from outrider.cli.steering import stop_allocation

    stop_allocation(alloc, detach=detach)


@app.command()
def logs(  # noqa: PLR0917 - typer's: each is an option
    alloc: Alloc,
    task: Annotated[str, typer.Argument(help="Where it has several; `sidecar` is Envoy's.")] = "",
    follow: Follow = False,
    tail: Tail = -1,
    stdout: Stdout = False,
    stderr: Stderr = False,
) -> None:
    """What an allocation says."""
    from outrider.cli.client import connect
    from outrider.cli.streams import copy_logs, logs_request

    with connect() as fleet:
        request = logs_request(alloc, task=task, follow=follow, tail_lines=tail, stdout=stdout, stderr=stderr)
        copy_logs(fleet, request)


def job_logs(  # noqa: PLR0917 - typer's: each is an option
    job: Annotated[str, typer.Argument(help="A job's name.")],
    task: Annotated[str, typer.Argument(help="Where a group has several; `sidecar` is Envoy's.")] = "",
    follow: Follow = False,
    tail: Tail = -1,
    stdout: Stdout = False,
    stderr: Stderr = False,
) -> None:
    """What all allocations of a job say, each line with its name. With -f, those that come later too."""
    from outrider.cli.client import connect
    from outrider.cli.streams import copy_job_logs, logs_request

    with connect() as fleet:
        request = logs_request("", task=task, follow=follow, tail_lines=tail, stdout=stdout, stderr=stderr)
        copy_job_logs(fleet, job, request)


def exec_(
    target: Annotated[str, typer.Argument(metavar="ALLOC|JOB", help="A job means its first running allocation.")],
    command: Annotated[list[str], typer.Argument(help="After --: the command and its arguments.")],
    task: Annotated[str, typer.Option(help="Where it has several.")] = "",
    tty: Annotated[
        bool | None, typer.Option("--tty/--no-tty", help="A terminal there; the default where there is one here.")
    ] = None,
) -> None:
    """Run a command beside a task, in its sandbox. Ends with the command's exit code."""
    from outrider.cli.client import connect
    from outrider.cli.streams import execute

    with connect() as fleet:
        code = execute(fleet, target, task=task, command=command, tty=tty)
    if code:
        raise RemoteExit(code)


app.command("exec")(exec_)
app.command("why")(planning.why)


def print_allocations(allocations: "Iterable[Allocation]") -> None:
    from outrider.cli import output
    from outrider.cli.rollout import copy_name, reason

    output.print_table(
        ("ALLOC", "JOB", "GROUP", "NODE", "STATUS", "HEALTHY", "AGE", "WHY"),
        (
            (
                each.id,
                each.job,
                copy_name(each),
                each.node or "-",
                each.status,
                "yes" if each.healthy else "no",
                output.age(each.created_at_s),
                reason(each),
            )
            for each in allocations
        ),
    )


def _ports(ports: "Iterable[tuple[str, int]]") -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(ports))


def _exit(code: int | None, signal: int | None, *, oom_killed: bool) -> str:
    if oom_killed:
        return "out of memory"
    if signal:
        return f"signal {signal}"
    return "" if code is None else str(code)
