"""What is documented is what is there."""

import ast
from pathlib import Path

from controller.core.kinds import Kind

ROOT = Path(__file__).parents[2]


def job_file_keys() -> set[str]:
    """Every key that the job file's reader knows: the constant tuples of words in its modules."""
    keys = set()
    for path in (ROOT / "outrider/jobspec").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple) and len(node.elts) > 1:
                words = [part.value for part in node.elts if isinstance(part, ast.Constant)]
                keys.update(word for word in words if isinstance(word, str) and word.replace("_", "").isalpha())
    return keys


def test_every_key_of_a_job_file_is_in_its_reference() -> None:
    text = (ROOT / "docs/JOBS.md").read_text()
    keys = job_file_keys()
    assert {"job", "groups", "upstreams", "static"} <= keys
    assert not {key for key in keys if f"`{key}`" not in text and f"`{key}:" not in text}


def test_every_kind_of_event_is_in_its_reference() -> None:
    text = (ROOT / "docs/EVENTS.md").read_text()
    assert not {str(kind) for kind in Kind if str(kind) not in text}
