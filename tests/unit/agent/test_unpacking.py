"""Archives that somebody else made: what is let in, and what is named and refused."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from agent.belongings import unpacking
from agent.belongings.unpacking import unpack
from outrider.errors import InputError

BYTES = 1024 * 1024


def entry(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], how: str = "w:gz") -> Path:
    with tarfile.open(path, how) as archive:  # type: ignore[call-overload]
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


@pytest.mark.parametrize("how", ["w", "w:gz", "w:xz", "w:bz2"])
def test_files_directories_and_links_within_are_unpacked(tmp_path: Path, how: str) -> None:
    made = tar(
        tmp_path / "a",
        entry("./bin", type=tarfile.DIRTYPE),
        entry("bin/tool", b"x" * 10, mode=0o4755, uid=33),
        entry("deep/er/file", b"y"),
        entry("bin/link", type=tarfile.SYMTYPE, linkname="../deep/er/file"),
        entry("bin/same", type=tarfile.LNKTYPE, linkname="bin/tool"),
        entry("deep/er/file", b"later"),
        how=how,
    )
    root = tmp_path / "root"
    unpack(made, root, bytes_max=BYTES)
    assert (root / "bin/link").read_bytes() == b"later"
    assert (root / "bin/same").stat().st_ino == (root / "bin/tool").stat().st_ino
    status = (root / "bin/tool").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, 0)


def test_a_zip_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("bin/tool")
        info.external_attr = (stat.S_IFREG | 0o755) << 16
        archive.writestr(info, b"x")
    unpack(tmp_path / "a.zip", tmp_path / "root", bytes_max=BYTES)
    assert stat.S_IMODE((tmp_path / "root/bin/tool").stat().st_mode) == 0o755


SYMLINK, HARDLINK = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([entry("../out", b"x")], "'../out' leads out of the archive"),
        ([entry("/etc/passwd", b"x")], "'/etc/passwd' leads out"),
        ([entry("a/../../out", b"x")], "leads out"),
        ([entry("l", type=SYMLINK, linkname="/etc")], "the link 'l' leads out of the archive, to '/etc'"),
        ([entry("a/l", type=SYMLINK, linkname="../../x")], "the link 'a/l' leads out"),
        ([entry("d", type=SYMLINK, linkname="."), entry("d/f", b"x")], "'d' is a link or a file"),
        ([entry("h", type=HARDLINK, linkname="../x")], "leads out"),
        ([entry("l", type=SYMLINK, linkname="x"), entry("h", type=HARDLINK, linkname="l")], "is no file before it"),
        ([entry("h", type=HARDLINK, linkname="absent")], "'h' is of 'absent', which is no file before it"),
        ([entry("dev/sda", type=tarfile.BLKTYPE)], "'dev/sda' is a device or a pipe"),
        ([entry("null", type=tarfile.CHRTYPE)], "is a device or a pipe"),
        ([entry("pipe", type=tarfile.FIFOTYPE)], "is a device or a pipe"),
        ([entry("big", bytes(BYTES + 1))], "larger than the 1048576 bytes that this node allows"),
        ([entry(f"f{at}", bytes(BYTES // 3)) for at in range(4)], "larger than"),
        ([entry("d", type=tarfile.DIRTYPE), entry("d", b"x")], "'d' is a directory already"),
        ([entry("f", b"x"), entry("f/g", b"x")], "'f' is a link or a file"),
    ],
)
def test_what_leads_out_or_is_too_much_is_refused_by_name(
    tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], told: str
) -> None:
    with pytest.raises(InputError) as raised:
        unpack(tar(tmp_path / "a", *entries), tmp_path / "root", bytes_max=BYTES)
    assert told in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "FILES_MAX", 3)
    with pytest.raises(InputError, match="more than 3 entries"):
        unpack(tar(tmp_path / "a", *(entry(f"{at}") for at in range(4))), tmp_path / "root", bytes_max=BYTES)


def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    with pytest.raises(InputError, match="it is no archive that can be read"):
        unpack(tmp_path / "a", tmp_path / "root", bytes_max=BYTES)


def test_one_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a", entry("f", bytes(500_000)), how="w")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(InputError, match="it is no archive that can be read"):
        unpack(tmp_path / "cut", tmp_path / "root", bytes_max=BYTES)
