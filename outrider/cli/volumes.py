"""`outrider volume`: storage that outlives the jobs that use it."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="By which jobs name it.")]
InNamespace = Annotated[str, typer.Option("--namespace", help="Whose jobs may name it.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
_COPY_TIMEOUT_S = 3600.0


@app.command()
def create(  # noqa: PLR0917 - typer's: each is an option
    name: Name,
    size_: Annotated[str, typer.Option("--size", help="Its limit: 10Gi. Taken of the node's disk at once.")] = "",
    node: Annotated[str, typer.Option("--node", help="Where; by default the node with the most room.")] = "",
    path: Annotated[str, typer.Option("--path", help="Instead of a size: a directory that the node has already.")] = "",
    access: Annotated[str, typer.Option("--access", help="single or many: how many allocations at a time.")] = "single",
    read_only: Annotated[bool, typer.Option("--read-only", help="Nobody writes to it.")] = False,
    namespace: InNamespace = "default",
    json: Json = False,
) -> None:
    """Make a volume on one node; what uses it is placed there."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import InputError
    from outrider.ids import Namespace, NodeId, VolumeName
    from outrider.model.belongings import Access, Volume, VolumeInfo
    from outrider.v1 import belongings_pb2, stores_pb2

    if bool(size_) == bool(path):
        raise InputError("give either --size, for a volume that a node makes, or --path, for a directory that it has")
    if access not in {*Access}:
        raise InputError(f"--access: {access[:80]!r} is none of {', '.join(Access)}")
    wanted = Volume(
        name=VolumeName(name),
        namespace=Namespace(namespace),
        node=NodeId(node),
        size_bytes=_bytes(size_) if size_ else 0,
        path=path,
        access=Access(access),
        read_only=read_only,
    )
    with connect() as fleet:
        request = stores_pb2.CreateVolumeRequest(volume=codec.to_wire(wanted, belongings_pb2.Volume))
        answer = fleet.call(fleet.stores.CreateVolume, request, timeout_s=_COPY_TIMEOUT_S)
    made = codec.from_wire(answer, VolumeInfo)
    if json:
        output.print_json(made)
    else:
        print(f"{name}: made on {made.volume.node}")


@app.command()
def ls(
    namespace: Annotated[str, typer.Option("--namespace", help="Of this one alone.")] = "", json: Json = False
) -> None:
    """All volumes, where they are and who has them."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.belongings import VolumeInfo
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        found = fleet.call(fleet.stores.ListVolumes, stores_pb2.ListVolumesRequest(namespace=namespace)).volumes
    infos = [codec.from_wire(each, VolumeInfo) for each in found]
    if json:
        output.print_json(infos)
        return
    output.print_table(
        ("NAME", "NAMESPACE", "NODE", "SIZE", "ACCESS", "USED BY", "JOBS", "SNAPSHOTS"),
        (
            (
                info.volume.name,
                info.volume.namespace,
                info.volume.node,
                info.volume.path or output.mebibytes(info.volume.size_bytes),
                f"{info.volume.access}{', read-only' if info.volume.read_only else ''}",
                ", ".join(info.allocations),
                ", ".join(info.jobs),
                ", ".join(snapshot.name for snapshot in info.snapshots),
            )
            for info in infos
        ),
    )


@app.command()
def delete(
    name: Name,
    snapshot: Annotated[str, typer.Option("--snapshot", help="Only this snapshot of it.")] = "",
    namespace: InNamespace = "default",
) -> None:
    """Remove a volume with all that is in it, and its snapshots. Refused while it is claimed."""
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        request = stores_pb2.DeleteVolumeRequest(name=name, namespace=namespace, snapshot=snapshot)
        fleet.call(fleet.stores.DeleteVolume, request, timeout_s=_COPY_TIMEOUT_S)
    print(f"{name}{': snapshot ' + snapshot if snapshot else ''}: deleted")


@app.command()
def snapshot(
    name: Name, snapshot_name: Annotated[str, typer.Argument(metavar="SNAPSHOT")], namespace: InNamespace = "default"
) -> None:
    """Keep what is in a volume now, on its node. What writes to it meanwhile waits."""
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        request = stores_pb2.SnapshotVolumeRequest(name=name, namespace=namespace, snapshot=snapshot_name)
        fleet.call(fleet.stores.SnapshotVolume, request, timeout_s=_COPY_TIMEOUT_S)
    print(f"{name}: snapshot {snapshot_name} made")


@app.command()
def restore(
    name: Name, snapshot_name: Annotated[str, typer.Argument(metavar="SNAPSHOT")], namespace: InNamespace = "default"
) -> None:
    """Put back what was in a volume when the snapshot was made. Refused while an allocation has it."""
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        request = stores_pb2.RestoreVolumeRequest(name=name, namespace=namespace, snapshot=snapshot_name)
        fleet.call(fleet.stores.RestoreVolume, request, timeout_s=_COPY_TIMEOUT_S)
    print(f"{name}: is as it was in {snapshot_name}")


def _bytes(text: str) -> int:
    from outrider.errors import InputError
    from outrider.jobspec.units import size_bytes

    try:
        return size_bytes(text)
    except ValueError as error:
        raise InputError(f"--size: {error}") from error
