"""`outrider job history|diff|revert|scale`: a job over time, and how many copies it has."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outrider.cli.client import Fleet
    from outrider.model.fleet import VersionStatus

Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait until it is so.")]
_CHANGES_SHOWN_MAX = 3


def history(
    job: str,
    changes: Annotated[bool, typer.Option("--changes", "-p", help="All that each version changed.")] = False,
    json: Json = False,
) -> None:
    """The versions of a job that are kept: how each went, and what it changed."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.job_diff import diff

    with connect() as fleet:
        versions = _history(fleet, job)
    before = [None, *versions]
    steps = [
        (one, diff(last.version.job, one.version.job) if last is not None else None)
        for last, one in zip(before, versions, strict=False)
    ]
    if json:
        output.print_json([{"status": one, "changes": found} for one, found in steps])
        return
    if not changes:
        output.print_table(
            ("VERSION", "AGE", "ROLLOUT", "CHANGED", "WHY"),
            (
                (
                    str(one.version.version),
                    output.age(one.version.submitted_at_s),
                    _outcome(one, newest=versions[-1]),
                    _shown([change.path for change in found]) if found is not None else "the oldest that is kept",
                    one.reason,
                )
                for one, found in steps
            ),
        )
        return
    for one, found in steps:
        print(f"version {one.version.version}, {output.age(one.version.submitted_at_s)} old: "
              f"{_outcome(one, newest=versions[-1])}")  # fmt: skip
        for line in found or ():
            print(f"  {line}")


def diff_(
    job: str,
    old: Annotated[int, typer.Argument(help="A version; the one before NEW by default.")] = 0,
    new: Annotated[int, typer.Argument(help="A version; the newest by default.")] = 0,
    json: Json = False,
) -> None:
    """What changed between two versions of a job."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import RefusedError
    from outrider.job_diff import diff

    with connect() as fleet:
        versions = {one.version.version: one.version.job for one in _history(fleet, job)}
    second = new or max(versions)
    first = old or max((version for version in versions if version < second), default=0)
    if missing := [version for version in (first, second) if version not in versions]:
        what = f"version {missing[0]} is not there" if missing[0] else f"nothing older than version {second} is kept"
        raise RefusedError("not-found", f"job {job}: {what}; `outrider job history {job}` lists them")
    found = diff(versions[first], versions[second])
    if json:
        output.print_json({"old": first, "new": second, "changes": found})
        return
    print(f"job {job}, version {first} -> {second}: {len(found)} changes")
    for change in found:
        print(f"  {change}")


def revert(
    job: str,
    version: Annotated[int, typer.Argument(help="The last good one before the newest by default.")] = 0,
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Roll out what an older version held, as a new version, and wait until that is so. Exit 1: it failed."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.rollout import wait
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.stub.RevertJob, operator_pb2.RevertJobRequest(job=job, version=version))
        for warning in answer.warnings:
            output.say(f"warning: {warning}")
        if not json:
            held = f"version {version}" if version else "the last good version before"
            news = f"holds what {held} did" if answer.changed else "holds exactly this already"
            print(f"job {job}, version {answer.version}: {news}", flush=True)
        status = None if detach else wait(fleet, job, answer.version)
    if json:
        output.print_json({"job": job, "version": answer.version, "changed": answer.changed, "status": status})


def scale(
    job: str,
    words: Annotated[list[str], typer.Argument(metavar="[GROUP] COUNT", help="GROUP where the job has several.")],
    detach: Detach = False,
) -> None:
    """Change how many copies a group of a service has, and wait until they are there. Exit 1: one failed."""
    from outrider.cli.client import connect
    from outrider.cli.rollout import wait_scaled
    from outrider.errors import InputError
    from outrider.v1 import operator_pb2

    if len(words) > 2 or not (words[-1].isascii() and words[-1].isdigit()):
        raise InputError(f"job scale {job} {' '.join(words)}: expected [GROUP] COUNT, a whole number last")
    group, count = words[0] if len(words) == 2 else "", int(words[-1])
    with connect() as fleet:
        request = operator_pb2.ScaleJobRequest(job=job, group=group, count=count)
        answer = fleet.call(fleet.stub.ScaleJob, request)
        print(f"job {job}: {f'{count} copies wanted' if answer.changed else f'has {count} copies already'}", flush=True)
        if not detach:
            wait_scaled(fleet, job, group, count)


def _history(fleet: "Fleet", job: str) -> "list[VersionStatus]":
    from outrider import codec
    from outrider.model.fleet import VersionStatus
    from outrider.v1 import operator_pb2

    found = fleet.call(fleet.stub.GetJobHistory, operator_pb2.GetJobRequest(job=job)).versions
    return [codec.from_wire(one, VersionStatus) for one in found]


def _outcome(one: "VersionStatus", *, newest: "VersionStatus") -> str:
    from outrider.model.fleet import RolloutState

    if one.version.stopped:
        return "stopped"
    superseded = one.rollout is RolloutState.RUNNING and one is not newest
    return "superseded" if superseded else str(one.rollout)


def _shown(paths: list[str]) -> str:
    more = len(paths) - _CHANGES_SHOWN_MAX
    return ", ".join(paths[:_CHANGES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "") or "nothing"
