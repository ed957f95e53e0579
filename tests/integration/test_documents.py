"""The generated references are what their sources say."""

from pathlib import Path

from outrider.cli.reference import reference

ROOT = Path(__file__).parents[2]


def test_the_reference_of_the_command_line_is_what_the_commands_say() -> None:
    assert (ROOT / "docs/CLI.md").read_text() == reference(), "python -m outrider.cli.reference > docs/CLI.md"
