"""`outrider token`: secrets that let nodes join, and users in. Each is shown once."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def create(
    node: Annotated[
        list[str] | None, typer.Option(help="The name that a node may join as; may be given often.")
    ] = None,
    uses: Annotated[int, typer.Option(help="How many nodes may join with it. Default: 1.")] = 0,
    user: Annotated[str, typer.Option(help="A token for this user, instead of one for nodes.")] = "",
    valid: Annotated[str, typer.Option(help="Default: 1h for nodes, 30d for a user.")] = "",
    json: Json = False,
) -> None:
    """Make a token and print it. It carries the fingerprint of the fleet's CA: no other fleet is ever shown it."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import InputError
    from outrider.jobspec.units import duration_s
    from outrider.model.access import Token
    from outrider.v1 import access_pb2

    try:
        valid_s = duration_s(valid or ("30d" if user else "1h"))
    except ValueError as error:
        raise InputError(f"--valid: {error}") from error
    request = access_pb2.CreateTokenRequest(
        kind=access_pb2.TOKEN_KIND_USER if user else access_pb2.TOKEN_KIND_JOIN,
        user=user,
        nodes=node or (),
        uses=uses or (0 if user else max(1, len(node or ()))),
        valid_s=valid_s,
    )
    with connect() as fleet:
        answer = fleet.call(fleet.access.CreateToken, request)
    token = codec.from_wire(answer.token, Token)
    if json:
        output.print_json({"token": token, "secret": answer.secret})
        return
    output.say(f"token {token.id}, valid for {output.left(token.expires_at_s)}; it is shown this once:")
    print(answer.secret)


@app.command()
def ls(json: Json = False) -> None:
    """All tokens that are valid; never their secrets."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import Token
    from outrider.v1 import access_pb2

    with connect() as fleet:
        found = fleet.call(fleet.access.ListTokens, access_pb2.ListTokensRequest()).tokens
    tokens = [codec.from_wire(token, Token) for token in found]
    if json:
        output.print_json(tokens)
        return
    output.print_table(
        ("TOKEN", "KIND", "FOR", "USES", "ENDS IN", "MADE BY"),
        (
            (
                token.id,
                token.kind,
                token.user or ",".join(token.nodes) or "any new node",
                str(token.uses_left or "-"),
                output.left(token.expires_at_s),
                token.created_by,
            )
            for token in tokens
        ),
    )


@app.command()
def revoke(token: Annotated[str, typer.Argument(help="Its id, as `token ls` shows it.")]) -> None:
    """End a token: it is worth nothing from here on. Nodes that joined with it stay."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        fleet.call(fleet.access.RevokeToken, access_pb2.RevokeTokenRequest(id=token))
    print(f"token {token}: revoked")
