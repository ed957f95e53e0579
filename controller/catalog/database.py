"""The catalog's SQLite file: rows as JSON, written in one transaction per batch. Blocking: call it in a thread."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from controller.catalog.store import ROW_TYPES, Change, Commit, Table
from outrider.errors import JournalError

COMMITS_QUEUED_MAX = 1024
# A crash may lose commits that were shown to watchers but not yet on disk, never more than the queue and the batch
# being written hold. Beginning this far ahead keeps the index from ever going back.
_INDEX_MARGIN = 4 * COMMITS_QUEUED_MAX
_FORMAT = 1


class Database:
    """Owns the file, mode 0600: it holds the Connect CA's key."""

    def __init__(self, path: Path) -> None:
        """Raises JournalError where the file cannot be opened or has another format."""
        self.path = path
        try:
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{path}: the catalog's database cannot be opened: {error}") from error

    def load(self) -> tuple[int, list[Change]]:
        """The index to begin with, and all rows."""
        try:
            (index,) = self._connection.execute("SELECT number FROM meta WHERE name = 'index'").fetchone()
            found = self._connection.execute("SELECT name, owner, key, row FROM rows ORDER BY rowid").fetchall()
            changes = [
                Change(Table(name), owner, key, msgspec.json.decode(row, type=ROW_TYPES[Table(name)]))
                for name, owner, key, row in found
            ]
        except (sqlite3.Error, msgspec.MsgspecError, ValueError) as error:
            raise JournalError(f"{self.path}: the catalog's database cannot be read: {error}") from error
        return index + _INDEX_MARGIN, changes

    def write(self, commits: Sequence[Commit]) -> None:
        """On disk when it returns. Raises JournalError."""
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for commit in commits:
                for change in commit.changes:
                    self._write_change(change)
            execute("UPDATE meta SET number = ? WHERE name = 'index'", (commits[-1].index,))
            execute("COMMIT")
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: the catalog's database cannot be written: {error}") from error

    def close(self) -> None:
        self._connection.close()

    def _write_change(self, change: Change) -> None:
        key = (change.table.value, change.owner, change.key)
        if change.row is None:
            self._connection.execute("DELETE FROM rows WHERE name = ? AND owner = ? AND key = ?", key)
        else:
            row = msgspec.json.encode(change.row)
            self._connection.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", (*key, row))

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")
        execute(
            "CREATE TABLE IF NOT EXISTS rows (name TEXT, owner TEXT, key TEXT, row BLOB NOT NULL,"
            " PRIMARY KEY (name, owner, key))"
        )
        execute("INSERT OR IGNORE INTO meta VALUES ('index', 1), ('format', ?)", (_FORMAT,))
        (found,) = execute("SELECT number FROM meta WHERE name = 'format'").fetchone()
        if found != _FORMAT:
            raise JournalError(f"{self.path}: format {found}, this version reads {_FORMAT}")
