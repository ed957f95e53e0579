"""What the agent and the responder say to each other: JSON, one message a packet of a SOCK_SEQPACKET unix socket.

Every request gets one reply. ATTACH carries two descriptors: the allocation's UDP socket and its TCP listener, bound;
and for one with a guest a third: a UDP socket on which the guest asks for its address.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address

MESSAGE_BYTES_MAX = 160 * 1024  # below the least send buffer of a Linux socket: about 3,000 names


class Do(StrEnum):
    ATTACH = "attach"  # answer on these sockets; in place of earlier ones of the same allocation
    NAMES = "names"  # the allocation's whole table
    DETACH = "detach"
    HELD = "held"  # which allocations are there


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    do: Do
    alloc: str = ""
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    error: str = ""
    held: tuple[str, ...] = ()
    answered: int = 0  # since the responder started, as are the others
    malformed: int = 0
    refused: int = 0  # TCP connections beyond the limit


def encode(message: Request | Reply) -> bytes:
    return json.dumps({name: getattr(message, name) for name in message.__slots__}).encode()


def decode_request(data: bytes) -> Request:
    """Raises ValueError."""
    values = _object(data)
    names = values.get("names", {})
    if not isinstance(names, dict):
        raise _MisshapenError("names: expected an object")
    table = {str(name): str(IPv4Address(str(address))) for name, address in names.items()}
    return Request(do=Do(str(values.get("do"))), alloc=str(values.get("alloc", "")), names=table)


def decode_reply(data: bytes) -> Reply:
    """Raises ValueError."""
    values = _object(data)
    held = values.get("held", [])
    counts = {name: values.get(name, 0) for name in ("answered", "malformed", "refused")}
    if not isinstance(held, list):
        raise _MisshapenError("held: expected a list")
    whole = {name: count for name, count in counts.items() if isinstance(count, int)}
    return Reply(error=str(values.get("error", "")), held=tuple(str(alloc) for alloc in held), **whole)


class _MisshapenError(ValueError):
    pass


def _object(data: bytes) -> dict[str, object]:
    values = json.loads(data)
    if not isinstance(values, dict):
        raise _MisshapenError("expected an object")
    return values
