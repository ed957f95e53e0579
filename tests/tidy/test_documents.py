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


def named_tests(text: str) -> list[tuple[str, str]]:
    """File, as far as it is named, and function, "" where the whole file is meant."""
    return re.findall(r"`((?:[a-z/]+/)?test_[a-z_]+\.py)(?:::(test_[a-z_0-9]+))?`", text)


def is_there(file: str, function: str) -> bool:
    """In one of the files that the name may mean."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if path.as_posix().endswith(f"/{file}")]
    return any(f"def {function or 'test_'}" in path.read_text() for path in found)


def test_every_test_that_the_security_model_names_is_there() -> None:
    named = named_tests((ROOT / "docs/SECURITY.md").read_text())
    assert len(named) > 20
    assert not [name for name in named if not is_there(*name)]


def test_every_benchmark_point_that_is_met_names_the_test_that_shows_it() -> None:
    table = (ROOT / "docs/SECURITY.md").read_text().partition("| point | here | test |")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    assert len(rows) > 20
    for point, here, test in rows:
        answer = re.match(r"yes|partly|no|not applicable", here)
        assert answer, f"{point}: neither yes, partly, no nor not applicable"
        if answer[0] in {"yes", "partly"}:
            functions = [function for _, function in named_tests(test)]
            assert functions, f"{point}: no test"
            assert all(functions), f"{point}: a test is a file and a function in it"
