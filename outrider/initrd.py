"""An initial file system for a Linux kernel: files as a cpio archive, and the kernel modules that they bring along.

Pure but for `loading_order`, which reads the modules. Archives one after the other are one: later ones add to it.
https://www.kernel.org/doc/html/latest/driver-api/early-userspace/buffer-format.html
"""

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from outrider.model.job import Value

_MEMBER = "070701"  # the "newc" format
_DEPENDENCIES = re.compile(rb"\0depends=([^\0]*)\0")


class Entry(Value, frozen=True, kw_only=True):
    """`path` without a leading /; its directories come before it. `content` of a link is where it leads."""

    path: str
    mode: int  # with its kind, as stat has it
    content: bytes = b""


def directory(path: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def regular(path: str, content: bytes, *, mode: int = 0o644) -> Entry:
    return Entry(path=path, mode=stat.S_IFREG | mode, content=content)


def archive(entries: Iterable[Entry]) -> bytes:
    """All of root."""
    return b"".join((*map(_packed, entries), _packed(Entry(path="TRAILER!!!", mode=0))))


def with_parents(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The directories that `entries` lie in, before them."""
    found: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            path = "/".join(parts[:depth])
            found.setdefault(path, directory(path))
        found[entry.path] = entry
    return tuple(found.values())


def loading_order(modules: Mapping[str, Path], wanted: Iterable[str]) -> tuple[str, ...]:
    """`wanted` and what they depend on, in the order to load them. What `modules` lacks is built into its kernel."""
    loaded: dict[str, None] = {}

    def add(name: str) -> None:
        if name not in modules or name in loaded:
            return
        found = _DEPENDENCIES.search(modules[name].read_bytes())
        for dependency in found[1].decode().split(",") if found else ():
            add(dependency)
        loaded[name] = None

    for name in wanted:
        add(name)
    return tuple(loaded)


def _packed(entry: Entry) -> bytes:
    path = entry.path.encode() + b"\0"
    fields = (0, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(path), 0)
    header = _MEMBER.encode() + b"".join(b"%08X" % field for field in fields) + path
    return _padded(header) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
