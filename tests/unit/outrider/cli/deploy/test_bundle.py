"""What is pushed to hosts: distributions made wheels again, and the bytecode of their modules."""

import io
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from outrider.cli.deploy.bundle import make_wheel
from outrider.cli.deploy.host import extract


def test_a_wheel_is_what_is_installed_here_without_its_tests() -> None:
    found = distribution("h11")
    name, content = make_wheel(found)
    assert name == f"h11-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.read("h11/__init__.py") == Path(str(found.locate_file("h11/__init__.py"))).read_bytes()
        listed = {line.split(",")[0] for line in archive.read(f"h11-{found.version}.dist-info/RECORD").decode().split()}
        assert listed == set(archive.namelist())
        assert not [name for name in listed if "/tests/" in name]


def test_a_wheel_for_several_pythons_says_so() -> None:
    assert make_wheel(distribution("py-consul"))[0].endswith("-py2.py3-none-any.whl")


def test_bytecode_is_taken_as_it_came(tmp_path: Path) -> None:
    found = distribution("h11")
    modules = frozenset(str(found.locate_file(file)) for file in found.files or () if file.suffix == ".py")
    extract(make_wheel(found, compiled=modules)[1], tmp_path)
    for source in tmp_path.rglob("*.py"):
        source.write_text("raise SystemError('it was compiled anew')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import h11; print(h11.__file__, h11.Connection)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/h11/__init__.py <class 'h11._connection.Connection'>\n"


def test_of_what_is_hardly_used_only_the_loaded_modules_are_taken() -> None:
    found = distribution("xds-protos")
    loaded = frozenset({str(found.locate_file("xds/__init__.py")), str(found.locate_file("envoy/__init__.py"))})
    with zipfile.ZipFile(io.BytesIO(make_wheel(found, compiled=loaded)[1])) as archive:
        assert sorted(name for name in archive.namelist() if name.endswith(".py")) == [
            "envoy/__init__.py",
            "xds/__init__.py",
        ]
