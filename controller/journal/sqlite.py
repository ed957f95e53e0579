"""The journal in one SQLite file. Owns the file, its lock and its format; knows nothing of what records mean.

WAL with synchronous=FULL: a commit returns once the write-ahead log is on disk (https://sqlite.org/wal.html#fast). Each
row is one record in msgpack. All calls block: the caller gives them a thread, always the same one or one at a time.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from controller.core.records import Record
from outrider.errors import JournalError

_RECORDS_DUE: Final = 20_000  # appended since the last snapshot

FORMAT: Final = 1  # of the file; a controller refuses one that is newer than it knows


class SqliteJournal:
    """Keeps the controller's records in `path`; `path` + ".lock" says that a controller is at it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int | None = None
        self._database: sqlite3.Connection | None = None
        self._appended = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)

    def open(self) -> None:
        """Raises JournalError where another controller holds it, or the file is not a journal that can be read."""
        self._take_lock()
        try:
            with self._explained("open"):
                self._database = self._connect()
                self._check_format(self._database)
        except BaseException:
            self.close()
            raise

    def load(self) -> Iterator[Record]:
        """Every record since the last snapshot, that one first. Raises JournalError for one that makes no sense."""
        database = self._opened()
        with self._explained("read"):
            rows = database.execute("SELECT sequence, record FROM records ORDER BY sequence")
            for sequence, packed in rows:
                try:
                    yield self._decoder.decode(packed)
                except msgspec.DecodeError as error:
                    raise JournalError(
                        f"{self._path}: record {sequence} cannot be read ({error}); the file is damaged. {_RESTORE}"
                    ) from error

    def append(self, batch: Sequence[Record]) -> None:
        """All of them, on disk when this returns, or none. Raises JournalError: the caller must exit."""
        packed = [(self._encoder.encode(record),) for record in batch]
        database = self._opened()
        with self._explained("write"), database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT INTO records (record) VALUES (?)", packed)
        self._appended += len(batch)

    def snapshot(self, records: Iterable[Record]) -> None:
        """Replace all that was appended so far by `records`, in one transaction, and give the space back."""
        database = self._opened()
        with self._explained("compact"):
            with database:
                database.execute("BEGIN IMMEDIATE")
                (last,) = database.execute("SELECT coalesce(max(sequence), 0) FROM records").fetchone()
                packed = ((self._encoder.encode(record),) for record in records)
                database.executemany("INSERT INTO records (record) VALUES (?)", packed)
                database.execute("DELETE FROM records WHERE sequence <= ?", (last,))
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._appended = 0

    def due(self) -> bool:
        return self._appended > _RECORDS_DUE

    def refusal(self) -> str:
        return ""  # the disk's size is the limit, and a full one is an error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            os.close(self._lock)  # gives the lock up
            self._lock = None

    def _take_lock(self) -> None:
        lock_path = self._path.with_name(self._path.name + ".lock")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"{self._path}: {error.strerror}; check the directory and who owns it") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise JournalError(
                f"{self._path}: another controller (pid {holder}) uses this journal; "
                "stop it, or give this one a data directory of its own"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def _connect(self) -> sqlite3.Connection:
        is_new = not self._path.exists()
        if is_new:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # Autocommit: transactions are begun by name. Threads: the caller sees to it that one at a time is here.
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._database = database
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        if is_new:
            _sync_directory(self._path.parent)
        return database

    def _check_format(self, database: sqlite3.Connection) -> None:
        (problem,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise JournalError(f"{self._path}: the file is damaged ({problem}). {_RESTORE}")
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("CREATE TABLE format (version INTEGER NOT NULL)")
                database.execute("INSERT INTO format VALUES (?)", (FORMAT,))
                database.execute(
                    "CREATE TABLE records (sequence INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)"
                )
            return
        row = database.execute("SELECT version FROM format").fetchone() if "format" in tables else None
        if row is None or "records" not in tables:
            raise JournalError(f"{self._path}: a SQLite file, but no journal of a controller; name another path")
        if row[0] > FORMAT:
            raise JournalError(
                f"{self._path}: format {row[0]}, and this controller knows {FORMAT}; "
                "start the newer Outrider that wrote it"
            )

    def _opened(self) -> sqlite3.Connection:
        assert self._database is not None, "open() comes first"
        return self._database

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            hint = _HINTS.get(getattr(error, "sqlite_errorname", ""), _RESTORE)
            raise JournalError(f"{self._path}: cannot {what} the journal: {error}. {hint}") from error


_RESTORE: Final = (
    "Move the file and its -wal and -shm files away and put a copy from a backup in their place; "
    "running workloads are kept, as unclaimed, until the controller knows them again."
)
_HINTS: Final = {
    "SQLITE_FULL": "The disk is full: make room and start the controller again; nothing acknowledged is lost.",
    "SQLITE_IOERR": "The disk fails: look at the kernel's log.",
    "SQLITE_READONLY": "The file or its directory is read-only: give the controller's user the right to write.",
    "SQLITE_CANTOPEN": "Check that the directory exists and who owns it.",
}


def _sync_directory(path: Path) -> None:
    """A new file survives a power cut only once its directory entry is on disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
