"""One DHCP packet of a guest -> the reply: always the same address. Pure, and of the standard library alone.

RFC 2131 and 2132. Every guest is alone on its link and has the same address, so there is nothing to remember, and a
lease never ends. Only the few fields that this takes are read.
"""

import struct
from ipaddress import IPv4Network

# `outrider.model.mesh` has the same: it is not there in the responder's sandbox, and a test compares them.
DNS_ADDRESS = "198.18.0.1"
GUEST_ADDRESS, GUEST_GATEWAY, GUEST_PREFIX = "192.0.2.2", "192.0.2.1", 30

PACKET_BYTES_MAX = 1500
CLIENT_PORT = 68

_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s192x4s")
_COOKIE = b"\x63\x82\x53\x63"
_REQUEST, _REPLY, _ETHERNET = 1, 2, (1, 6)
_DISCOVER, _OFFER, _REQUESTED, _ACK, _NAK, _INFORM = 1, 2, 3, 5, 6, 8
_PAD, _END = 0, 255
_MASK, _ROUTER, _DNS, _ADDRESS, _LEASE, _TYPE, _SERVER = 1, 3, 6, 50, 51, 53, 54
_FOR_EVER = b"\xff\xff\xff\xff"
_NOWHERE = bytes(4)
_BYTES_MIN = 300  # BOOTP's: some clients drop what is shorter


def reply(packet: bytes) -> tuple[bytes, str] | None:
    """The answer and the address to send it to; None where `packet` is nothing that wants one."""
    try:
        op, *hardware, _, xid, _, flags, ciaddr, _, _, _, chaddr, cookie = _FIXED.unpack_from(packet)
        options = _options(packet[_FIXED.size :])
    except (struct.error, IndexError):
        return None
    if op != _REQUEST or tuple(hardware) != _ETHERNET or cookie != _COOKIE:
        return None
    kind = options.get(_TYPE, b"")
    ours, server = _raw(GUEST_ADDRESS), _raw(GUEST_GATEWAY)
    if options.get(_SERVER, server) != server:
        return None  # it took another's offer
    wanted = options.get(_ADDRESS, ciaddr)
    if kind == bytes([_DISCOVER]):
        answer, given = _OFFER, ours
    elif kind == bytes([_REQUESTED]):
        answer, given = (_ACK, ours) if wanted == ours else (_NAK, _NOWHERE)
    elif kind == bytes([_INFORM]):
        answer, given = _ACK, _NOWHERE
    else:
        return None
    head = _FIXED.pack(
        _REPLY, *_ETHERNET, 0, xid, 0, flags, ciaddr if answer == _ACK else _NOWHERE, given, server, _NOWHERE, chaddr,
        _COOKIE,
    )  # fmt: skip
    body = _option(_TYPE, bytes([answer])) + _option(_SERVER, server)
    if answer != _NAK:
        body += _option(_MASK, IPv4Network(f"0.0.0.0/{GUEST_PREFIX}").netmask.packed)
        body += _option(_ROUTER, server) + _option(_DNS, _raw(DNS_ADDRESS))
    if given == ours:
        body += _option(_LEASE, _FOR_EVER)
    data = (head + body + bytes([_END])).ljust(_BYTES_MIN, b"\0")
    # A client without an address hears only what goes to all; it is alone on the link.
    return data, GUEST_ADDRESS if ciaddr == ours and answer == _ACK else "255.255.255.255"


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    place = 0
    while data[place] != _END:
        if data[place] == _PAD:
            place += 1
            continue
        length = data[place + 1]
        value = data[place + 2 : place + 2 + length]
        found[data[place]] = value
        place += 2 + length
    return found


def _option(code: int, value: bytes) -> bytes:
    return bytes([code, len(value)]) + value


def _raw(address: str) -> bytes:
    return bytes(int(part) for part in address.split("."))
