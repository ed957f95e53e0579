"""`outrider operator`: for whoever keeps the fleet. Snapshots of its state, and an archive to look for faults."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.errors import InputError

if TYPE_CHECKING:
    from outrider.cli.client import Fleet
    from outrider.model.access import CaState, NodeBehind
    from outrider.v1 import access_pb2

app = typer.Typer(no_args_is_help=True)
snapshot = typer.Typer(no_args_is_help=True)
authority = typer.Typer(no_args_is_help=True)
app.add_typer(authority, name="ca", help="The CA of the fleet's own certificates, and its change.")
app.add_typer(snapshot, name="snapshot", help="The fleet's whole state as one file.")

_CHUNK_BYTES = 256 * 1024
_LOG_BYTES_MAX = 4 * 1024 * 1024
_POLL_S = 0.5
_SHOWN_MAX = 10


@snapshot.command()
def save(file: Annotated[Path, typer.Argument(help="Written whole or not at all.")]) -> None:
    """Write the fleet's state to a file: jobs, placements, nodes, users, sealed secrets. Not the keys."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.v1 import archive_pb2

    with connect() as fleet:
        chunks = fleet.stream(fleet.archive.SaveSnapshot, archive_pb2.SaveSnapshotRequest())
        content = b"".join(chunk.content for chunk in chunks)
    _write(file, content)
    output.say(f"{file}: {len(content)} bytes")


@snapshot.command()
def restore(
    file: Annotated[Path, typer.Argument(help="As `save` wrote it.", exists=True, dir_okay=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Replace the fleet's state by a file's. What runs and is not in it is kept, as unclaimed, until you decide."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.v1 import archive_pb2

    content = file.read_bytes()
    if not yes and not typer.confirm(f"Replace all that the fleet knows by {file}?", err=True):
        raise InputError("nothing was changed")

    def chunks() -> Iterator[archive_pb2.Chunk]:
        for at in range(0, max(1, len(content)), _CHUNK_BYTES):
            yield archive_pb2.Chunk(content=content[at : at + _CHUNK_BYTES])

    with connect() as fleet:
        found = fleet.call(fleet.archive.RestoreSnapshot, chunks())
    saved = output.age(found.saved_at_s)
    output.say(f"restored: {found.jobs} jobs and {found.allocations} allocations, as they were {saved} ago")


@app.command()
def debug(file: Annotated[Path, typer.Argument(help="A .tar.gz.")]) -> None:
    """Pack what helps to find a fault: configuration, state, events, metrics, a dev fleet's logs. No secrets."""
    import io
    import tarfile

    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.v1 import archive_pb2

    files: dict[str, bytes] = {}
    with connect() as fleet:
        for part in fleet.stream(fleet.archive.Inspect, archive_pb2.InspectRequest()):
            files[part.name] = files.get(part.name, b"") + part.content
        files |= _logs(fleet.address.target)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"outrider-debug/{name}")
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
    _write(file, buffer.getvalue())
    output.say(f"{file}: {', '.join(sorted(files))}")


def _logs(target: str) -> dict[str, bytes]:
    """The programs' own, where this host has them: a dev fleet's are files."""
    from outrider.cli.dev.layout import find

    fleet = find(Path(target.removeprefix("unix:")).parent.name) if target.startswith("unix:") else None
    found: dict[str, bytes] = {}
    if fleet is not None:
        for path in sorted(fleet.log("x").parent.glob("*.log")):
            found[f"logs/{path.name}"] = path.read_bytes()[-_LOG_BYTES_MAX:]
    return found


@app.command(name="log-level")
def log_level(
    level: Annotated[str, typer.Argument(help="debug, info, warning or error.")],
    node: Annotated[str, typer.Option(help="Of this node's agent. Default: of the controller.")] = "",
) -> None:
    """Change what is logged from here on, until that process starts anew."""
    from outrider.cli.client import connect
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        fleet.call(fleet.stub.SetLogLevel, operator_pb2.SetLogLevelRequest(level=level, node=node))
    print(f"{node or 'the controller'}: logs {level}")


@authority.command()
def status(json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Who signs the fleet's certificates, and, while that changes, who would be shut out by the end of it."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        state = _ca_state(fleet.call(fleet.access.GetCa, access_pb2.GetCaRequest()))
    if json:
        output.print_json(state)
        return
    _print_ca(state)


@authority.command()
def rotate(
    patience: Annotated[str, typer.Option(help="Give up where no node has changed over for so long.")] = "1m",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the nodes.")] = False,
) -> None:
    """Let a new CA sign, and trust both. Waits until every node has a certificate of the new one; nothing restarts.

    `outrider operator ca retire` ends it. Said again, it tells everybody again and waits on. Exit 1: nodes are behind.
    """
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.jobspec.units import duration_s
    from outrider.v1 import access_pb2

    try:
        patience_s = duration_s(patience)
    except ValueError as error:
        raise InputError(f"--patience: {error}") from error
    with connect() as fleet:
        state = _ca_state(fleet.call(fleet.access.RotateCa, access_pb2.RotateCaRequest()))
        output.say(f"CA {state.sha256[:16]} signs; {state.previous_sha256[:16]} is trusted beside it")
        if not detach:
            state = _changed_over(fleet, state, patience_s)
    _print_ca(state)


def _changed_over(fleet: "Fleet", state: "CaState", patience_s: float) -> "CaState":
    """Once no node needs the CA before. Raises RefusedError, naming those that do, where none gets on any more."""
    import time

    from outrider.cli import output
    from outrider.errors import RefusedError
    from outrider.v1 import access_pb2

    told: tuple[NodeBehind, ...] = ()
    since_s = time.monotonic()
    while state.behind:
        shown = ", ".join(f"{each.node} ({each.reason})" for each in state.behind[:_SHOWN_MAX])
        more = f" and {len(state.behind) - _SHOWN_MAX} more" if len(state.behind) > _SHOWN_MAX else ""
        if state.behind != told:
            told, since_s = state.behind, time.monotonic()
            output.say(f"{len(told)} nodes are behind: {shown}{more}")
        elif time.monotonic() - since_s > patience_s:
            way_on = (
                "each changes over by itself once it is back; `rotate` again waits on, "
                "`outrider operator ca retire --force` goes on without them, and they must join again"
            )
            raise RefusedError("behind", f"nobody gets on, behind are {shown}{more}: {way_on}")
        time.sleep(_POLL_S)
        state = _ca_state(fleet.call(fleet.access.GetCa, access_pb2.GetCaRequest()))
    return state


@authority.command()
def retire(
    force: Annotated[bool, typer.Option("--force", help="Nodes that are behind must join again.")] = False,
) -> None:
    """Trust the new CA alone. Tokens and users' certificates that are older than the change end with it."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        state = _ca_state(fleet.call(fleet.access.RetireCa, access_pb2.RetireCaRequest(force=force)))
    _print_ca(state)


def _ca_state(message: "access_pb2.CaState") -> "CaState":
    from outrider import codec
    from outrider.model.access import CaState

    return codec.from_wire(message, CaState)


def _print_ca(state: "CaState") -> None:
    from outrider.cli import output

    output.print_fields(
        (
            ("signs", state.sha256),
            ("trusted too", state.previous_sha256),
            ("since", f"{output.age(state.rotated_at_s)} ago" if state.rotated_at_s is not None else ""),
            ("older tokens", state.tokens_before or ""),
            *((f"behind: {each.node}", each.reason) for each in state.behind),
        )
    )
    if state.previous_sha256 and not state.behind:
        print("every node is ready for `outrider operator ca retire`")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and its owner's alone."""
    import os

    partial = path.with_name(path.name + ".partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
