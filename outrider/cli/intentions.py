"""`outrider intention`: who may call whom, and who was refused."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outrider.model.mesh import Intention
    from outrider.model.traffic import Permission

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Source = Annotated[str, typer.Argument(help="The calling service, or '*'.")]
Destination = Annotated[str, typer.Argument(help="The called service, or '*'.")]


@app.command()
def create(  # noqa: PLR0917 - typer's: each is an option
    source: Source,
    destination: Destination,
    deny: Annotated[bool, typer.Option("--deny", help="Forbid it instead; wins over a job's `allow:`.")] = False,
    http: Annotated[
        list[str] | None,
        typer.Option(
            help='A rule for requests, "allow GET,HEAD /public/* x-token=7": action, methods or *, a path (* at its '
            "end: all that begin so), headers. Again for more; the first that matches decides."
        ),
    ] = None,
    description: Annotated[str, typer.Option(help="Why, for those who come after.")] = "",
    json: Json = False,
) -> None:
    """Let SOURCE call DESTINATION; what nothing allows is denied."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import InputError
    from outrider.model.mesh import Action, Intention
    from outrider.v1 import mesh_pb2, operator_pb2

    action = Action.DENY if deny else Action.ALLOW
    permissions = tuple(_permission(text) for text in http or ())
    if permissions and deny:
        raise InputError("--deny and --http: rules deny what none of them allows; leave --deny out")
    wanted = Intention(
        source=source,
        destination=destination,
        action=Action.DENY if permissions else action,
        description=description,
        permissions=permissions,
    )
    with connect() as fleet:
        request = operator_pb2.CreateIntentionRequest(intention=codec.to_wire(wanted, mesh_pb2.Intention))
        made = codec.from_wire(fleet.call(fleet.stub.CreateIntention, request), Intention)
    if json:
        output.print_json(made)
    else:
        rules = f", {len(made.permissions)} rules for requests" if made.permissions else ""
        print(f"{made.source} -> {made.destination}: {'http' if rules else made.action}{rules} ({made.id})")


@app.command()
def ls(json: Json = False) -> None:
    """All intentions, those that decide first at the top."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.mesh import Intention
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        found = fleet.call(fleet.stub.ListIntentions, operator_pb2.ListIntentionsRequest()).intentions
    intentions = [codec.from_wire(intention, Intention) for intention in found]
    if json:
        output.print_json(intentions)
        return
    output.print_table(
        ("SOURCE", "DESTINATION", "ACTION", "OWNER", "ID", "DESCRIPTION"),
        (
            (
                each.source,
                each.destination,
                _action(each),
                each.owner and f"job {each.owner}",
                each.id,
                each.description,
            )
            for each in intentions
        ),
    )


@app.command()
def check(source: Source, destination: Destination, json: Json = False) -> None:
    """Whether SOURCE may call DESTINATION, what decides it, and what sidecars really refused. Exit 1: denied."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import RefusedError
    from outrider.model.mesh import Intention, ObservedRefusal
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.CheckIntentionRequest(source=source, destination=destination)
        answer = fleet.call(fleet.stub.CheckIntention, request)
    decided_by = codec.from_wire(answer.decided_by, Intention) if answer.HasField("decided_by") else None
    refusals = [codec.from_wire(refusal, ObservedRefusal) for refusal in answer.refusals]
    if json:
        output.print_json({"allowed": answer.allowed, "decided_by": decided_by, "refusals": refusals})
    else:
        print(f"{source} -> {destination}: {'allowed' if answer.allowed else 'denied'}, {_because(decided_by)}")
        for refusal in refusals:
            print(
                f"  {output.age(refusal.at_s)} ago {refusal.alloc} on {refusal.node} refused {refusal.source_spiffe}: "
                f"{refusal.rule or 'no intention allowed it'}"
            )
    if not answer.allowed:
        hint = "" if decided_by and not decided_by.owner else f"; `outrider intention create {source} {destination}`"
        raise RefusedError("denied", f"{source} may not call {destination}{hint}")


@app.command()
def delete(source: Source, destination: Destination) -> None:
    """Take an intention made by hand away. A job's goes with its `allow:` line."""
    from outrider.cli.client import connect
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.DeleteIntentionRequest(source=source, destination=destination)
        fleet.call(fleet.stub.DeleteIntention, request)
    print(f"{source} -> {destination}: deleted")


def _permission(text: str) -> "Permission":
    """Raises InputError."""
    from outrider.errors import InputError
    from outrider.model.traffic import HttpMatch, Permission, TextMatch, Verdict

    parts = text.split()
    if len(parts) < 3 or parts[0] not in ("allow", "deny") or not parts[2].startswith("/"):
        raise InputError(f'--http {text!r}: expected ACTION METHODS PATH, like "allow GET,HEAD /public/*"')
    action, methods, path, *headers = parts
    pairs = [header.partition("=") for header in headers]
    if any(not name or not is_ for name, is_, _ in pairs):
        raise InputError(f"--http {text!r}: a header is NAME=VALUE, or NAME=* where it need only be there")
    prefix = path.endswith("*")
    return Permission(
        action=Verdict(action),
        match=HttpMatch(
            path_exact="" if prefix else path,
            path_prefix=path[:-1] if prefix else "",
            methods=() if methods == "*" else tuple(methods.upper().split(",")),
            headers=tuple(
                TextMatch(name=name, present=True) if value == "*" else TextMatch(name=name, exact=value)
                for name, _, value in pairs
            ),
        ),
    )


def _action(intention: "Intention") -> str:
    return "http" if intention.permissions else intention.action


def _because(decided_by: object) -> str:
    from outrider.model.mesh import Intention

    if not isinstance(decided_by, Intention):
        return "by default: no intention names them"
    owner = f" of job {decided_by.owner}" if decided_by.owner else ""
    rule = f"{decided_by.source} -> {decided_by.destination} {_action(decided_by)}"
    return f"by the intention {rule}{owner} ({decided_by.id})"
