"""Commands are looked for where execvp would."""

import pytest

from agent.sandbox.executable import candidates


@pytest.mark.parametrize(
    ("command", "path", "expected"),
    [
        ("sh", "/usr/bin:/bin", ("/usr/bin/sh", "/bin/sh")),
        ("sh", "", ("/usr/local/bin/sh", "/usr/bin/sh", "/bin/sh")),
        ("./app", "/bin", ("/task/app",)),
        ("bin/app", "/bin", ("/task/bin/app",)),
        ("/opt/app", "/bin", ("/opt/app",)),
        ("app", ".:/bin", ("/task/app", "/bin/app")),
    ],
)
def test_candidates(command: str, path: str, expected: tuple[str, ...]) -> None:
    assert candidates(command, path, "/task") == expected
