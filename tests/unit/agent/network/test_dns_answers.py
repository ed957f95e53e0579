"""What a query is answered, and that nothing that comes over the wire does more than be dropped."""

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from agent.network.dns.answers import MalformedQueryError, answer
from agent.network.dns.control import Do, Reply, Request, decode_reply, decode_request, encode

NAMES = {"api.mesh": "198.18.1.0", "web.mesh": "198.18.1.1"}


def ask(name: str, kind: str = "A") -> DNSRecord:
    question = DNSRecord.question(name, kind)
    reply = DNSRecord.parse(answer(bytes(question.pack()), NAMES))
    assert reply.header.id == question.header.id
    assert reply.header.qr
    return reply


@pytest.mark.parametrize("name", ["api.mesh", "api.mesh.", "API.Mesh"])
def test_a_name_of_the_table_has_its_address(name: str) -> None:
    reply = ask(name)
    assert (reply.header.rcode, reply.short()) == (RCODE.NOERROR, "198.18.1.0")


@pytest.mark.parametrize("kind", ["AAAA", "TXT", "HTTPS", "PTR"])
def test_it_has_no_other_records_and_that_is_no_error(kind: str) -> None:
    reply = ask("api.mesh", kind)
    assert (reply.header.rcode, reply.rr) == (RCODE.NOERROR, [])


@pytest.mark.parametrize("name", ["db.mesh", "mesh", "api", "api.mesh.example.org", "example.org", "."])
def test_any_other_name_does_not_exist(name: str) -> None:
    assert ask(name).header.rcode == RCODE.NXDOMAIN
    assert ask(name, "AAAA").header.rcode == RCODE.NXDOMAIN


def test_what_is_no_lookup_is_told_so() -> None:
    update = DNSRecord.question("api.mesh")
    update.header.opcode = 5
    assert DNSRecord.parse(answer(bytes(update.pack()), NAMES)).header.rcode == RCODE.NOTIMP

    two = DNSRecord.question("api.mesh")
    two.add_question(DNSRecord.question("web.mesh").q)
    assert DNSRecord.parse(answer(bytes(two.pack()), NAMES)).header.rcode == RCODE.FORMERR


def test_a_reply_is_not_answered() -> None:
    reply = DNSRecord.question("api.mesh").reply()
    with pytest.raises(MalformedQueryError):
        answer(bytes(reply.pack()), NAMES)


def test_a_name_that_is_too_long_to_be_written_again_is_dropped() -> None:
    labels = b"".join(bytes([size]) + bytes(size) for size in (63, 63, 63, 62))
    with pytest.raises(MalformedQueryError, match="longer"):
        answer(b"\x12\x34\x01\x00\x00\x01" + bytes(6) + labels + bytes(5), NAMES)


# A header that asks one question, then anything: labels, pointers to themselves, nothing.
questions = st.binary(max_size=300).map(lambda rest: b"\x12\x34\x01\x00\x00\x01" + bytes(6) + rest)
pointers = st.lists(st.sampled_from([b"\xc0\x0c", b"\xc0\x0e", b"\xc0\xff", b"\x01a", b"\x3f" + b"x" * 63, b"\0"]))


@given(st.one_of(st.binary(max_size=600), questions, pointers.map(lambda parts: questions_of(b"".join(parts)))))
def test_whatever_comes_is_answered_or_dropped(query: bytes) -> None:
    try:
        reply = answer(query, NAMES)
    except MalformedQueryError:
        return
    assert reply[:2] == query[:2]
    assert len(reply) <= len(query) + 16


def questions_of(name: bytes) -> bytes:
    return b"\x12\x34\x01\x00\x00\x01" + bytes(6) + name + QTYPE.A.to_bytes(2) + b"\0\1"


@given(
    st.builds(Request, do=st.sampled_from(Do), alloc=st.text(), names=st.dictionaries(st.text(), st.just("198.18.1.2")))
)
def test_a_request_survives_its_wire(request: Request) -> None:
    assert decode_request(encode(request)) == request


@given(
    st.builds(
        Reply, error=st.text(), held=st.lists(st.text()).map(tuple), answered=st.integers(), malformed=st.integers()
    )
)
def test_a_reply_survives_its_wire(reply: Reply) -> None:
    assert decode_reply(encode(reply)) == reply


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", b'{"do":"names","names":[]}', b'{"do":"names","names":{"a":"b"}}']
)
def test_a_request_that_makes_no_sense_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_request(data)


def test_a_label_that_is_too_long_is_dropped() -> None:
    """It parses, and cannot be written again: found by the fuzzer."""
    query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + bytes([100]) + b"a" * 100 + b"\x00\x00\x01\x00\x01"
    with pytest.raises(MalformedQueryError):
        answer(query, {})
