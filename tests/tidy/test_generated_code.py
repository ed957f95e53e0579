"""outrider/v1 is what proto/ says."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/protoc", tmp_path], check=True, timeout=60)
    fresh = {path.name: path.read_text() for path in (tmp_path / "outrider/v1").glob("*.py*")}
    committed = {path.name: path.read_text() for path in (ROOT / "outrider/v1").glob("*.py*")}
    assert fresh == committed, "run `make proto` and commit outrider/v1"
