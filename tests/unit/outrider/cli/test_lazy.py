"""The table of commands: what it says is what the commands are, and it costs none of them."""

import subprocess
import sys

import pytest
import typer

from outrider.cli.lazy import COMMANDS
from outrider.cli.main import app

GROUP = typer.main.get_command(app)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there_with_its_help(name: str) -> None:
    command = GROUP.commands[name]
    assert command.name == name
    assert " ".join((command.help or "").split()).startswith(COMMANDS[name].help.rstrip("."))


def test_help_imports_no_command() -> None:
    modules = sorted({f"outrider.cli.{entry.module}" for entry in COMMANDS.values()})
    program = (
        "import sys\nfrom outrider.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"assert not set({modules}) & set(sys.modules), sorted(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Commands:" in ended.stdout
