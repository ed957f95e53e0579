"""The program that runs on a host: a bundle is unpacked whole, and only where it belongs."""

import io
import zipfile
from pathlib import Path

import pytest

from outrider.cli.deploy.host import StepError, extract


def wheel(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return content.getvalue()


@pytest.mark.parametrize("name", ["../evil.py", "a/../../evil.py", "/etc/evil.py"])
def test_a_bundle_that_leads_out_of_its_version_is_refused(name: str, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    with pytest.raises(StepError, match=r"the bundle is damaged: .* leads out of it"):
        extract(wheel("good.py", name), site)
    assert not list(tmp_path.rglob("evil.py"))


def test_what_stays_within_is_unpacked(tmp_path: Path) -> None:
    extract(wheel("a/b.py", "c.py"), tmp_path)
    assert (tmp_path / "a/b.py").read_bytes() == (tmp_path / "c.py").read_bytes() == b"x"
