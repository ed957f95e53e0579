"""The guest's address: who gets an answer, and which."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.network import dhcp
from outrider.model import mesh

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, INFORM = 1, 2, 3, 4, 5, 6, 8
OURS, ANOTHER = bytes([192, 0, 2, 2]), bytes([10, 0, 0, 7])


def packet(kind: int, *, wanted: bytes = b"", server: bytes = b"", ciaddr: bytes = bytes(4), op: int = 1) -> bytes:
    head = struct.pack("!BBBBIHH4s4s4s4s16s192x4s", op, 1, 6, 0, 77, 0, 0, ciaddr, bytes(4), bytes(4), bytes(4),
                       b"\x52\x54\0\0\0\2".ljust(16, b"\0"), b"\x63\x82\x53\x63")  # fmt: skip
    options = b"\x00" + bytes([53, 1, kind])  # a pad first
    options += bytes([50, 4]) + wanted if wanted else b""
    options += bytes([54, 4]) + server if server else b""
    return head + options + b"\xff"


def told(answer: tuple[bytes, str] | None) -> tuple[int, bytes, str]:
    """(kind, address given, where to)"""
    assert answer is not None
    data, target = answer
    assert data[240:242] == bytes([53, 1]), "the kind comes first"
    assert data[4:8] == struct.pack("!I", 77)
    assert len(data) >= 300
    return data[242], data[16:20], target


def test_the_constants_are_the_models() -> None:
    names = ("DNS_ADDRESS", "GUEST_ADDRESS", "GUEST_GATEWAY", "GUEST_PREFIX")
    assert [getattr(dhcp, name) for name in names] == [getattr(mesh, name) for name in names]


def test_every_guest_gets_the_one_address_with_its_router_and_its_names() -> None:
    assert told(dhcp.reply(packet(DISCOVER))) == (OFFER, OURS, "255.255.255.255")
    answer = dhcp.reply(packet(REQUEST, wanted=OURS))
    assert told(answer) == (ACK, OURS, "255.255.255.255")
    assert answer is not None
    assert bytes([1, 4, 255, 255, 255, 252]) + bytes([3, 4, 192, 0, 2, 1]) + bytes([6, 4, 198, 18, 0, 1]) in answer[0]
    assert bytes([51, 4, 255, 255, 255, 255]) in answer[0], "it never has to ask again"


def test_a_renewal_goes_to_the_guest_itself_and_what_it_cannot_have_is_refused() -> None:
    assert told(dhcp.reply(packet(REQUEST, ciaddr=OURS))) == (ACK, OURS, "192.0.2.2")
    assert told(dhcp.reply(packet(REQUEST, wanted=ANOTHER))) == (NAK, bytes(4), "255.255.255.255")
    assert told(dhcp.reply(packet(INFORM, ciaddr=OURS)))[:2] == (ACK, bytes(4))


@pytest.mark.parametrize(
    "data",
    [
        packet(REQUEST, wanted=OURS, server=ANOTHER),
        packet(DECLINE),
        packet(DISCOVER, op=2),
        packet(DISCOVER)[:239],
        packet(DISCOVER)[:-1],
        packet(DISCOVER).replace(b"\x63\x82\x53\x63", b"none"),
    ],
    ids=["another's offer", "decline", "a reply", "cut short", "no end", "plain bootp"],
)
def test_what_wants_no_answer_gets_none(data: bytes) -> None:
    assert dhcp.reply(data) is None


@given(st.binary(max_size=400))
def test_nothing_a_guest_sends_breaks_it(noise: bytes) -> None:
    dhcp.reply(noise)
    dhcp.reply(packet(DISCOVER)[:240] + noise)
