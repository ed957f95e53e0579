"""What goes over a guest's terminal line: a telnet server's words, and where a program's output ends."""

import pytest

from agent.guest_terminal import Ending, Telnet, escaped, window

GREETING = bytes([255, 253, 1, 255, 253, 31, 255, 251, 1, 255, 251, 3])
WORD = b"0123456789abcdef"


def test_of_the_protocol_nothing_is_seen_however_it_is_cut() -> None:
    sent = GREETING + b"a\xff\xffb" + bytes([255, 241]) + b"c\0"
    for at in range(len(sent) + 1):
        telnet = Telnet()
        assert telnet.plain(sent[:at]) + telnet.plain(sent[at:]) == b"a\xffbc\0"


def test_what_is_typed_is_told_from_the_protocol() -> None:
    assert escaped(b"ls\r") == b"ls\r\0"
    assert escaped(b"\xff") == b"\xff\xff"


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(24, 80, [0, 80, 0, 24]), (255, 511, [1, 254, 0, 254]), (0, 99_999, [255, 253, 0, 1])]
)
def test_no_size_is_taken_for_the_protocol(rows: int, columns: int, size: list[int]) -> None:
    if columns == 99_999:
        assert 255 not in window(rows, columns)[4:7]
        return
    assert list(window(rows, columns)) == [255, 250, 31, *size, 255, 240]


def test_a_program_s_end_is_found_however_it_is_cut_and_is_not_its_output() -> None:
    sent = b"one\0two\0" + WORD[:5] + b"\0" + WORD + b" 7\0"
    for at in range(len(sent) + 1):
        ending = Ending(WORD)
        ending.feed(sent[:at])
        first = ending.take()
        ending.feed(sent[at:])
        assert first + ending.take() == b"one\0two\0" + WORD[:5]
        assert ending.code == 7


def test_what_came_before_a_guest_ended_is_seen() -> None:
    ending = Ending(WORD)
    ending.feed(b"last words\0" + WORD[:3])
    ending.break_off()
    assert ending.take() == b"last words\0" + WORD[:3]
    assert ending.code == 137
