"""docs/CLI.md, made from the commands themselves: `python -m outrider.cli.reference > docs/CLI.md`."""

import sys
from collections.abc import Iterator
from typing import Any

import typer

from outrider.cli.main import app

_HEAD = """\
# Command line

Made by `python -m outrider.cli.reference` from the commands. Exit codes: 0 done and true; 1 the fleet said no;
64 usage or bad input; 69 nobody to talk to; 130 interrupted.
"""


def reference() -> str:
    lines = [_HEAD]
    for command, path in _commands(typer.main.get_command(app), "outrider"):
        arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
        lines += [f"## `{' '.join([path, *arguments])}`", "", " ".join((command.help or "").split()), ""]
        rows = [_row(each) for each in command.params if each.param_type_name == "option" and "--help" not in each.opts]
        if rows:
            lines += ["| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, path: str) -> Iterator[tuple[Any, str]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        if not command.hidden:
            yield command, path
        return
    for name in sorted(inner):
        yield from _commands(inner[name], f"{path} {name}")


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper().replace("_", "-")
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text = " ".join(str(option.help or "").split()).replace("|", "\\|")
    return f"| {names} | {text} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
