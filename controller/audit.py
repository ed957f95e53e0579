"""The audit log: every changing call, done or refused, one JSON object a line in DATA/audit.jsonl.

Written before the caller has its answer. Two files at most: at FILE_BYTES_MAX the log becomes audit.1.jsonl and begins
anew. Never given a secret: callers say what changed by name and by figure.
"""

import os
from collections import deque
from pathlib import Path

import msgspec

from outrider.errors import HostError
from outrider.job_diff import diff
from outrider.model.access import AuditEntry
from outrider.model.job import Job

FILE_BYTES_MAX = 64 * 1024 * 1024
CHANGES_MAX = 50
_CHANGE_CHARS_MAX = 300


class AuditLog:
    def __init__(self, directory: Path, *, bytes_max: int = FILE_BYTES_MAX) -> None:
        self._path = directory / "audit.jsonl"
        self._older = directory / "audit.1.jsonl"
        self._bytes_max = bytes_max
        self._encoder = msgspec.json.Encoder()
        self.written = 0

    def write(self, entry: AuditEntry) -> None:
        """Raises HostError where the disk does not take it: then the call is not answered as done."""
        line = self._encoder.encode(msgspec.structs.replace(entry, changes=_short(entry.changes))) + b"\n"
        try:
            self._make_room(len(line))
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise HostError(str(self._path), step=f"write the audit log: {error.strerror}") from error
        self.written += 1

    def read(self, newest: int) -> tuple[AuditEntry, ...]:
        """Oldest first; the `newest` of them, all for 0. A torn last line, after a crash, is left out."""
        decoder = msgspec.json.Decoder(AuditEntry)
        found: deque[AuditEntry] = deque(maxlen=newest or None)
        for path in (self._older, self._path):
            if not path.exists():
                continue
            with path.open("rb") as file:
                found.extend(decoder.decode(line) for line in file if line.endswith(b"\n"))
        return tuple(found)

    def _make_room(self, size: int) -> None:
        if self._path.exists() and self._path.stat().st_size + size > self._bytes_max:
            self._path.replace(self._older)


def job_changes(before: Job | None, after: Job) -> tuple[str, ...]:
    """A line for each leaf that differs. Of variables of the environment not what they say: it may be a secret."""
    if before is None:
        return ("new",)
    return tuple(
        f"~ {change.path}" if ".env." in change.path or change.path[-4:] == ".env" else str(change)
        for change in diff(before, after)
    )


def _short(changes: tuple[str, ...]) -> tuple[str, ...]:
    shown = tuple(change[:_CHANGE_CHARS_MAX] for change in changes[:CHANGES_MAX])
    hidden = len(changes) - len(shown)
    return (*shown, f"and {hidden} more") if hidden else shown
