"""The few mount calls that the agent makes itself, without starting a program for each.

Owns no state: who mounts, unmounts. Mounts are made in the agent's own mount namespace.
"""

import ctypes
import errno
import os
import re
from pathlib import Path

from outrider.errors import HostError

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)


def mount_tmpfs(target: Path, *, size_bytes: int, uid: int, mode: int, devices: bool = False) -> None:
    """A private file system in memory at `target`, of at most `size_bytes`, owned by `uid` (and that gid)."""
    options = f"size={size_bytes},mode={mode:o},uid={uid},gid={uid}"
    _mount("tmpfs", target, "tmpfs", _MS_NOSUID | (0 if devices else _MS_NODEV), options)


def mount_hugetlbfs(target: Path, *, page_bytes: int, size_bytes: int, uid: int) -> None:
    """Files of hugepages, at most `size_bytes` of them, for `uid` alone."""
    options = f"pagesize={page_bytes},size={size_bytes},mode=700,uid={uid},gid={uid}"
    _mount("hugetlbfs", target, "hugetlbfs", _MS_NOSUID | _MS_NODEV, options)


def resize_tmpfs(target: Path, *, size_bytes: int) -> None:
    """At once; refused where more is in it."""
    _mount("tmpfs", target, "tmpfs", _MS_REMOUNT | _MS_NOSUID | _MS_NODEV, f"size={size_bytes}")


def mount_overlay(
    target: Path, *, layers: tuple[str, ...], upper: Path | None = None, work: Path | None = None
) -> None:
    """`layers`, the uppermost first, as one tree: read-only, or with what is written to it in `upper`."""
    # A colon parts layers and a backslash escapes: a path that has either must carry it escaped.
    lower = ":".join(_escaped(layer).replace(":", "\\:") for layer in layers)
    options = f"lowerdir={lower}"
    if upper is not None:
        options += f",upperdir={_escaped(upper)},workdir={_escaped(work)}"
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if upper is None else 0)
    _mount("overlay", target, "overlay", flags, options)


def keep_in_memory(directory: Path) -> None:
    """Make `directory`, and let nothing below it reach a disk: it is on a file system in memory, or becomes one."""
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    if _file_system(directory) not in _IN_MEMORY:
        _mount("tmpfs", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=711")


def unmount(target: Path) -> bool:
    """Whether something was mounted at `target`. Lazily: what holds it open keeps it until it lets go."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        return False
    raise HostError(str(target), step=f"unmount: {os.strerror(number)}")


def unmount_below(directory: Path) -> None:
    """Unmount all that is mounted at `directory` or below it, the innermost first."""
    prefix = f"{directory}/"
    points = [point for point in mount_points() if point == str(directory) or point.startswith(prefix)]
    for point in reversed(points):
        unmount(Path(point))


def mount_points() -> list[str]:
    """Where anything is mounted in this mount namespace, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [_OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split(" ", 5)[4]) for line in lines]


def _file_system(directory: Path) -> str:
    """The kind of the one that `directory` is on."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.split(" ", 3)[2] == wanted:
            return line.partition(" - ")[2].split(" ")[0]
    return ""


def _escaped(path: object) -> str:
    return str(path).replace("\\", "\\\\").replace(",", "\\,")


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    done = _libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    if done != 0:
        raise HostError(str(target), step=f"mount {kind}: {os.strerror(ctypes.get_errno())}", hint="is the agent root?")
