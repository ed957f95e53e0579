"""`outrider job dispatch`: launches a job from one with parameters, or now from one with a schedule."""

from pathlib import Path
from typing import Annotated

import typer


def dispatch(
    job: str,
    param: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter; more than once.")] = None,
    payload: Annotated[
        Path | None, typer.Option(help="A file whose bytes go along; - is standard input.", allow_dash=True)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Launch a job from JOB, and wait until its work is done. Exit 1: it failed."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.rollout import wait
    from outrider.v1 import operator_pb2

    request = operator_pb2.DispatchJobRequest(job=job, parameters=_parameters(param or []))
    if payload is not None:
        request.payload = _read(payload)
    with connect() as fleet:
        launched = fleet.call(fleet.stub.DispatchJob, request).job
        if not json:
            print(f"job {job}: launched {launched}", flush=True)
        status = None if detach else wait(fleet, launched, 1)
    if json:
        output.print_json({"job": job, "launched": launched, "status": status})


def _parameters(words: list[str]) -> dict[str, str]:
    from outrider.errors import InputError

    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--param {word}: expected NAME=VALUE")
        if name in found:
            raise InputError(f"--param {name}: given twice")
        found[name] = value
    return found


def _read(payload: Path) -> bytes:
    import sys

    from outrider.errors import InputError

    if str(payload) == "-":
        return sys.stdin.buffer.read()
    try:
        return payload.read_bytes()
    except OSError as error:
        raise InputError(f"--payload {payload}: cannot be read: {error.strerror}") from error
