"""Claims of what is host-wide: uid blocks, address blocks, port blocks (DESIGN, decision 14).

Owns `/run/outrider/claims`: one file for each number that is taken, tagged with its owner and locked (flock) as long
as the owner's agent lives. Two fleets on one host never take the same number; who starts again gets its own back. Never
frees what its owner may still use: a number whose agent is away stays taken until its data directory is gone or the
host was booted anew.
"""

import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec

from outrider.errors import HostError
from outrider.model.job import Value

DIRECTORY: Final = Path("/run/outrider/claims")

UID_RANGES: Final = 1024  # sandboxes of one agent at once, each with 65,536 uids
_UID_RANGE_BITS = 16
_UID_BLOCK_BITS = 26  # 1024 ranges
# Block 0 begins at 2**26, above what distributions give to people and to /etc/subuid's first users; the last one would
# hold 2**32 - 1, which means "no uid".
UID_BLOCKS: Final = (1 << (32 - _UID_BLOCK_BITS)) - 2


class Owner(Value, frozen=True, kw_only=True):
    fleet: str
    node: str
    data_directory: str


class _Tag(Value, frozen=True, kw_only=True):
    """What a claim's file says."""

    owner: Owner
    pid: int
    boot_id: str


class Claim:
    """A number that is ours until `release`, or until this process ends and its data directory is gone."""

    def __init__(self, number: int, path: Path, descriptor: int) -> None:
        self.number = number
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the number back: the node leaves its fleet."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def close(self) -> None:
        """Let go of the lock and keep the number: the agent ends, its sandboxes run on."""
        os.close(self._descriptor)


def claim(kind: str, count: int, *, owner: Owner, directory: Path = DIRECTORY) -> Claim:
    """The number that `owner` has of `kind`, or else the lowest free one below `count`.

    Raises HostError where all are taken, or where another agent of the same node runs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        tags = {number: _read(directory / f"{kind}-{number}.json") for number in range(count)}
        own = next((number for number, tag in tags.items() if tag is not None and tag.owner == owner), None)
        for number in [own] if own is not None else range(count):
            tag = tags[number]
            if tag is not None and tag.owner != owner and not _is_gone(tag):
                continue
            taken = _take(directory / f"{kind}-{number}.json", number, owner)
            if taken is not None:
                return taken
    if own is not None:
        raise HostError(
            f"node {owner.node} of fleet {owner.fleet}",
            step=f"claim {kind}: another agent of this node runs on this host",
            hint="end it first, or give this one another node name",
        )
    raise HostError(
        f"claim {kind}",
        step=f"all {count} are taken on this host",
        hint=f"end agents of other fleets, or remove data directories that {directory}/{kind}-*.json name",
    )


def uid_first(block: int, index: int) -> int:
    """The first host uid of the `index`-th sandbox of the agent that claimed `block`."""
    assert 0 <= block < UID_BLOCKS, "a claimed number"
    assert 0 <= index < UID_RANGES, "a sandbox of this agent"
    return ((block + 1) << _UID_BLOCK_BITS) + (index << _UID_RANGE_BITS)


def _read(path: Path) -> _Tag | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Tag)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise HostError(str(path), step=f"read claim: {error}", hint="remove it once no agent uses it") from error


def _is_gone(tag: _Tag) -> bool:
    return tag.boot_id != _boot_id() or not Path(tag.owner.data_directory).is_dir()


def _take(path: Path, number: int, owner: Owner) -> Claim | None:
    """The claim, unless a living agent holds its lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    data = msgspec.json.encode(_Tag(owner=owner, pid=os.getpid(), boot_id=_boot_id()))
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))
    return Claim(number, path, descriptor)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
