"""Archives that a kernel unpacks: their form, as cpio reads it, and the order of modules."""

import subprocess
from pathlib import Path

from outrider.initrd import archive, directory, loading_order, regular, with_parents


def test_an_archive_holds_what_was_put_into_it(tmp_path: Path) -> None:
    made = archive(with_parents((regular("a/b/c", b"content", mode=0o755), directory("a/d"))))
    done = subprocess.run(["busybox", "cpio", "-t"], input=made, capture_output=True, check=True)
    assert done.stdout.split() == [b"a", b"a/b", b"a/b/c", b"a/d"]
    subprocess.run(["busybox", "cpio", "-i", "-d"], input=made, capture_output=True, check=True, cwd=tmp_path)
    assert (tmp_path / "a/b/c").read_bytes() == b"content"
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o755


def test_a_module_comes_after_what_it_needs_and_what_is_built_in_is_left_out(tmp_path: Path) -> None:
    needs = {"net": b"core,failover", "core": b"ring", "ring": b"", "failover": b"ring"}
    modules = {}
    for name, others in needs.items():
        modules[name] = tmp_path / f"{name}.ko"
        modules[name].write_bytes(b"ELF\0license=GPL\0depends=" + others + b"\0")
    assert loading_order(modules, ("net", "built_in", "ring")) == ("ring", "core", "failover", "net")
