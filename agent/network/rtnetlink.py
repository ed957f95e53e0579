"""Links, addresses and routes over a raw rtnetlink socket: the dozen messages that an allocation's veth takes.

A library for all of rtnetlink costs the agent 23 MB and takes longer than the kernel does; this is only what is used.
"""

import errno
import os
import socket
import struct
from typing import Self

from outrider.errors import HostError

_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE, _DELROUTE, _NEWNEIGHBOUR = 16, 17, 20, 24, 25, 28
_REQUEST, _ACK, _CREATE, _EXCLUSIVE = 0x1, 0x4, 0x400, 0x200
_NEWQDISC, _QDISC_ROOT, _TCA_KIND, _TCA_OPTIONS = 36, 0xFFFFFFFF, 1, 2
_TBF_PARMS, _TBF_BURST, _LINKLAYER_ETHERNET = 1, 6, 1
_BURST_BYTES_MIN = 68_000  # one segment as the kernel hands it on, unsegmented
_ERROR = 2  # the type of an acknowledgement, whose first word is 0 or -errno
_IFF_UP = 1
_ATTR_NESTED = 0x8000
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 18, 28
_NDA_DST, _NDA_LLADDR, _PERMANENT = 1, 2, 0x80
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_TABLE_MAIN, _TABLE_LOCAL = 254, 255
_PROTOCOL_STATIC = 4
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST, _SCOPE_NOWHERE = 0, 253, 254, 255
_UNICAST, _LOCAL = 1, 2
_DEADLINE_S = 5
_REPLY_BYTES_MAX = 65536


class RouteSocket:
    """Speaks to the network namespace that the thread is in when this is made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_DEADLINE_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add_veth(self, name: str, *, peer: str, peer_namespace: int) -> None:
        """A pair: `name` here, `peer` in the namespace of that file descriptor."""
        far = _link() + _text(_IFLA_IFNAME, peer) + _attribute(_IFLA_NET_NS_FD, struct.pack("I", peer_namespace))
        data = _attribute(_IFLA_INFO_DATA | _ATTR_NESTED, _attribute(_VETH_INFO_PEER | _ATTR_NESTED, far))
        info = _attribute(_IFLA_LINKINFO | _ATTR_NESTED, _text(_IFLA_INFO_KIND, "veth") + data)
        body = _link() + _text(_IFLA_IFNAME, name) + info
        self._do(_NEWLINK, _CREATE | _EXCLUSIVE, body, step=f"make the interface {name}")

    def delete_link(self, name: str) -> None:
        """Does nothing where there is no such link."""
        self._do(_DELLINK, 0, _link() + _text(_IFLA_IFNAME, name), step=f"delete {name}", accept=errno.ENODEV)

    def set_up(self, name: str) -> None:
        body = _link(flags=_IFF_UP, change=_IFF_UP) + _text(_IFLA_IFNAME, name)
        self._do(_NEWLINK, 0, body, step=f"set {name} up")

    def set_hardware_address(self, name: str, address: str) -> None:
        body = _link() + _text(_IFLA_IFNAME, name) + _attribute(_IFLA_ADDRESS, _hardware(address))
        self._do(_NEWLINK, 0, body, step=f"give {name} the hardware address {address}")

    def add_neighbour(self, name: str, address: str, hardware_address: str) -> None:
        """Who has `address` behind `name`, for good: nobody is asked."""
        body = struct.pack("BxxxiHBB", socket.AF_INET, socket.if_nametoindex(name), _PERMANENT, 0, 0)
        body += _attribute(_NDA_DST, socket.inet_aton(address)) + _attribute(_NDA_LLADDR, _hardware(hardware_address))
        self._do(_NEWNEIGHBOUR, _CREATE | _EXCLUSIVE, body, step=f"place {address} at {hardware_address}")

    def add_address(self, name: str, address: str) -> None:
        """`address` alone, with no network behind it."""
        raw = socket.inet_aton(address)
        body = struct.pack("BBBBI", socket.AF_INET, 32, 0, _SCOPE_UNIVERSE, socket.if_nametoindex(name))
        body += _attribute(_IFA_LOCAL, raw) + _attribute(_IFA_ADDRESS, raw)
        self._do(_NEWADDR, _CREATE | _EXCLUSIVE, body, step=f"give {name} the address {address}")

    def add_link_route(self, name: str, address: str) -> None:
        self._route(name, address, 32, scope=_SCOPE_LINK)

    def add_route_by(self, name: str, address: str, gateway: str) -> None:
        self._route(name, address, 32, gateway=gateway)

    def delete_route(self, address: str) -> None:
        """Does nothing where there is no route to `address` alone."""
        body = struct.pack("BBBBBBBBI", socket.AF_INET, 32, 0, 0, _TABLE_MAIN, 0, _SCOPE_NOWHERE, 0, 0)
        body += _attribute(_RTA_DST, socket.inet_aton(address))
        self._do(_DELROUTE, 0, body, step=f"delete the route to {address}", accept=errno.ESRCH)

    def add_default_route(self, name: str, gateway: str) -> None:
        self._route(name, "0.0.0.0", 0, gateway=gateway)  # noqa: S104 - a route's destination, not a listener's

    def add_local_route(self, name: str, network: str) -> None:
        """All of `network` is an address of this namespace (AnyIP)."""
        address, _, length = network.partition("/")
        self._route(name, address, int(length), scope=_SCOPE_HOST, kind=_LOCAL, table=_TABLE_LOCAL)

    def limit(self, name: str, bytes_a_second: int) -> None:
        """What leaves by `name` passes a token bucket (tbf): a burst of 20 ms, and 50 ms of it may wait."""
        burst = max(_BURST_BYTES_MIN, bytes_a_second // 50)
        queued = burst + bytes_a_second // 20
        # struct tc_ratespec, twice, then limit, buffer and mtu: the kernel takes rate and burst from what follows.
        rate = struct.pack("BBHhHI", 0, _LINKLAYER_ETHERNET, 0, 0, 0, min(bytes_a_second, 0xFFFFFFFF))
        parameters = rate + bytes(12) + struct.pack("III", queued, 0, 0)
        options = _attribute(_TBF_PARMS, parameters) + _attribute(_TBF_BURST, struct.pack("I", burst))
        body = struct.pack("BxxxiIII", socket.AF_UNSPEC, socket.if_nametoindex(name), 0, _QDISC_ROOT, 0)
        body += _text(_TCA_KIND, "tbf") + _attribute(_TCA_OPTIONS | _ATTR_NESTED, options)
        self._do(_NEWQDISC, _CREATE | _EXCLUSIVE, body, step=f"limit {name} to {bytes_a_second} bytes a second")

    def _route(
        self,
        name: str,
        address: str,
        length: int,
        *,
        scope: int = _SCOPE_UNIVERSE,
        kind: int = _UNICAST,
        table: int = _TABLE_MAIN,
        gateway: str = "",
    ) -> None:
        body = struct.pack("BBBBBBBBI", socket.AF_INET, length, 0, 0, table, _PROTOCOL_STATIC, scope, kind, 0)
        if length:
            body += _attribute(_RTA_DST, socket.inet_aton(address))
        body += _attribute(_RTA_OIF, struct.pack("I", socket.if_nametoindex(name)))
        if gateway:
            body += _attribute(_RTA_GATEWAY, socket.inet_aton(gateway))
        self._do(_NEWROUTE, _CREATE | _EXCLUSIVE, body, step=f"route {address}/{length} by {name}")

    def _do(self, kind: int, flags: int, body: bytes, *, step: str, accept: int = 0) -> None:
        self._sequence += 1
        header = struct.pack("IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, self._sequence, 0)
        try:
            self._socket.send(header + body)
            reply = self._socket.recv(_REPLY_BYTES_MAX)
        except OSError as error:
            raise HostError("rtnetlink", step=step, hint=str(error)) from error
        _, reply_kind, _, sequence, _, code = struct.unpack_from("IHHIIi", reply)
        assert (reply_kind, sequence) == (_ERROR, self._sequence), "one request, one acknowledgement"
        if code not in (0, -accept):
            raise HostError("rtnetlink", step=step, hint=os.strerror(-code))


def _link(*, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("BBHiII", socket.AF_UNSPEC, 0, 0, 0, flags, change)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _hardware(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")
