"""The allocations, column by column: a row each, in the order of their serials. Owns storage and look-up by serial.

Never decides anything. Rows move when forgotten ones are squeezed out: what outlives a call refers to serials.
The first nine columns are durable; `observed`, `healthy` and `healthy_since_s` are what the agents said last.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.model.allocation import AllocStatus, CopyRole

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int32]
Codes = npt.NDArray[np.int8]
Times = npt.NDArray[np.float64]

# Of the column `status`. What has not ended is told by `observed`.
LIVE, COMPLETE, FAILED, LOST, FORGOTTEN = range(5)
ENDED_CODES = {AllocStatus.COMPLETE: COMPLETE, AllocStatus.FAILED: FAILED, AllocStatus.LOST: LOST}
ENDED_STATUSES = {code: status for status, code in ENDED_CODES.items()}
# Of the column `desired`.
RUN, STOP = range(2)
# Of the column `role`.
ORDINARY, CANARY, SUCCESSOR = range(3)
ROLES = (CopyRole.ORDINARY, CopyRole.CANARY, CopyRole.SUCCESSOR)
# Of the column `observed`.
OBSERVED = tuple(AllocStatus)
OBSERVED_CODES = {status: code for code, status in enumerate(OBSERVED)}

DURABLE = ("serial", "group", "index", "node", "desired", "status", "role", "created_s", "changed_s")
_COLUMNS = (*DURABLE, "observed", "healthy", "healthy_since_s")
_SQUEEZE_MIN = 4096
_FEW = 8


class AllocTable:
    def __init__(self) -> None:
        self.size = 0
        self.forgotten = 0
        self.serial: Ints = np.zeros(64, np.int64)
        self.group: Shorts = np.zeros(64, np.int32)  # State.groups' key
        self.index: Shorts = np.zeros(64, np.int32)
        self.node: Shorts = np.zeros(64, np.int32)  # NodeTable's reference; -1: nowhere
        self.desired: Codes = np.zeros(64, np.int8)
        self.status: Codes = np.zeros(64, np.int8)
        self.role: Codes = np.zeros(64, np.int8)
        self.created_s: Times = np.zeros(64)
        self.changed_s: Times = np.zeros(64)  # created, placed, told to stop, or ended
        self.observed: Codes = np.zeros(64, np.int8)
        self.healthy: Bools = np.zeros(64, np.bool_)
        self.healthy_since_s: Times = np.zeros(64)

    def add(  # noqa: PLR0917  a row's columns
        self, first_serial: int, group: int, first_index: int, nodes: Shorts, at_s: float, role: int = ORDINARY
    ) -> slice:
        """Rows for as many new allocations as there are nodes."""
        count = len(nodes)
        self._reserve(self.size + count)
        rows = slice(self.size, self.size + count)
        self.serial[rows] = np.arange(first_serial, first_serial + count)
        self.group[rows] = group
        self.index[rows] = np.arange(first_index, first_index + count)
        self.node[rows] = nodes
        self.desired[rows] = RUN
        self.status[rows] = LIVE
        self.role[rows] = role
        self.created_s[rows] = at_s
        self.changed_s[rows] = at_s
        self._unobserve(rows)
        self.size += count
        return rows

    def restore(self, columns: dict[str, bytes]) -> None:
        """Take over the durable columns of a snapshot; the table was empty."""
        count = len(columns["serial"]) // 8
        self._reserve(count)
        for name in DURABLE:
            column = getattr(self, name)
            column[:count] = np.frombuffer(columns[name], column.dtype)
        self._unobserve(slice(0, count))
        self.size = count

    def row(self, serial: int) -> int | None:
        """Where `serial` is; None where it never was, or is forgotten."""
        if not self.size:
            return None
        row = serial - int(self.serial[0])
        if not (0 <= row < self.size and self.serial[row] == serial):
            row = int(np.searchsorted(self.serial[: self.size], serial))
            if row == self.size or self.serial[row] != serial:
                return None
        return None if self.status[row] == FORGOTTEN else row

    def rows(self, serials: Ints) -> Ints:
        """Where `serials` are: all of them exist."""
        if not len(serials):
            return serials
        first = int(self.serial[0])
        if int(self.serial[self.size - 1]) - first == self.size - 1:
            return serials - first
        rows: Ints = np.searchsorted(self.serial[: self.size], serials)
        return rows

    def known(self, serials: Ints) -> Ints:
        """Where those of `serials` are that are not forgotten, in their order."""
        if not len(serials) or not self.size:
            return np.zeros(0, np.int64)
        rows = np.searchsorted(self.serial[: self.size], serials)
        np.minimum(rows, self.size - 1, out=rows)
        found: Ints = rows[(self.serial[rows] == serials) & (self.status[rows] != FORGOTTEN)]
        return found

    def forget(self, rows: Ints) -> None:
        self.status[rows] = FORGOTTEN
        self.forgotten += len(rows)
        if self.forgotten >= _SQUEEZE_MIN and 2 * self.forgotten > self.size:
            self._squeeze()

    def _squeeze(self) -> None:
        kept = np.flatnonzero(self.status[: self.size] != FORGOTTEN)
        for name in _COLUMNS:
            column = getattr(self, name)
            column[: len(kept)] = column[kept]
        self.size = len(kept)
        self.forgotten = 0

    def _unobserve(self, rows: slice) -> None:
        self.observed[rows] = OBSERVED_CODES[AllocStatus.PENDING]
        self.healthy[rows] = False
        self.healthy_since_s[rows] = np.inf

    def _reserve(self, size: int) -> None:
        if size <= len(self.serial):
            return
        for name in _COLUMNS:
            column = getattr(self, name)
            grown = np.zeros(max(size, 2 * len(column)), column.dtype)
            grown[: self.size] = column[: self.size]
            setattr(self, name, grown)


def among(values: npt.NDArray[np.generic], wanted: Sequence[int] | Ints) -> Bools:
    """Which of `values` are `wanted`: np.isin, which costs 0.1 ms even where there is next to nothing to look for."""
    if not len(values) or not len(wanted):
        return np.zeros(len(values), np.bool_)
    if len(wanted) > _FEW:
        return np.isin(values, wanted)
    found: Bools = values == wanted[0]
    for one in wanted[1:]:
        found |= values == one
    return found
