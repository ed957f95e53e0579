"""`outrider namespace`: whose jobs are whose, and how much they may want."""

from collections.abc import Callable
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def ls(json: Json = False) -> None:
    """All namespaces that you may see, and what their jobs want of their quotas."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import NamespaceState
    from outrider.v1 import access_pb2

    with connect() as fleet:
        found = fleet.call(fleet.access.ListNamespaces, access_pb2.ListNamespacesRequest()).namespaces
    states = [codec.from_wire(each, NamespaceState) for each in found]
    if json:
        output.print_json(states)
        return
    output.print_table(
        ("NAMESPACE", "JOBS", "ALLOCS", "CPU", "MEMORY", "DESCRIPTION"),
        (
            (
                state.spec.name,
                _share(str(state.used.jobs), str(state.spec.quota.jobs)),
                _share(str(state.used.allocations), str(state.spec.quota.allocations)),
                _share(output.cores(state.used.cpu_millis), output.cores(state.spec.quota.cpu_millis)),
                _share(output.mebibytes(state.used.memory_bytes), output.mebibytes(state.spec.quota.memory_bytes)),
                state.spec.description,
            )
            for state in states
        ),
    )


@app.command(name="set")
def set_(
    name: str,
    description: str = "",
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=AMOUNT",
            help="jobs=5, allocations=50, cpu=4 or memory=8Gi, for all its jobs together. May be given often.",
        ),
    ] = None,
) -> None:
    """Make a namespace, or change it to exactly this."""
    from outrider import codec
    from outrider.cli.client import connect
    from outrider.ids import Namespace
    from outrider.model.access import NamespaceSpec, Quota
    from outrider.v1 import access_pb2

    limits = dict(_limit(text) for text in quota or ())
    spec = NamespaceSpec(name=Namespace(name), description=description, quota=Quota(**limits))
    with connect() as fleet:
        request = access_pb2.SetNamespaceRequest(namespace=codec.to_wire(spec, access_pb2.NamespaceSpec))
        answer = fleet.call(fleet.access.SetNamespace, request)
    print(f"namespace {name}: {'set' if answer.changed else 'it is so already'}")


@app.command()
def delete(name: str) -> None:
    """Delete a namespace in which no job runs."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        fleet.call(fleet.access.DeleteNamespace, access_pb2.DeleteNamespaceRequest(name=name))
    print(f"namespace {name}: deleted")


def _share(used: str, limit: str) -> str:
    return used if limit in {"0", "0Mi"} else f"{used}/{limit}"


def _limit(text: str) -> tuple[str, int]:
    """The field of a quota, and its value."""
    from outrider.errors import InputError
    from outrider.jobspec.units import cpu_millis, size_bytes

    units: dict[str, tuple[str, Callable[[str], int]]] = {
        "jobs": ("jobs", int),
        "allocations": ("allocations", int),
        "cpu": ("cpu_millis", cpu_millis),
        "memory": ("memory_bytes", size_bytes),
    }
    key, separator, amount = text.partition("=")
    if not separator or key not in units:
        raise InputError(f"--quota: {text!r} is not KEY=AMOUNT; keys are {', '.join(units)}")
    field, unit = units[key]
    try:
        return field, unit(amount)
    except ValueError as error:
        raise InputError(f"--quota: {key}: {error}") from error
