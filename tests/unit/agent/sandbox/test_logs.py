"""A log is read across its turns, by stream, from its end; its pieces are joined by nobody but the reader's user."""

from pathlib import Path

import pytest

from agent.sandbox import logs, rotation
from agent.sandbox.conmon import Directory
from agent.sandbox.logs import LogPiece

AT = "2026-01-01T00:00:00.000000000+00:00"


def text(*lines: str) -> str:
    return "".join(f"{AT} {line}\n" for line in lines)


@pytest.fixture
def where(tmp_path: Path) -> Directory:
    return Directory(str(tmp_path))


async def joined(where: Directory, *, lines: int | None = None, stream: str | None = None) -> str:
    pieces = [piece.data async for piece in logs.read(str(where.path), lines=lines, stream=stream)]
    return b"".join(pieces).decode()


def test_a_line_and_a_piece_of_one() -> None:
    assert logs.parse(f"{AT} stdout F a b".encode()) == LogPiece(at=AT, stream="stdout", data=b"a b\n")
    assert logs.parse(f"{AT} stderr P a".encode()) == LogPiece(at=AT, stream="stderr", data=b"a")
    assert logs.parse(f"{AT} stdout F ".encode()) == LogPiece(at=AT, stream="stdout", data=b"\n")
    assert logs.parse(b"rest of a line that was cut") is None


async def test_files_are_read_in_order_and_each_once(where: Directory) -> None:
    where.log_older.write_text(text("stdout F 1"))
    where.log.write_text(text("stdout F 2", "stderr F e"))
    rotation.hold(where)
    assert await joined(where) == "1\n2\ne\n"
    where.log.unlink()
    where.log.write_text(text("stdout F 3"))  # conmon turned it, and nobody noticed yet
    assert await joined(where) == "1\n2\ne\n3\n"
    rotation.hold(where)
    assert await joined(where) == "2\ne\n3\n"
    assert await joined(where, stream="stderr") == "e\n"


@pytest.mark.parametrize(("count", "expected"), [(0, ""), (1, "3\n"), (2, "2 long\n3\n"), (9, "1\n2 long\n3\n")])
async def test_tail_counts_whole_lines_across_files(where: Directory, count: int, expected: str) -> None:
    where.log_older.write_text(text("stdout F 1", "stderr F e", "stdout P 2 "))
    where.log.write_text(text("stdout F long", "stdout F 3"))
    assert await joined(where, lines=count, stream="stdout") == expected


async def test_no_log_is_an_empty_one(where: Directory) -> None:
    assert await joined(where) == ""
    assert await joined(where, lines=5) == ""
    assert logs.last_lines(str(where.path), 5) == ""


def test_last_lines_are_cut_at_their_beginning(where: Directory) -> None:
    where.log.write_text(text("stdout F " + "x" * 20_000, "stdout F end"))
    assert len(logs.last_lines(str(where.path), 10)) == 16_384
    assert logs.last_lines(str(where.path), 1) == "end\n"


async def test_follower_goes_on_through_turns(where: Directory) -> None:
    where.log.write_text(text("stdout F 1"))
    rotation.hold(where)
    steps = iter(("turn", "write", "end"))

    def following() -> bool:
        match next(steps):
            case "turn":
                where.log.unlink()
                where.log.write_text(text("stdout F 2"))
                rotation.hold(where)
                return True
            case "write":
                with where.log.open("a") as file:
                    file.write(text("stdout F 3"))
                return True
            case _:
                return False

    seen = []
    async for piece in logs.read(str(where.path), following=following):
        seen.append(piece.data)
        if len(seen) == 3:
            break
    assert seen == [b"1\n", b"2\n", b"3\n"]


def test_set_aside_makes_room_for_a_new_run(where: Directory) -> None:
    where.log.write_text("x" * 60)
    rotation.set_aside(where, 400)
    assert not where.log.exists()
    assert where.log_older.read_text() == "x" * 60
    where.log.write_text("y" * 10)
    rotation.set_aside(where, 400)
    assert where.log.read_text() == "y" * 10
