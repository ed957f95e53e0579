"""The rules of the layout: who may import whom, what a core may touch, how large a file may grow."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENTS = ("agent", "controller", "sidecar")
PACKAGES = ("outrider", *COMPONENTS)
FILES = sorted(
    path.relative_to(ROOT)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not path.is_relative_to(ROOT / "outrider/v1")
)
# What a pure core may use: data and computation, nothing that reads the world.
PURE_STDLIB = {
    "__future__", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "hashlib", "heapq",
    "ipaddress", "itertools", "math", "operator", "random", "re", "string", "textwrap", "typing", "types", "array",
    "urllib.parse",
}  # fmt: skip
PURE_SHARED = {"ids", "model", "errors"}
LINES_MAX = 500


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_components_do_not_import_each_other(path: Path) -> None:
    others = set(COMPONENTS) - {path.parts[0]}
    if path in (Path("agent/app.py"), Path("agent/library.py")):
        others -= {"sidecar"}  # the agent's process hosts the sidecar library (DESIGN, Layout)
    assert not {name for name in imports(path) if name.split(".")[0] in others}


@pytest.mark.parametrize("path", [path for path in FILES if "core" in path.parts], ids=str)
def test_a_core_is_pure(path: Path) -> None:
    component = path.parts[0]
    allowed_roots = {"msgspec"} | ({"numpy"} if component == "controller" else set())
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "outrider":
            assert parts[1] in PURE_SHARED, f"{path} imports {name}"
        elif parts[0] in PACKAGES:
            assert parts[:2] == [component, "core"], f"{path} imports {name}"
        elif parts[0] in sys.stdlib_module_names:
            assert parts[0] in PURE_STDLIB or ".".join(parts[:2]) in PURE_STDLIB, f"{path} imports {name}"
        else:
            assert parts[0] in allowed_roots, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_has_one_purpose(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LINES_MAX, f"{path}: split it by what it owns"
    assert path.stem not in {"utils", "helpers", "manager", "common"}
    assert text.startswith('"""'), f"{path}: say what the module owns"
