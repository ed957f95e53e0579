"""Layers made into a tree by the program that does it: what they bring, what they take away, what they may not."""

import asyncio
import bz2
import gzip
import hashlib
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from outrider.model.job import MIB
from tests.integration.registry import entry, layer

pytestmark = pytest.mark.host


class Made:
    def __init__(self, directory: Path) -> None:
        self.blobs, self.root = directory / "blobs", directory / "root"
        self.blobs.mkdir()

    def unpack(self, *layers: bytes, bytes_max: int = 8 * MIB) -> tuple[int, str]:
        names = [hashlib.sha256(each).hexdigest() for each in layers]
        for name, content in zip(names, layers, strict=True):
            (self.blobs / name).write_bytes(content)
        argv = (sys.executable, "-m", "agent.pull.layers", str(self.blobs), str(self.root), str(bytes_max))
        text = "".join(f"{name}\n" for name in names)
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr.strip()

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


async def test_files_are_as_the_layer_has_them(made: Made) -> None:
    entries = (
        entry(".", type=tarfile.DIRTYPE, mode=0o751),
        entry("srv/", type=tarfile.DIRTYPE, mode=0o2775, uid=7, gid=8, mtime=1000),
        entry("/srv/tool", b"tool", mode=0o4755, uid=70_000, gid=9, mtime=2000),
        entry("srv/again", type=tarfile.LNKTYPE, linkname="/srv/tool"),
        entry("srv/link", type=tarfile.SYMTYPE, linkname="/elsewhere", uid=5),
        entry("srv/pipe", type=tarfile.FIFOTYPE),
        entry("dev/full", type=tarfile.CHRTYPE, devmajor=1, devminor=7, mode=0o666),
        entry(f"{'long/' * 60}name", b"far"),
    )
    assert made.unpack(layer(*entries)) == (0, "")
    tool, directory = (made.root / "srv/tool").stat(), (made.root / "srv").stat()
    assert (stat.S_IMODE(made.root.stat().st_mode), stat.S_IMODE(directory.st_mode)) == (0o751, 0o2775)
    assert (directory.st_uid, directory.st_gid, directory.st_mtime) == (7, 8, 1000)
    assert (stat.S_IMODE(tool.st_mode), tool.st_uid, tool.st_gid, tool.st_mtime) == (0o4755, 70_000, 9, 2000)
    assert (made.root / "srv/again").stat().st_ino == tool.st_ino
    assert str((made.root / "srv/link").readlink()) == "/elsewhere"
    assert (made.root / "srv/link").lstat().st_uid == 5
    assert (made.root / "dev/full").stat().st_rdev == os.makedev(1, 7)
    assert (made.root / "srv/pipe").is_fifo()
    assert (made.root / f"{'long/' * 60}name").read_bytes() == b"far"


async def test_a_layer_replaces_and_removes_what_the_ones_below_it_have(made: Made) -> None:
    below = layer(
        *(entry(name, b"old") for name in ("kept", "gone", "file", "all/a", "all/deep/b", "tree/x/y")),
        entry("lib", type=tarfile.SYMTYPE, linkname="usr/lib"),
        entry("usr/lib", type=tarfile.DIRTYPE, mode=0o755),
        entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    )
    above = layer(
        entry(".wh.gone"),
        entry(".wh.null"),
        entry(".wh.never-there"),
        entry("all/new", b"new"),
        entry("all/.wh..wh..opq"),  # it may stand behind what this layer brings itself
        entry("file/below", b"new"),
        entry("lib/through", b"new"),
        entry("tree", b"now a file"),
    )
    refused = made.unpack(below, above)
    assert refused[0] == os.EX_DATAERR
    assert "'file' is a file, or a link that leads nowhere, and something lies below it" in refused[1]
    (made.root.parent / "second").mkdir()
    made = Made(made.root.parent / "second")
    directory = entry("file", type=tarfile.DIRTYPE, mode=0o755)
    assert made.unpack(below, layer(directory), above) == (0, "")
    expected = "all all/new file file/below kept lib tree usr usr/lib usr/lib/through"
    assert made.names() == expected.split()
    assert (made.root / "tree").read_bytes() == b"now a file"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("a/../../up", b"x")], "'a/../../up' leads out of it"),
        ([entry("hard", type=tarfile.LNKTYPE, linkname="../../etc/passwd")], "'../../etc/passwd' leads out of it"),
        (
            [entry("hard", type=tarfile.LNKTYPE, linkname="etc/passwd")],
            "'hard' is a hard link to 'etc/passwd': No such",
        ),
        ([entry("etc", type=tarfile.SYMTYPE, linkname="/outside"), entry("etc/x")], "'etc' is a file, or a link that"),
        ([entry("x", type=tarfile.CHRTYPE)], "'x' is what overlayfs marks removed files with"),
        ([entry(".wh...")], "'.wh...' in '' removes nothing that can be there"),
        ([entry("x", type=b"Q")], "'x' is of a kind that images do not have"),
        ([entry("x", bytes(9 * MIB))], "it is larger than the 8 MiB that this node has for images"),
        ([entry("/".join("d" * 1500))], "its paths too long"),
        ([entry("x" * 300)], "File name too long"),
    ],
)
async def test_what_no_image_should_have_is_refused_by_name(
    made: Made, entries: list[tuple[tarfile.TarInfo, bytes]], words: str
) -> None:
    content = gzip.compress(layer(entry("before"), *entries))
    code, said = made.unpack(layer(entry("first")), content)
    assert code == os.EX_DATAERR
    assert said.startswith(f"layer 2, {hashlib.sha256(content).hexdigest()[:12]}: ")
    assert words in said


async def test_links_lead_to_places_in_the_image_alone(made: Made, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    entries = (
        entry(str(outside), type=tarfile.DIRTYPE, mode=0o755),
        entry("link", type=tarfile.SYMTYPE, linkname=str(outside)),
        entry("up", type=tarfile.SYMTYPE, linkname="../../../../../../../.." + str(outside)),
        entry("link/a", b"x"),
        entry("up/b", b"x"),
    )
    assert made.unpack(layer(*entries)) == (0, "")
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in (made.root / str(outside).lstrip("/")).iterdir()) == ["a", "b"]


async def test_archives_as_they_come(made: Made) -> None:
    content = os.urandom(3 * MIB)
    whole = layer(entry("one", content), entry("two", b"2"))
    cut = whole[: whole.rindex(b"two") + 512 + 1]  # neither the last file's padding nor the end of the archive
    pieces = b"".join(gzip.compress(whole[at : at + MIB]) for at in range(0, len(whole), MIB))
    packed = zstandard.ZstdCompressor(level=1)
    frames = b"".join(packed.compress(whole[at : at + MIB]) for at in range(0, len(whole), MIB))
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"toc "  # as zstd:chunked ends
    archives = (whole, gzip.compress(whole), pieces, gzip.compress(cut), packed.compress(whole), frames + skipped)
    for number, archive in enumerate((*archives, gzip.compress(b""))):
        directory = made.root.parent / str(number)
        directory.mkdir()
        assert Made(directory).unpack(archive) == (0, "")
        if number < len(archives):
            assert (directory / "root/one").read_bytes() == content
            assert (directory / "root/two").read_bytes() == b"2"


@pytest.mark.parametrize("broken", ["compressed", "file", "header", "zstd", "frame", "window", "bzip2"])
async def test_a_broken_archive_is_no_short_one(made: Made, broken: str) -> None:
    whole = layer(entry("one", os.urandom(2000)), entry("two", b"2"), entry("three", b"3"))
    at = whole.rindex(b"two")
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    archive, words = {
        "compressed": (gzip.compress(whole)[:-200], "its compressed data ends in the middle"),
        "file": (gzip.compress(whole[:1800]), "it ends in the middle of 'one'"),
        "header": (whole[: at + 100] + b"9" + whole[at + 101 :], f"it cannot be read from its byte {at} on"),
        "zstd": (b"\x28\xb5\x2f\xfd" + whole, "zstd decompress error"),
        "frame": (zstandard.compress(whole[:3072], 1), "its compressed data ends in the middle"),
        "window": (wide.compress(whole) + wide.flush(), "zstd decompress error"),
        "bzip2": (bz2.compress(whole), "it is compressed by bzip2"),
    }[broken]
    code, said = made.unpack(archive)
    assert (code, words in said) == (os.EX_DATAERR, True), said


async def test_a_full_disk_is_worth_another_try(made: Made, tmp_path: Path) -> None:
    argv = f"mount -t tmpfs -o size=1m none {tmp_path}/small && cd {tmp_path}/small && exec {sys.executable} -m"
    (tmp_path / "small").mkdir()
    (made.blobs / "layer").write_bytes(layer(entry("big", bytes(2 * MIB))))
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "sh", "-c", f"{argv} agent.pull.layers {made.blobs} root {MIB * 8}"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    _, said = await process.communicate(b"layer\n")
    assert process.returncode == os.EX_TEMPFAIL
    assert said.decode().strip() == "layer 1, layer: /big: No space left on device"
