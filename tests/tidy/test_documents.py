"""What is documented is what is there."""

import ast
import re
from pathlib import Path

from controller.core.kinds import Kind
from outrider.jobspec.reference import reference

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


def test_the_list_of_all_keys_is_what_the_reader_looks_for() -> None:
    text = (ROOT / "docs/JOB-KEYS.md").read_text()
    assert text == reference(), "run `python -m outrider.jobspec.reference > docs/JOB-KEYS.md`"
    missing = {key for key in job_file_keys() if f"| `{key}` |" not in text}
    assert not missing, "outrider/jobspec/reference.py: a mapping of them is not in its file"


def test_every_kind_of_event_is_in_its_reference() -> None:
    text = (ROOT / "docs/EVENTS.md").read_text()
    assert not {str(kind) for kind in Kind if str(kind) not in text}


def test_every_test_that_the_security_model_names_is_there() -> None:
    text = (ROOT / "docs/SECURITY.md").read_text()
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_access.py"}
    named = re.findall(r"`(?:[a-z/]+/)?(test_[a-z_]+\.py)(?:::(test_[a-z_0-9]+))?`", text)
    assert len(named) > 20
    everything = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for file, function in named:
        assert file == "test_access.py" or file in files, file
        assert f"def {function or 'test_'}" in everything, function
