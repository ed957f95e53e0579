"""The program that `outrider deploy` runs on a host, on a disk that is too small for what it is to unpack."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from outrider.cli.deploy.remote import program

pytestmark = pytest.mark.host
OLD, NEW = "0.0.9-old", "0.1.0-new"
BYTES = 64 << 20

# $1: a directory with the bundle and the programs; $2, $3: the old and the new version.
UPGRADE = """
mount -t tmpfs none /usr/local/bin  # where the command is linked
mount -t tmpfs -o size=32M none /opt
versions=/opt/outrider/versions
mkdir -p $versions/$2; echo $2 > $versions/$2/complete; ln -s $versions/$2 /opt/outrider/current
cp $1/bundle.tar $1/pushed.tar; python3 $1/install.py
ls -A $versions; readlink /opt/outrider/current
mount -o remount,size=256M /opt
cp $1/bundle.tar $1/pushed.tar; python3 $1/install.py; python3 $1/activate.py
ls -A $versions; readlink /opt/outrider/current
"""


def bundle(path: Path) -> None:
    """One wheel: small to push, large to unpack."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.bin", bytes(BYTES))
    wheel = content.getvalue()
    manifest = {"id": NEW, "wheels": {"large.whl": hashlib.sha256(wheel).hexdigest()}}
    with tarfile.open(path, "w") as tar:
        for name, data in (("manifest.json", json.dumps(manifest).encode()), ("large.whl", wheel)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_a_disk_that_fills_up_in_the_middle_of_an_upgrade_leaves_the_version_before(tmp_path: Path) -> None:
    bundle(tmp_path / "bundle.tar")
    (tmp_path / "install.py").write_text(program("install", bundle=str(tmp_path / "pushed.tar")))
    (tmp_path / "activate.py").write_text(program("activate", version=NEW))
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", UPGRADE, "upgrade", str(tmp_path), OLD, NEW],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    failed, left, current, *mended = done.stdout.splitlines()
    assert json.loads(failed) == {"error": "the disk is full: /opt/outrider needs about 1024 MiB"}
    assert (left, current) == (OLD, f"/opt/outrider/versions/{OLD}"), "nothing half-done is left"
    assert [json.loads(line) for line in mended[:2]] == [{"version": NEW, "new": True}, {"before": OLD}]
    assert mended[2:] == [OLD, NEW, f"/opt/outrider/versions/{NEW}"]
    assert not (tmp_path / "pushed.tar").exists()
