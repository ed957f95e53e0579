"""`outrider role`: named sets of grants, each "in these namespaces, these capabilities"."""

from typing import TYPE_CHECKING, Annotated

import typer

from outrider.errors import InputError

if TYPE_CHECKING:
    from outrider.model.access import Grant

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def ls(json: Json = False) -> None:
    """All roles."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import Role
    from outrider.v1 import access_pb2

    with connect() as fleet:
        found = fleet.call(fleet.access.ListRoles, access_pb2.ListRolesRequest()).roles
    roles = [codec.from_wire(role, Role) for role in found]
    if json:
        output.print_json(roles)
        return
    output.print_table(
        ("ROLE", "NAMESPACES", "CAPABILITIES"),
        (
            row
            for role in roles
            for row in (
                [(role.name, ",".join(grant.namespaces), ",".join(grant.capabilities)) for grant in role.grants]
                or [(role.name, "*" if role.name == "admin" else "-", "all" if role.name == "admin" else "-")]
            )
        ),
    )


@app.command(name="set")
def set_(
    name: str,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMESPACE[,..]:CAPABILITY[,..]",
            help="May be given often. Capabilities: read, submit, operate, exec, secrets, admin. "
            "The namespace * is all of them, and what belongs to none.",
        ),
    ] = None,
) -> None:
    """Make a role, or change it to exactly this."""
    from outrider import codec
    from outrider.cli.client import connect
    from outrider.model.access import Role
    from outrider.v1 import access_pb2

    role = Role(name=name, grants=tuple(_grant(text) for text in allow or ()))
    with connect() as fleet:
        request = access_pb2.SetRoleRequest(role=codec.to_wire(role, access_pb2.Role))
        answer = fleet.call(fleet.access.SetRole, request)
    print(f"role {name}: {'set' if answer.changed else 'it is so already'}")


@app.command()
def delete(name: str) -> None:
    """Delete a role that no user has."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        fleet.call(fleet.access.DeleteRole, access_pb2.DeleteRoleRequest(name=name))
    print(f"role {name}: deleted")


def _grant(text: str) -> "Grant":
    from outrider.model.access import Capability, Grant

    namespaces, separator, capabilities = text.partition(":")
    if not separator or not namespaces or not capabilities:
        raise InputError(f"--allow: {text!r} is not NAMESPACE:CAPABILITY, for example team-a:read,submit")
    known = {str(each) for each in Capability}
    wanted = tuple(part.strip() for part in capabilities.split(","))
    unknown = [part for part in wanted if part not in known]
    if unknown:
        raise InputError(f"--allow: {unknown[0]!r} is no capability; known are {', '.join(sorted(known))}")
    return Grant(
        namespaces=tuple(part.strip() for part in namespaces.split(",")),
        capabilities=tuple(Capability(part) for part in wanted),
    )
