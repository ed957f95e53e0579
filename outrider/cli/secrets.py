"""`outrider secret` and `outrider variable`: what jobs are given by name. A secret's value is never an argument.

Argument lists are everybody's to read on a host; files, a prompt and standard input are not.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
variables = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="By which jobs name it.")]
InNamespace = Annotated[str, typer.Option("--namespace", help="Whose jobs may name it.")]
Shown = Annotated[str, typer.Option("--namespace", help="Of this one alone.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
_BYTES_MAX = 256 * 1024


@app.command()
def put(
    name: Name,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="What it holds; - is standard input. Without: a prompt.")
    ] = None,
    namespace: InNamespace = "default",
    json: Json = False,
) -> None:
    """Make a secret, or its next version; jobs that name it are rolled, or told, as they want."""
    _put(name, _value(file), namespace, variable=False, json=json)


@app.command()
def ls(namespace: Shown = "", json: Json = False) -> None:
    """All secrets: everything but what they hold."""
    _ls(namespace, variable=False, json=json)


@app.command()
def delete(name: Name, namespace: InNamespace = "default") -> None:
    """Forget a secret in all its versions. Refused while a job names it."""
    _delete(name, namespace)


@app.command()
def rekey() -> None:
    """Seal all secrets under another key: a new one in the controller's key file, or the one in its environment."""
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.stores.RekeySecrets, stores_pb2.RekeySecretsRequest())
    print(f"{answer.sealed} versions sealed anew, under key {answer.key}")


@variables.command("put")
def put_variable(
    name: Name,
    value: Annotated[str, typer.Argument(help="In the clear.")] = "",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="What it holds; - is standard input.")] = None,
    namespace: InNamespace = "default",
    json: Json = False,
) -> None:
    """Make a variable, or its next version: as a secret, but operators may read it."""
    from outrider.errors import InputError

    if bool(value) == (file is not None):
        raise InputError("give either a value or --file")
    _put(name, _value(file) if file is not None else value.encode(), namespace, variable=True, json=json)


@variables.command("ls")
def ls_variables(namespace: Shown = "", json: Json = False) -> None:
    """All variables, and what they hold."""
    _ls(namespace, variable=True, json=json)


@variables.command("delete")
def delete_variable(name: Name, namespace: InNamespace = "default") -> None:
    """Forget a variable in all its versions. Refused while a job names it."""
    _delete(name, namespace)


def _put(name: str, value: bytes, namespace: str, *, variable: bool, json: bool) -> None:
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        request = stores_pb2.PutSecretRequest(name=name, namespace=namespace, value=value, variable=variable)
        answer = fleet.call(fleet.stores.PutSecret, request)
    if json:
        output.print_json({"version": answer.version, "changed": answer.changed, "notes": list(answer.notes)})
        return
    print(f"{name}, version {answer.version}" + ("" if answer.changed else ": holds that already"))
    for note in answer.notes:
        print(f"  {note}")


def _ls(namespace: str, *, variable: bool, json: bool) -> None:
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.belongings import SecretInfo
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        found = fleet.call(fleet.stores.ListSecrets, stores_pb2.ListSecretsRequest(namespace=namespace)).secrets
    infos = [info for each in found if (info := codec.from_wire(each, SecretInfo)).variable is variable]
    if json:
        output.print_json(infos)
        return
    shown = ("VALUE",) if variable else ()
    output.print_table(
        ("NAME", "NAMESPACE", "VERSION", "CHANGED", "JOBS", *shown),
        (
            (
                info.name,
                info.namespace,
                str(info.version),
                f"{output.age(info.changed_at_s)} ago",
                ", ".join(info.jobs),
                *((info.value,) if variable else ()),
            )
            for info in infos
        ),
    )


def _delete(name: str, namespace: str) -> None:
    from outrider.cli.client import connect
    from outrider.v1 import stores_pb2

    with connect() as fleet:
        fleet.call(fleet.stores.DeleteSecret, stores_pb2.DeleteSecretRequest(name=name, namespace=namespace))
    print(f"{name}: deleted")


def _value(file: Path | None) -> bytes:
    import getpass
    import sys

    from outrider.errors import InputError

    if file is None:
        if not sys.stdin.isatty():
            raise InputError("there is no terminal to ask at; give --file FILE, or --file - for standard input")
        value = getpass.getpass("value: ")
        if getpass.getpass("again: ") != value:
            raise InputError("the two were not the same; nothing was changed")
        return value.encode()
    if str(file) == "-":
        return sys.stdin.buffer.read(_BYTES_MAX + 1)
    try:
        with file.open("rb") as opened:
            return opened.read(_BYTES_MAX + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
