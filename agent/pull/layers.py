"""A program of its own: makes an image's files of its layers. So the agent can end it at any moment.

    python -m agent.pull.layers BLOBS ROOT BYTES_MAX

It reads the layers' names, the lowest first, from its standard input: one a line, each a file of BLOBS whose content
somebody has checked already. Before it opens the first it makes ROOT its own root: no name in a layer leads out.
Ends with 0; with 65 and a sentence where trying again would not help, with 75 where it may.
"""
# A path's object for each file of an image costs more than the file.
# ruff: noqa: PTH101, PTH102, PTH108, PTH112, PTH208, PTH211

import errno
import os
import resource
import shutil
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

import zstandard  # before this process has another root, where it is not

from outrider.errors import InputError

_HOSTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM})  # not the image's fault
_BLOCK_BYTES = 1024 * 1024
_RECORD_BYTES = 512
_MEMORY_BYTES_MAX = 1024 * 1024 * 1024
_TRAILER = bytes(4 * _RECORD_BYTES)  # some tools leave off what ends an archive
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_GZIP, _ZSTD, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW_MAX = 128 * 1024 * 1024  # the format's own advice to whoever reads it


def main() -> NoReturn:
    blobs, root, bytes_max = sys.argv[1:]
    # The headers of an archive are read whole.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    os.umask(0)
    Path(root).mkdir(mode=0o755)
    directory = os.open(blobs, os.O_PATH | os.O_DIRECTORY)
    os.chroot(root)
    os.chdir("/")
    used, number = 0, 0
    for line in sys.stdin:
        name, number = line.strip(), number + 1
        try:
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
                stream = Stream(file, bytes_max=int(bytes_max), used=used)
                Layer(stream).unpack()
                used = stream.used
        except (InputError, tarfile.TarError, zlib.error, zstandard.ZstdError, ValueError, ArithmeticError) as error:
            print(f"layer {number}, {name[:12]}: {error}", file=sys.stderr)
            sys.exit(os.EX_DATAERR)
        except (MemoryError, RecursionError):
            print(f"layer {number}, {name[:12]}: its headers are too large, or its paths too long", file=sys.stderr)
            sys.exit(os.EX_DATAERR)
        except OSError as error:
            print(f"layer {number}, {name[:12]}: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(os.EX_TEMPFAIL if error.errno in _HOSTS else os.EX_DATAERR)
    sys.exit(0)


class Stream:
    """An archive's bytes, one after the other, however they are compressed; as much of a file as tarfile needs."""

    def __init__(self, file: IO[bytes], *, bytes_max: int, used: int) -> None:
        self.used = used  # of `bytes_max`, by the layers before too
        self._bytes_max = bytes_max
        self.last = b""  # that was read
        self._file = file
        self._position = 0
        self._ready, self._taken = b"", 0
        self._ended = False
        self._inflate: zlib._Decompress | None = None
        self._zstd: zstandard.ZstdDecompressionReader | None = None
        start = file.read(_RECORD_BYTES)
        for magic, name in ((_BZIP2, "bzip2"), (_XZ, "xz")):
            if start.startswith(magic):
                raise InputError(f"it is compressed by {name}; this node takes gzip, zstd, or none")
        if start.startswith(_GZIP):
            self._inflate = zlib.decompressobj(_GZIP_WINDOW)
        elif start.startswith(_ZSTD):
            file.seek(0)
            decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
            self._zstd = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
        self._compressed = start

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        pieces, missing = [], count
        while missing:
            if self._taken == len(self._ready):
                self._ready, self._taken = self._more(), 0
                if not self._ready:
                    break
            piece = self._ready[self._taken : self._taken + missing]
            self._taken += len(piece)
            missing -= len(piece)
            pieces.append(piece)
        self._position += count - missing
        self.last = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("it cannot be read from its beginning to its end")
        while self._position < position and self.read(min(position - self._position, _BLOCK_BYTES)):
            pass

    @property
    def is_over(self) -> bool:
        """Whether the last that was read is no longer the archive's own."""
        return self._ended

    def _more(self) -> bytes:
        if self._ended:
            return b""
        piece = self._piece()
        self.used += len(piece)
        if self.used > self._bytes_max:
            raise InputError(f"it is larger than the {self._bytes_max >> 20} MiB that this node has for images")
        if not piece:
            self._ended = True
            return _TRAILER
        return piece

    def _piece(self) -> bytes:
        if self._zstd is not None:
            piece = self._zstd.read(_BLOCK_BYTES)
            if not piece:  # whether a frame was whole it does not tell: what ends an archive must be there
                raise InputError("its compressed data ends in the middle")
            return piece
        if self._inflate is None:
            piece, self._compressed = self._compressed or self._file.read(_BLOCK_BYTES), b""
            return piece
        while True:
            if self._inflate.eof:  # another may follow: each of its files may be compressed for itself
                self._compressed = self._inflate.unused_data + self._file.read(_BLOCK_BYTES)
                if not self._compressed.startswith(_GZIP):
                    return b""
                self._inflate = zlib.decompressobj(_GZIP_WINDOW)
            data = self._inflate.unconsumed_tail or self._compressed or self._file.read(_BLOCK_BYTES)
            self._compressed = b""
            piece = self._inflate.decompress(data, _BLOCK_BYTES)
            if piece:
                return piece
            if not data and not self._inflate.eof:
                raise InputError("its compressed data ends in the middle")


class Layer:
    """One, laid over what is there in this process's own root."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._brought: set[str] = set()  # by this layer: its whiteouts are of what the ones below it have
        self._parents: set[str] = set()  # directories that are there, or links to such
        self._times: dict[str, float] = {}  # of directories, which change while something is put into them

    def unpack(self) -> None:
        tar = tarfile.open(fileobj=self._stream, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115 - owns nothing
        while (member := tar.next()) is not None:
            tar.members = []  # else it keeps them all
            path = _inside(member.name)
            directory, _, name = path.rpartition("/")
            if name.startswith(_WHITEOUT):
                self._remove(directory, name)
                continue
            if path:
                self._make_parents(directory)
                self._vacate(path, member)
            _MAKERS.get(member.type, _unknown)(self._stream, member, path)
            self._brought.add(path)
            if not member.islnk():
                self._describe(member, path)
            self._stream.seek(tar.offset)
        if any(self._stream.last):  # tarfile takes a header that it cannot read for the end
            raise InputError(f"it cannot be read from its byte {tar.offset} on")
        for path, time_s in self._times.items():
            with suppress(FileNotFoundError, NotADirectoryError):  # replaced by something else further on
                os.utime(f"/{path}", (time_s, time_s))

    def _remove(self, directory: str, name: str) -> None:
        if name == _OPAQUE:
            self._empty(directory)
            return
        path = f"{directory}/{name.removeprefix(_WHITEOUT)}".lstrip("/")
        if name == _WHITEOUT or path.rpartition("/")[2] in (".", ".."):
            raise InputError(f"{name!r} in {directory!r} removes nothing that can be there")
        if path not in self._brought:
            _remove(path)

    def _empty(self, directory: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(f"/{directory}"):
                path = f"{directory}/{name}".lstrip("/")
                if path not in self._brought:
                    _remove(path)
                elif stat.S_ISDIR(os.lstat(f"/{path}").st_mode):
                    self._empty(path)

    def _make_parents(self, directory: str) -> None:
        if directory in self._parents or not directory:
            return
        self._make_parents(directory.rpartition("/")[0])
        if not os.path.isdir(f"/{directory}"):
            if os.path.lexists(f"/{directory}"):
                raise InputError(f"{directory!r} is a file, or a link that leads nowhere, and something lies below it")
            os.mkdir(f"/{directory}", 0o755)
        self._parents.add(directory)
        self._brought.add(directory)

    def _vacate(self, path: str, member: tarfile.TarInfo) -> None:
        try:
            there = os.lstat(f"/{path}").st_mode
        except FileNotFoundError:
            return
        if not (member.isdir() and stat.S_ISDIR(there)):
            _remove(path)

    def _describe(self, member: tarfile.TarInfo, path: str) -> None:
        target = f"/{path}"
        os.lchown(target, member.uid, member.gid)
        if not member.issym():
            os.chmod(target, member.mode & 0o7777)  # after the owner: a change of that drops set-uid bits
        if member.isdir():
            self._times[path] = member.mtime
        else:
            os.utime(target, (member.mtime, member.mtime), follow_symlinks=False)


def _inside(name: str) -> str:
    """Its path from the root on, without a slash at either end."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InputError(f"{name[:200]!r} leads out of it")
    return "/".join(parts)


def _make_file(stream: Stream, member: tarfile.TarInfo, path: str) -> None:
    if member.issparse():
        raise InputError(f"{path!r} is stored with holes, which images do not have")
    descriptor = os.open(f"/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        stream.seek(member.offset_data)
        left = member.size
        while left:
            piece = stream.read(min(left, _BLOCK_BYTES))
            left -= len(piece)
            if stream.is_over or not piece:
                raise InputError(f"it ends in the middle of {path!r}")
            _write(descriptor, piece)
    except OSError as error:  # it speaks of a number
        raise OSError(error.errno, error.strerror, f"/{path}") from error
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _make_directory(_stream: Stream, _member: tarfile.TarInfo, path: str) -> None:
    if path:
        with suppress(FileExistsError):
            os.mkdir(f"/{path}", 0o700)


def _make_link(_stream: Stream, member: tarfile.TarInfo, path: str) -> None:
    os.symlink(member.linkname, f"/{path}")


def _make_hard_link(_stream: Stream, member: tarfile.TarInfo, path: str) -> None:
    source = _inside(member.linkname)
    try:
        os.link(f"/{source}", f"/{path}", follow_symlinks=False)
    except OSError as error:
        wrong = f"{path!r} is a hard link to {member.linkname[:200]!r}: {error.strerror}"
        raise InputError(wrong) from error


def _make_node(_stream: Stream, member: tarfile.TarInfo, path: str) -> None:
    kind = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}[member.type]
    device = 0 if kind == stat.S_IFIFO else os.makedev(member.devmajor, member.devminor)
    if kind == stat.S_IFCHR and device == 0:
        raise InputError(f"{path!r} is what overlayfs marks removed files with, which images do not have")
    os.mknod(f"/{path}", kind | 0o600, device)


def _unknown(_stream: Stream, member: tarfile.TarInfo, path: str) -> None:
    raise InputError(f"{path!r} is of a kind that images do not have, {member.type!r}")


def _remove(path: str) -> None:
    target = f"/{path}"
    try:
        if stat.S_ISDIR(os.lstat(target).st_mode):
            shutil.rmtree(target)
        else:
            os.unlink(target)
    except (FileNotFoundError, NotADirectoryError):  # a layer below does not have it after all
        pass


_MAKERS: dict[bytes, Callable[[Stream, tarfile.TarInfo, str], None]] = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE), _make_file),
    tarfile.DIRTYPE: _make_directory,
    tarfile.SYMTYPE: _make_link,
    tarfile.LNKTYPE: _make_hard_link,
    **dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), _make_node),
}

if __name__ == "__main__":
    main()
