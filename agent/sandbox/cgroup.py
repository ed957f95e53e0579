"""Control groups: which kind this host has, where a sandbox's are, what it used, and their removal.

crun makes and limits them; this module reads and removes. v1 and hybrid hosts have one tree for each controller, v2
hosts one tree for all. Never touches a mount, nor a group that is not below the path it is given.
"""

import errno
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path, PurePosixPath

from agent.sandbox.spec import Usage
from outrider.errors import HostError

ROOT = Path("/sys/fs/cgroup")
_REMOVE_S_MAX = 2.0
_REMOVE_RETRY_S = 0.002
_NS_PER_S = 1_000_000_000
_US_PER_S = 1_000_000
_PAGE = re.compile(r"^(\d+)([KMG]B)$")  # hugetlb.2MB.max
_PAGE_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


class Version(StrEnum):
    V1 = "v1"
    HYBRID = "hybrid"  # v1, and an empty v2 tree at `unified` that crun refuses (agent/hybrid.py)
    V2 = "v2"


class Cgroups:
    """`root` is where the host mounts its hierarchies."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self.version = detect(root)
        self._v2 = self.version is Version.V2

    def usage(self, path: str) -> Usage:
        """What the sandbox at `path` ("outrider/FLEET/NODE/ID") used so far; zeros where it is gone."""
        if self._v2:
            return Usage(
                cpu_s=keyed(self._text("", path, "cpu.stat"), "usage_usec") / _US_PER_S,
                memory_bytes=_working_set(
                    self._text("", path, "memory.current"), self._text("", path, "memory.stat"), "inactive_file"
                ),
                oom_kills=keyed(self._text("", path, "memory.events"), "oom_kill"),
            )
        return Usage(
            cpu_s=number(self._text("cpuacct", path, "cpuacct.usage")) / _NS_PER_S,
            memory_bytes=_working_set(
                self._text("memory", path, "memory.usage_in_bytes"),
                self._text("memory", path, "memory.stat"),
                "total_inactive_file",
            ),
            oom_kills=self.oom_kills(path),
        )

    def set_io_weight(self, path: str, weight: int) -> bool:
        """Whether the kernel has such weights. crun knows one of the files alone, and not the one that BFQ has."""
        names = ("io.bfq.weight", "io.weight") if self._v2 else ("blkio.bfq.weight", "blkio.weight")
        for name in names:
            file = self._root / ("" if self._v2 else "blkio") / path / name
            if file.exists():
                file.write_text(f"{weight}\n")
                return True
        return False

    def limit_hugepages(self, path: str, limits: Mapping[int, int]) -> None:
        """Of each size of page so many bytes, and of the others none; nothing where no controller counts them."""
        directory = self._root / ("" if self._v2 else "hugetlb") / path
        for pattern in ("hugetlb.*.max", "hugetlb.*.limit_in_bytes"):
            for file in directory.glob(pattern):
                number, unit = _PAGE.match(file.name.split(".")[1]).groups()  # type: ignore[union-attr]  # the kernel's
                file.write_text(f"{limits.get(int(number) * _PAGE_UNITS[unit], 0)}\n")

    def oom_kills(self, path: str) -> int:
        """How many processes of the sandbox the kernel killed for want of memory."""
        if self._v2:
            return keyed(self._text("", path, "memory.events"), "oom_kill")
        return keyed(self._text("memory", path, "memory.oom_control"), "oom_kill")

    def children(self, path: str) -> frozenset[str]:
        """The names of the groups right below `path`, in whatever tree."""
        names: set[str] = set()
        for tree in self._trees():
            directory = tree / path
            if directory.is_dir():
                names.update(child.name for child in directory.iterdir() if child.is_dir())
        return frozenset(names)

    def remove(self, path: str) -> None:
        """Kill all that runs at `path` and below, then remove it from every tree. Gone already is fine.

        Raises HostError where something in it survives a SIGKILL for seconds: an uninterruptible wait.
        """
        for tree in self._trees():
            directory = tree / path
            if directory.is_dir():
                _remove_tree(directory)
        if self.version is Version.V1:
            # crun keeps files there for each sandbox, although no v2 tree is mounted (agent/hybrid.py): plain ones.
            shutil.rmtree(self._root / "unified" / path, ignore_errors=True)

    def remove_with_empty_parents(self, path: str) -> None:
        """Remove `path`, then the groups above it that hold nothing else: another node or fleet keeps its own."""
        self.remove(path)
        trees = [*self._trees()]
        if self.version is Version.V1:
            trees.append(self._root / "unified")
        for tree in trees:
            for parent in (*PurePosixPath(path).parents,)[:-1]:
                with suppress(OSError):  # in use, not empty, or not there: all mean that it is not ours to remove
                    (tree / parent).rmdir()

    def _trees(self) -> Iterator[Path]:
        if self._v2:
            yield self._root
            return
        for tree in self._root.iterdir():
            if tree.is_dir() and not tree.is_symlink() and tree.name != "unified":
                yield tree

    def _text(self, controller: str, path: str, file: str) -> str:
        try:
            return (self._root / controller / path / file).read_text()
        except OSError as error:
            # ENODEV: the group went away between open and read.
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return ""
            raise


def detect(root: Path = ROOT) -> Version:
    """Which kind of control groups is mounted at `root`."""
    if (root / "cgroup.controllers").exists():
        return Version.V2
    if (root / "unified" / "cgroup.procs").exists():
        return Version.HYBRID
    return Version.V1


def number(text: str) -> int:
    """The number in a one-number file; 0 where it is empty."""
    return int(text) if text.strip() else 0


def keyed(text: str, key: str) -> int:
    """The number after `key` in a file of "key number" lines; 0 where it has none."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _working_set(usage: str, stat: str, inactive: str) -> int:
    # The kernel drops inactive file pages before it kills: they are no sign of need.
    return max(0, number(usage) - keyed(stat, inactive))


def _remove_tree(directory: Path) -> None:
    for child in [child for child in directory.iterdir() if child.is_dir()]:
        _remove_tree(child)
    deadline_s = time.monotonic() + _REMOVE_S_MAX
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise HostError(str(directory), step=f"remove control group: {error.strerror}") from error
            _kill_all(directory)
            time.sleep(_REMOVE_RETRY_S)  # the killed leave their group a moment after they died
        else:
            return


def _kill_all(directory: Path) -> None:
    try:
        pids = (directory / "cgroup.procs").read_text().split()
    except FileNotFoundError:
        return
    for pid in pids:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
