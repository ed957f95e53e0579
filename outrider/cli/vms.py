"""`outrider vm`: what only a virtual machine has."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.command()
def console(
    target: Annotated[str, typer.Argument(metavar="ALLOC|JOB", help="A job means its first running allocation.")],
) -> None:
    """Sit at the guest's serial console: what it writes from now on, and your keys. Ctrl-] leaves."""
    from outrider.cli.client import connect
    from outrider.cli.streams import sit_at_console

    with connect() as fleet:
        sit_at_console(fleet, target)
