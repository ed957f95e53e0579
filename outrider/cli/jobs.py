"""`outrider job`: validate, run, see and stop jobs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli import launches, planning, versions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outrider.model.fleet import JobSummary

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")]


@app.command()
def validate(file: JobFile) -> None:
    """Whether FILE is a good job; nothing is sent."""
    from outrider.jobspec.reader import read_job

    job = read_job(file)
    copies = sum(group.count for group in job.groups)
    print(f"{file}: job {job.name} is good: {len(job.groups)} groups, {copies} allocations")


@app.command()
def run(
    file: JobFile,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it runs.")] = False,
    json: Json = False,
) -> None:
    """Run the job in FILE, or change it to what FILE says, and wait until that is so. Exit 1: it failed."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.rollout import next_launch, wait
    from outrider.jobspec.reader import read_job
    from outrider.v1 import job_pb2, operator_pb2

    job = read_job(file)
    with connect() as fleet:
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        answer = fleet.call(fleet.stub.SubmitJob, request)
        for warning in answer.warnings:
            output.say(f"warning: {warning}")
        if not json:
            news = "submitted" if answer.changed else "the fleet has exactly this already"
            print(f"job {job.name}, version {answer.version}: {news}", flush=True)
        status = None if detach else wait(fleet, job.name, answer.version)
        if job.schedule is not None and not json:
            print(f"job {job.name}: next launch {next_launch(fleet, job)}")
    if json:
        output.print_json({"job": job.name, "version": answer.version, "changed": answer.changed, "status": status})


@app.command()
def ls(json: Json = False) -> None:
    """All jobs, in one line each."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.fleet import JobSummary
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        found = fleet.call(fleet.stub.ListJobs, operator_pb2.ListJobsRequest()).jobs
    jobs = [codec.from_wire(job, JobSummary) for job in found]
    if json:
        output.print_json(jobs)
        return
    _print_jobs(jobs)


def _print_jobs(jobs: "Iterable[JobSummary]") -> None:
    from outrider.cli import output

    output.print_table(
        ("JOB", "NAMESPACE", "TYPE", "STATUS", "VERSION", "WANTED", "RUNNING", "HEALTHY", "PENDING", "FAILED", "AGE"),
        (
            (
                job.name,
                job.namespace,
                job.type,
                job.state if job.next_launch_s is None else f"{job.state}, next in {output.until(job.next_launch_s)}",
                str(job.version),
                *(str(count) for count in (job.wanted, job.running, job.healthy, job.pending, job.failed)),
                output.age(job.submitted_at_s),
            )
            for job in jobs
        ),
    )


@app.command()
def status(job: str, json: Json = False) -> None:
    """One job: its allocations, how its rollout went, and what it still lacks."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.allocations import print_allocations
    from outrider.cli.client import connect
    from outrider.model.fleet import JobStatus
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        answer = codec.from_wire(fleet.call(fleet.stub.GetJob, operator_pb2.GetJobRequest(job=job)), JobStatus)
    if json:
        output.print_json(answer)
        return
    version = answer.job
    output.print_fields(
        (
            ("job", version.job.name),
            ("namespace", version.job.namespace),
            ("type", version.job.type),
            ("version", f"{version.version}, {output.age(version.submitted_at_s)} old"),
            ("status", answer.state),
            ("launched from", version.job.parent or ""),
            ("next launch", output.when(answer.next_launch_s, version.job.schedule) if answer.next_launch_s else ""),
            ("rollout", answer.rollout),
            ("reason", answer.rollout_reason),
        )
    )
    for one in answer.scaling:
        measured = f"{one.measured:.3g}" if one.measured is not None else "unknown"
        bounds = f"{one.count} copies of {one.policy.count_min} to {one.policy.count_max}"
        target = f"{one.policy.metric} {measured} each, wanted {one.policy.target:g}"
        print(f"scaling: group {one.group}: {bounds}; {target}{one.note and '; ' + one.note}")
    for warning in answer.warnings:
        print(f"warning: {warning}")
    print()
    if version.job.is_template:
        _print_jobs(answer.children)
    else:
        print_allocations(answer.allocations)


@app.command()
def restart(
    job: str, detach: Annotated[bool, typer.Option("--detach", help="Do not wait until all are replaced.")] = False
) -> None:
    """Replace all copies of a job by equal ones, a few at a time, as `update` of each group says. Exit 1: it failed."""
    from outrider.cli.steering import restart_job

    restart_job(job, detach=detach)


@app.command()
def stop(
    job: str, detach: Annotated[bool, typer.Option("--detach", help="Do not wait until nothing of it runs.")] = False
) -> None:
    """Stop a job and wait until nothing of it runs."""
    from outrider.cli.client import connect
    from outrider.cli.rollout import wait_stopped
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        fleet.call(fleet.stub.StopJob, operator_pb2.StopJobRequest(job=job))
        if not detach:
            wait_stopped(fleet, job)
    print(f"job {job}: {'stopping' if detach else 'stopped'}")


app.command("plan")(planning.plan)
app.command("dispatch")(launches.dispatch)
app.command("history")(versions.history)
app.command("diff")(versions.diff_)
app.command("revert")(versions.revert)
app.command("scale")(versions.scale)
