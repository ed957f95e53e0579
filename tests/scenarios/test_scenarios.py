"""The stories still go as they were told."""

from pathlib import Path

import pytest

from tests.scenarios.script import played, scripts


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_the_story_goes_as_told(path: Path) -> None:
    text = path.read_text()
    assert played(text) == text, "if this is what you want: python -m tests.scenarios, and review the diff"
