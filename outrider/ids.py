"""Identifiers: what names a thing in the fleet. Owns their shapes; never makes a random one."""

import re
from typing import NewType

NodeId = NewType("NodeId", str)
JobName = NewType("JobName", str)
GroupName = NewType("GroupName", str)
TaskName = NewType("TaskName", str)
ServiceName = NewType("ServiceName", str)
PortName = NewType("PortName", str)
AllocId = NewType("AllocId", str)
SecretName = NewType("SecretName", str)
VolumeName = NewType("VolumeName", str)
Namespace = NewType("Namespace", str)

DEFAULT_NAMESPACE = Namespace("default")  # always there

# RFC 1123 label: what Consul, DNS and a SPIFFE path all accept.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN)

_ALLOC_BITS = 40
_ALLOC_MASK = (1 << _ALLOC_BITS) - 1
# Odd, so that multiplying modulo 2**40 is a bijection: neighbours in serial get unlike prefixes.
_ALLOC_SPREAD = 0x9E3779B97F | 1
_ALLOC_GATHER = pow(_ALLOC_SPREAD, -1, 1 << _ALLOC_BITS)


def is_name(text: str) -> bool:
    """Whether `text` can name a job, group, task, service, port or node."""
    return _NAME.match(text) is not None


def alloc_id(serial: int, salt: int) -> AllocId:
    """The id of the fleet's `serial`-th allocation: 10 hexadecimal digits.

    `salt` is the fleet's own number, so that two fleets on one host name their allocations apart.
    """
    return AllocId(f"{((serial * _ALLOC_SPREAD) ^ salt) & _ALLOC_MASK:010x}")


def alloc_serial(alloc: AllocId, salt: int) -> int:
    """The inverse of `alloc_id`. Raises ValueError where `alloc` is not ten hexadecimal digits."""
    if len(alloc) != _ALLOC_BITS // 4:
        raise ValueError(f"allocation id {alloc!r}: expected {_ALLOC_BITS // 4} hexadecimal digits")
    return (((int(alloc, 16) ^ salt) & _ALLOC_MASK) * _ALLOC_GATHER) & _ALLOC_MASK
