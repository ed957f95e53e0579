"""Which host uids belong to which sandbox: one range of UID_RANGE for each, in the order sidecar, tasks.

The ranges of an allocation lie side by side, so that one nftables rule names its tasks. They are kept in
ALLOCATION/uids.json, written before anything runs under them; of the node's own, the responder has the first range and
the shared sidecar the last.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from agent.sandbox.spec import UID_RANGE
from outrider.errors import HostError
from outrider.ids import AllocId, TaskName
from outrider.model.job import Value

_FILE = "uids.json"
_RESERVED = 4  # for a sidecar and three tasks: few allocations have more


def fits_reserved(tasks: Sequence[TaskName]) -> bool:
    return 1 + len(tasks) <= _RESERVED


class AllocUids(Value, frozen=True, kw_only=True):
    """`first`: of the sidecar's range; the tasks' follow in this order."""

    first: int
    tasks: tuple[TaskName, ...]

    @property
    def sidecar(self) -> int:
        return self.first

    @property
    def workload(self) -> tuple[int, int]:
        """The tasks' uids: the first, and how many."""
        return self.first + UID_RANGE, UID_RANGE * max(len(self.tasks), 1)

    def task(self, name: TaskName) -> int:
        return self.first + UID_RANGE * (1 + self.tasks.index(name))


class Uids:
    """`first`, `ranges`: the node's own block of host uids."""

    def __init__(self, *, first: int, ranges: int) -> None:
        self.responder = first
        self.shared_sidecar = first + (ranges - 1) * UID_RANGE
        self._first = first
        self._taken = [False] * ranges
        self._taken[0] = self._taken[-1] = True
        self._allocs: dict[AllocId, AllocUids] = {}
        self._next = 1

    def load(self, directories: Mapping[AllocId, Path]) -> None:
        """What earlier agents of this node gave out. A file that cannot be read counts as absent."""
        for alloc, directory in directories.items():
            try:
                known = msgspec.json.decode((directory / _FILE).read_bytes(), type=AllocUids)
            except (OSError, msgspec.DecodeError):
                continue
            start = (known.first - self._first) // UID_RANGE
            if start > 0 and start + len(known.tasks) < len(self._taken):  # else of another block, before a reboot
                self._mark(start, 1 + len(known.tasks), taken=True)
                self._allocs[alloc] = known

    def known(self, alloc: AllocId) -> bool:
        return alloc in self._allocs

    def reserve(self) -> int:
        """The first uid of a sidecar whose allocation is to come. Raises HostError where the block is used up."""
        start = self._gap(_RESERVED)
        self._mark(start, _RESERVED, taken=True)
        return self._first + start * UID_RANGE

    def free(self, reserved: int) -> None:
        self._mark((reserved - self._first) // UID_RANGE, _RESERVED, taken=False)

    def give(
        self, alloc: AllocId, tasks: Sequence[TaskName], directory: Path, *, reserved: int | None = None
    ) -> AllocUids:
        """The allocation's, given before or now. Raises HostError where the block is used up, or the disk refuses.

        `reserved`: where its sidecar runs already; `fits_reserved` said that its tasks have room beside it.
        """
        known = self._allocs.get(alloc)
        if known is not None and known.tasks == tuple(tasks):
            return known
        if reserved is not None:
            self.free(reserved)
        start = self._gap(1 + len(tasks)) if reserved is None else (reserved - self._first) // UID_RANGE
        uids = AllocUids(first=self._first + start * UID_RANGE, tasks=tuple(tasks))
        unfinished = directory / f"{_FILE}.new"
        try:
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            unfinished.write_bytes(msgspec.json.encode(uids))
            unfinished.replace(directory / _FILE)
        except OSError as error:
            raise HostError(str(directory), step=f"write the allocation's uids: {error.strerror}") from error
        self._mark(start, 1 + len(tasks), taken=True)
        self._allocs[alloc] = uids
        self._next = start + 1 + len(tasks)
        return uids

    def take_back(self, alloc: AllocId, directory: Path) -> None:
        known = self._allocs.pop(alloc, None)
        if known is not None:
            (directory / _FILE).unlink(missing_ok=True)
            self._mark((known.first - self._first) // UID_RANGE, 1 + len(known.tasks), taken=False)

    def _gap(self, length: int) -> int:
        """It goes on after the last one given: a uid's leftovers should meet no new owner soon."""
        last = len(self._taken) - length
        start: int
        for start in itertools.chain(range(self._next, last + 1), range(1, last + 1)):
            if not any(self._taken[start : start + length]):
                return start
        hint = "stop allocations, or spread the job over more nodes"
        raise HostError("host uids", step=f"all {len(self._taken)} ranges of this node are in use", hint=hint)

    def _mark(self, start: int, length: int, *, taken: bool) -> None:
        self._taken[start : start + length] = [taken] * length
