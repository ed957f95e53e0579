"""`outrider vm`: what only a virtual machine has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outrider.cli.client import Fleet

app = typer.Typer(no_args_is_help=True)

_POLL_S = 0.2

Target = Annotated[str, typer.Argument(metavar="ALLOC|JOB", help="A job means its first running allocation.")]
Snapshot = Annotated[str, typer.Argument(help="A snapshot's name.")]
Node = Annotated[str, typer.Option(help="Where it is; else the one node that has a snapshot of this name.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def console(target: Target) -> None:
    """Sit at the guest's serial console: what it writes from now on, and your keys. Ctrl-] leaves."""
    from outrider.cli.client import connect
    from outrider.cli.streams import sit_at_console

    with connect() as fleet:
        sit_at_console(fleet, target)


@app.command()
def cp(
    source: Annotated[str, typer.Argument(metavar="FILE|ALLOC:PATH", help="What to copy.")],
    target: Annotated[str, typer.Argument(metavar="FILE|ALLOC:PATH", help="Where to. One of the two is in a guest.")],
) -> None:
    """Copy a file into a guest, or out of it, through its qemu-guest-agent."""
    import io

    from outrider.cli.client import connect
    from outrider.cli.streams import allocation_of, operate_into
    from outrider.errors import InputError
    from outrider.v1.fleet_pb2 import VmVerb

    (outer, _, inside_source), (into, _, inside_target) = source.partition(":"), target.partition(":")
    if bool(inside_source) == bool(inside_target):
        raise InputError("one of the two is in a guest, as ALLOC:PATH, and the other is here")
    try:
        with connect() as fleet:
            if inside_source:
                with Path(target).open("wb") as file:
                    alloc = allocation_of(fleet, outer)
                    operate_into(fleet, file, VmVerb.VM_VERB_READ, "", alloc=alloc, path=inside_source)
            else:
                with Path(source).open("rb") as file:
                    alloc = allocation_of(fleet, into)
                    nowhere = io.BytesIO()
                    verb = VmVerb.VM_VERB_WRITE
                    operate_into(fleet, nowhere, verb, "", alloc=alloc, path=inside_target, source=file)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


@app.command()
def migrate(
    target: Target,
    to: Annotated[str, typer.Option(help="The node to go to; else any that suits.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
) -> None:
    """Move the guest to another node while it runs. Where it does not work out, it runs on where it was."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import allocation_of
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.MoveAllocationRequest(alloc=allocation_of(fleet, target), node=to)
        answer = fleet.call(fleet.stub.MoveAllocation, request)
        for warning in answer.warnings:
            output.say(f"warning: {warning}")
        if detach:
            output.say(f"moves as {answer.alloc}")
        else:
            output.say(_moved(fleet, request.alloc, answer.alloc))


def _moved(fleet: "Fleet", old: str, new: str) -> str:
    """Waits until the guest is called at its new place, in words. Raises RefusedError where it does not come there."""
    import time

    from outrider import codec
    from outrider.errors import RefusedError
    from outrider.model.allocation import TERMINAL, Allocation, Desired
    from outrider.v1 import operator_pb2

    def now(alloc: str) -> Allocation:
        request = operator_pb2.GetAllocationRequest(alloc=alloc)
        return codec.from_wire(fleet.call(fleet.stub.GetAllocation, request), Allocation)

    words = ""
    while True:
        before, after = now(old), now(new)
        move = before.report.move if before.report is not None else None
        if move is not None and move.to == new and move.downtime_ms:
            words = f", paused for {move.downtime_ms:.0f} ms, {move.connections_cut} connections cut"
        if after.status in TERMINAL or after.desired is Desired.STOP:
            reason = after.reason or (after.report.message if after.report is not None else "")
            raise RefusedError("not-moved", f"{old} was not moved: {reason}")
        if before.status in TERMINAL and after.healthy:
            return f"{old} goes on as {new} on {after.node}{words}"
        time.sleep(_POLL_S)


@app.command()
def snapshot(target: Target, name: Snapshot) -> None:
    """Keep the guest's memory and disk on its node, under a name; it pauses for a moment and runs on."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import allocation_of, operate
    from outrider.v1.fleet_pb2 import VmVerb

    with connect() as fleet:
        said = operate(fleet, VmVerb.VM_VERB_SNAPSHOT, name, alloc=allocation_of(fleet, target))
    output.say(f"snapshot {name}: {_size(said)} kept; `start_from: {name}` in a job's image goes on from it")


@app.command()
def restore(target: Target, name: Snapshot) -> None:
    """Put the guest back to a snapshot that its node has. What it did since is lost."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import allocation_of, operate
    from outrider.v1.fleet_pb2 import VmVerb

    with connect() as fleet:
        alloc = allocation_of(fleet, target)
        operate(fleet, VmVerb.VM_VERB_RESTORE, name, alloc=alloc)
    output.say(f"{alloc} goes on from snapshot {name}")


@app.command()
def snapshots(node: Annotated[str, typer.Option(help="Of this node alone.")] = "", json: Json = False) -> None:
    """The snapshots of guests that the fleet's nodes keep."""
    import msgspec

    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import operate
    from outrider.v1.fleet_pb2 import VmVerb

    rows = []
    with connect() as fleet:
        for where in (node,) if node else sorted({each for _, each in _kept(fleet)}):
            lines = operate(fleet, VmVerb.VM_VERB_LIST, "", node=where).splitlines()
            rows += [{"node": where, **msgspec.json.decode(line)} for line in lines]
    if json:
        print(msgspec.json.encode(rows).decode())
        return
    output.print_table(
        ("SNAPSHOT", "NODE", "JOB", "GROUP", "SIZE", "QEMU", "AGE"),
        (
            (
                row["name"],
                row["node"],
                row["job"],
                row["group"],
                f"{sum(each['size_bytes'] for each in row['files'].values()) / 1_000_000:.0f} MB",
                f"{row['qemu']} {row['accelerator']}",
                output.age(row["made_at_s"]),
            )
            for row in rows
        ),
    )


@app.command()
def delete(name: Snapshot, node: Node = "") -> None:
    """Remove a snapshot from its node. Guests that went on from it do not need it."""
    from outrider.cli.client import connect
    from outrider.cli.streams import operate
    from outrider.v1.fleet_pb2 import VmVerb

    with connect() as fleet:
        operate(fleet, VmVerb.VM_VERB_DELETE, name, node=node or _holder(fleet, name))


@app.command()
def export(name: Snapshot, file: Annotated[Path, typer.Argument(help="The file to write.")], node: Node = "") -> None:
    """Write a snapshot to one file, with all it needs, that `outrider vm import` takes on any fleet."""
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import operate_into
    from outrider.errors import InputError
    from outrider.v1.fleet_pb2 import VmVerb

    unfinished = file.with_name(f"{file.name}.part")
    try:
        with connect() as fleet, unfinished.open("wb") as target:
            operate_into(fleet, target, VmVerb.VM_VERB_EXPORT, name, node=node or _holder(fleet, name))
        unfinished.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    output.say(f"{file}: {file.stat().st_size / 1_000_000:.0f} MB")


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `outrider vm export` wrote.")],
    node: Annotated[str, typer.Option(help="The node that shall keep it.")],
    name: Annotated[str, typer.Option(help="Another name than it had.")] = "",
) -> None:
    """Take an exported snapshot onto a node. Nothing is kept unless all of it is as it was exported."""
    import msgspec

    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.cli.streams import operate
    from outrider.errors import InputError
    from outrider.v1.fleet_pb2 import VmVerb

    try:
        source = file.open("rb")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    with source, connect() as fleet:
        said = operate(fleet, VmVerb.VM_VERB_IMPORT, name, node=node, source=source)
    manifest = msgspec.json.decode(said)
    output.say(f"snapshot {manifest['name']} is on {node}; a job goes on from it with")
    print(_image(manifest))


def _holder(fleet: "Fleet", name: str) -> str:
    """The one node that keeps the snapshot. Raises RefusedError."""
    from outrider.errors import RefusedError

    nodes = sorted(node for snapshot, node in _kept(fleet) if snapshot == name)
    if not nodes:
        raise RefusedError("not-found", f"no node keeps a snapshot {name!r}; `outrider vm snapshots` lists them")
    if len(nodes) > 1:
        raise RefusedError("ambiguous", f"{', '.join(nodes)} keep a snapshot {name!r}; say which: --node NODE")
    return nodes[0]


def _kept(fleet: "Fleet") -> list[tuple[str, str]]:
    """(snapshot, node) of all nodes."""
    from outrider.v1 import operator_pb2

    nodes = fleet.call(fleet.stub.ListNodes, operator_pb2.ListNodesRequest()).nodes
    return [(name, each.node.id) for each in nodes for name in each.node.fingerprint.snapshots]


def _size(manifest_json: str) -> str:
    import msgspec

    files = msgspec.json.decode(manifest_json)["files"]
    return f"{sum(each['size_bytes'] for each in files.values()) / 1_000_000:.0f} MB"


def _image(manifest: "dict[str, object]") -> str:
    """As it stands in a job file: what the guest was made from is in the snapshot, by its checksum."""
    images = manifest["images"]
    assert isinstance(images, dict), "a manifest"
    roles = "".join(f"  {role}: /imported/{manifest['name']}/{role}\n" for role in images)
    sums = ", ".join(f"{role}: {each['sha256']}" for role, each in images.items())
    more = f"  kernel_arguments: {manifest['kernel_arguments']}\n" if manifest["kernel_arguments"] else ""
    return f"image:\n{roles}  sha256: {{{sums}}}\n{more}  start_from: {manifest['name']}"
