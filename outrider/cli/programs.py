"""`outrider controller` and `outrider agent`: become that program."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="Its configuration, YAML.", exists=True, dir_okay=False)]


def controller(
    config: Config,
    journal: Annotated[
        str, typer.Option(help="sqlite: one controller. consul: several, one of which leads. Default: as configured.")
    ] = "",
) -> None:
    """Run a controller here, until it is told to stop."""
    _become("controller", "--config", str(config), *(["--journal", journal] if journal else []))


def agent(
    config: Config,
    purge: Annotated[bool, typer.Option(help="Stop all that runs on this node, remove it, and end.")] = False,
) -> None:
    """Run this host's agent, until it is told to stop; what it started goes on."""
    _become("agent", "--config", str(config), *(["--purge"] if purge else []))


def _become(module: str, *arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - the point
