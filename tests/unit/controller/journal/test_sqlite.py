"""The journal's file: what was acknowledged is there, whoever dies; what cannot be read is refused with a way out."""

import itertools
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.core.records import EpochBegun, JobStopped, NodeDowned, Record
from controller.journal.sqlite import SqliteJournal
from outrider.errors import JournalError
from outrider.ids import JobName, NodeId

WRITER = """
import sys
from pathlib import Path
from controller.core.records import EpochBegun
from controller.journal.sqlite import SqliteJournal
journal = SqliteJournal(Path(sys.argv[1]))
journal.open()
epoch = 0
while True:
    batch = [EpochBegun(epoch=epoch + at) for at in range(3)]
    journal.append(batch)
    epoch += 3
    print(epoch, flush=True)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    made = SqliteJournal(tmp_path / "journal.db")
    made.open()
    yield made
    made.close()


def reopened(journal: SqliteJournal, path: Path) -> list[Record]:
    journal.close()
    again = SqliteJournal(path)
    again.open()
    try:
        return list(again.load())
    finally:
        again.close()


def test_records_come_back_in_order(journal: SqliteJournal, tmp_path: Path) -> None:
    first: list[Record] = [EpochBegun(epoch=1, salt=7), NodeDowned(node=NodeId("n1"))]
    journal.append(first)
    journal.append([JobStopped(job=JobName("shop"))])
    assert reopened(journal, tmp_path / "journal.db") == [*first, JobStopped(job=JobName("shop"))]


def test_a_snapshot_replaces_what_came_before_it_and_keeps_what_comes_after(
    journal: SqliteJournal, tmp_path: Path
) -> None:
    journal.append([EpochBegun(epoch=number) for number in range(100)])
    journal.snapshot([EpochBegun(epoch=99, salt=1)])
    journal.append([JobStopped(job=JobName("shop"))])
    expected = [EpochBegun(epoch=99, salt=1), JobStopped(job=JobName("shop"))]
    assert reopened(journal, tmp_path / "journal.db") == expected


def test_a_second_controller_is_told_who_holds_the_journal(journal: SqliteJournal, tmp_path: Path) -> None:
    second = SqliteJournal(tmp_path / "journal.db")
    with pytest.raises(JournalError, match=r"journal\.db: another controller \(pid \d+\).*data directory of its own"):
        second.open()
    journal.append([EpochBegun(epoch=1)])
    assert list(journal.load()) == [EpochBegun(epoch=1)]


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(line) for line in itertools.islice(writer.stdout, 50)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    journal = SqliteJournal(path)
    journal.open()
    try:
        epochs = [record.epoch for record in journal.load() if isinstance(record, EpochBegun)]
    finally:
        journal.close()
    assert epochs == list(range(len(epochs)))
    assert len(epochs) >= acknowledged[-1]
    assert len(epochs) % 3 == 0, "a batch is there whole or not at all"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match=r"journal\.db: cannot open the journal.*Move the file"):
        SqliteJournal(path).open()


def test_a_damaged_page_is_refused(journal: SqliteJournal, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal.append([JobStopped(job=JobName(f"job-{number}")) for number in range(5000)])
    journal.close()
    data = bytearray(path.read_bytes())
    data[8192 : len(data) - 4096] = b"\xff" * (len(data) - 12288)
    path.write_bytes(bytes(data))
    with pytest.raises(JournalError, match="Move the file"):
        SqliteJournal(path).open()


def test_a_truncated_file_is_refused(journal: SqliteJournal, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal.append([JobStopped(job=JobName(f"job-{number}")) for number in range(5000)])
    journal.close()
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(JournalError, match="Move the file"):
        SqliteJournal(path).open()


def test_a_record_that_makes_no_sense_is_named(journal: SqliteJournal, tmp_path: Path) -> None:
    journal.append([EpochBegun(epoch=1)])
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as database:
        database.execute("INSERT INTO records (record) VALUES (x'ffff')")
    database.close()
    again = SqliteJournal(tmp_path / "journal.db")
    again.open()
    with pytest.raises(JournalError, match="record 2 cannot be read"):
        list(again.load())
    again.close()


def test_a_newer_format_is_refused_by_number(journal: SqliteJournal, tmp_path: Path) -> None:
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as database:
        database.execute("UPDATE format SET version = 9")
    database.close()
    with pytest.raises(JournalError, match="format 9, and this controller knows 1; start the newer Outrider"):
        SqliteJournal(tmp_path / "journal.db").open()


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    with pytest.raises(JournalError, match="no journal of a controller"):
        SqliteJournal(path).open()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="check the directory"):
        SqliteJournal(tmp_path / "file" / "journal.db").open()
