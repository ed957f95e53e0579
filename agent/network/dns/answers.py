"""One DNS query and the table it is answered from -> the answer. Pure.

Names outside the table do not exist: NXDOMAIN is the one refusal that glibc and musl both pass on at once (musl waits
out its timeout on REFUSED, glibc asks again).
"""

import struct
from collections.abc import Mapping

from dnslib import (
    CLASS,
    OPCODE,
    QR,
    QTYPE,
    RCODE,
    RR,
    A,
    DNSBuffer,
    DNSError,
    DNSHeader,
    DNSLabel,
    DNSQuestion,
    DNSRecord,
)
from dnslib.buffer import BufferError as DnsBufferError

QUERY_BYTES_MAX = 4096
_NAME_BYTES_MAX, _LABEL_BYTES_MAX = 253, 63  # RFC 1035, as dnslib counts
# Addresses never change while a name has one; short, so that a name that goes away is gone soon.
_TTL_S = 5


class MalformedQueryError(Exception):
    """Not a question that has an answer: dropped and counted."""


def answer(query: bytes, names: Mapping[str, str]) -> bytes:
    """The reply to `query`. `names` maps lower-case full names without the last dot to IPv4 addresses.

    Raises MalformedQueryError.
    """
    try:
        buffer = DNSBuffer(query)
        header = DNSHeader.parse(buffer)
        question = DNSQuestion.parse(buffer) if header.q == 1 else None
    except (DNSError, DnsBufferError, struct.error, ValueError, IndexError) as error:
        raise MalformedQueryError(str(error)) from error
    if question is not None and not _can_be_written(question.qname):
        raise MalformedQueryError("a longer name than there can be")  # it parses, and cannot be written again
    if header.qr != QR.QUERY:
        raise MalformedQueryError("a reply, not a question")
    reply = DNSRecord(
        DNSHeader(id=header.id, qr=QR.RESPONSE, opcode=header.opcode, aa=1, ra=1, rd=header.rd), q=question
    )
    if header.opcode != OPCODE.QUERY:
        reply.header.rcode = RCODE.NOTIMP
    elif question is None:
        reply.header.rcode = RCODE.FORMERR
    else:
        address = names.get(b".".join(question.qname.label).decode("latin-1").lower())
        if address is None or question.qclass != CLASS.IN:
            reply.header.rcode = RCODE.NXDOMAIN
        elif question.qtype in (QTYPE.A, QTYPE.ANY):
            reply.add_answer(RR(question.qname, QTYPE.A, ttl=_TTL_S, rdata=A(address)))
        # Else it has the name but no such record, as with AAAA: an empty answer without an error.
    return bytes(reply.pack())


def _can_be_written(name: DNSLabel) -> bool:
    return len(name) <= _NAME_BYTES_MAX and all(len(label) <= _LABEL_BYTES_MAX for label in name.label)
