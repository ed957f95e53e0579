"""`outrider`: the commands, and what their ends mean to scripts. Imports little: `lazy` names the commands.

Exit codes: 0 done and true; 1 the fleet said no; 64 usage or bad input; 69 nobody to talk to; 130 interrupted.
"""

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from outrider import __version__
from outrider.cli.exits import Interrupt, RemoteExit
from outrider.cli.lazy import LazyGroup
from outrider.errors import OutriderError

_USAGE = 64
_INTERRUPTED = 130
_PIPE_CLOSED = 141  # as a shell tells of SIGPIPE

app = typer.Typer(
    name="outrider",
    cls=LazyGroup,
    help="Runs a fleet: processes and VMs as equals in one mesh.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(*, shown: bool) -> None:
    if shown:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    address: Annotated[
        str,
        typer.Option(
            envvar="OUTRIDER_ADDRESS",
            help="unix:/PATH, or HOST:PORT with OUTRIDER_TOKEN, or with OUTRIDER_CA, OUTRIDER_CERT and OUTRIDER_KEY; "
            "of several controllers HOST:PORT,HOST:PORT, of which any that is there will do. "
            "Default: the dev fleet that runs here.",
        ),
    ] = "",
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool, typer.Option("--version", callback=lambda value: _version(shown=value), is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Runs a fleet: processes and VMs as equals in one mesh."""
    if address:
        os.environ["OUTRIDER_ADDRESS"] = address


def main() -> None:
    """The program. Never returns, never shows a traceback for what a user or a peer did."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except Interrupt:
        _end(_INTERRUPTED)
    except RemoteExit as ended:
        _end(ended.code)
    except OutriderError as error:
        print(f"outrider: {error}", file=sys.stderr)
        _end(error.exit_code)
    except BrokenPipeError:
        # Python flushes standard output once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(_PIPE_CLOSED)
    except SystemExit as ended:
        # 2 is the parser's own; a remote command's 2 comes as RemoteExit.
        _end(_USAGE if ended.code == 2 else ended.code)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupt


def _end(code: int | str | None) -> None:
    sys.exit(code)
