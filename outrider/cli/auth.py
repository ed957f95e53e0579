"""`outrider auth`: who the fleet takes you for, and what you may do."""

from typing import Annotated

import typer

from outrider.errors import InputError, RefusedError

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def whoami(json: Json = False) -> None:
    """Your name here, how you showed it, and your roles."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import Grant
    from outrider.v1 import access_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.access.WhoAmI, access_pb2.WhoAmIRequest())
    grants = [codec.from_wire(grant, Grant) for grant in answer.grants]
    if json:
        told = {"caller": answer.caller, "by": answer.by, "roles": tuple(answer.roles), "grants": grants}
        output.print_json({**told, "expires_at_s": answer.expires_at_s})
        return
    output.print_fields(
        (
            ("user", answer.caller),
            ("shown by", answer.by),
            ("ends in", output.left(answer.expires_at_s) if answer.expires_at_s else ""),
            ("roles", ", ".join(answer.roles) or "none"),
            ("may", "everything" if "admin" in answer.roles else ""),
            *(("may", f"{','.join(grant.namespaces)}: {', '.join(grant.capabilities)}") for grant in grants),
        )
    )


@app.command()
def can(
    capability: Annotated[str, typer.Argument(help="read, submit, operate, exec, secrets or admin.")],
    namespace: Annotated[str, typer.Option(help="Default: what belongs to no namespace.")] = "*",
) -> None:
    """Whether you may. Exit 1: no."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    name = f"CAPABILITY_{capability.upper()}"
    if name not in access_pb2.Capability.keys():  # noqa: SIM118 - an enum wrapper, no mapping
        raise InputError(f"{capability!r} is no capability; known are read, submit, operate, exec, secrets, admin")
    request = access_pb2.CanRequest(capability=access_pb2.Capability.Value(name), namespace=namespace)
    with connect() as fleet:
        answer = fleet.call(fleet.access.Can, request)
    where = "everywhere" if namespace == "*" else f"in namespace {namespace}"
    if not answer.allowed:
        raise RefusedError("denied", f"no: none of your roles allows {capability} {where}")
    print(f"yes: role {answer.role} allows {capability} {where}")
