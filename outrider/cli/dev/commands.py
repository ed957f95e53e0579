"""`outrider dev`: start, see, disturb and remove a fleet on this machine."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(invoke_without_command=True)
Name = Annotated[str, typer.Option(help="The fleet's name; several live beside each other.")]
Node = Annotated[str, typer.Argument(metavar="NODE", help="n1, n2 ...")]


@app.callback(invoke_without_command=True)
def dev(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(help="How many nodes, each a network namespace.")] = 3,
    name: Name = "dev",
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready; `dev down` ends it.")] = False,
    agent_config: Annotated[
        Path | None, typer.Option(help="A YAML file whose keys every agent's configuration gets too.")
    ] = None,
) -> None:
    """A fleet on this machine, until Ctrl-C; nothing of it is left afterwards. Needs root."""
    if context.invoked_subcommand is None:
        from outrider.cli.dev.front import start

        start(name, nodes, detach=detach, agent_config=agent_config)


@app.command()
def status(name: Name = "dev", json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Whether the fleet runs, and how its nodes are. Exit 69: it does not."""
    from outrider.cli.dev.front import show_status

    show_status(name, json=json)


@app.command()
def down(name: Name = "dev") -> None:
    """Stop the fleet and remove all of it, also after it was killed."""
    from outrider.cli.dev.front import stop

    stop(name)


@app.command()
def kill(node: Node, name: Name = "dev") -> None:
    """Lose a host: its link, its agent and all that runs there go at once, without a word. `dev heal` boots it."""
    from outrider.cli.dev.disturb import kill as kill_node

    kill_node(name, node)
    print(f"{node} is dead; `outrider dev heal {node}` boots it again")


@app.command()
def partition(node: Node, name: Name = "dev") -> None:
    """Pull a node's cable: everything there goes on, nobody hears of it."""
    from outrider.cli.dev.disturb import partition as partition_node

    partition_node(name, node)
    print(f"{node} is cut off; `outrider dev heal {node}` joins it again")


@app.command()
def heal(node: Node, name: Name = "dev") -> None:
    """Undo `kill` or `partition`."""
    from outrider.cli.dev.disturb import heal as heal_node

    heal_node(name, node)
    print(f"{node} is back")
