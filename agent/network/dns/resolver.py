"""The agent's side of the node's DNS responder: hands it sockets and names, level-triggered. Never answers queries."""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agent.network.dns.control import MESSAGE_BYTES_MAX, Do, Reply, Request, decode_reply, encode
from agent.network.guest import DHCP_PORT, TAP
from outrider.errors import HostError, InputError, PeerError
from outrider.ids import AllocId
from outrider.model.mesh import DNS_ADDRESS

_DEADLINE_S = 2.0
_PORT = 53
_BACKLOG = 8
_SO_NO_CHECK = 11

OpenSocket = Callable[[AllocId, socket.SocketKind], socket.socket]


class Resolver:
    """A connection for each request: a late reply can be taken for no other's. One request at a time.

    Every method raises PeerError where the responder is away, late or objects.
    """

    def __init__(self, *, socket: Path) -> None:
        self._path = socket
        self._turn = asyncio.Lock()

    async def attach(self, alloc: AllocId, sockets: Sequence[socket.socket]) -> None:
        """Have these answered; all are closed here, whatever happens. Earlier ones of `alloc` are let go.

        Its table is empty until `set_names`. An allocation that the responder holds already needs no new sockets, and
        their address is taken while it does: see `held`, after the agent or the responder started again.
        """
        try:
            await self._ask(Request(do=Do.ATTACH, alloc=alloc), sockets)
        finally:
            for each in sockets:
                each.close()

    async def set_names(self, alloc: AllocId, names: Mapping[str, str]) -> None:
        """The allocation's whole table: full name -> virtual address. Raises InputError where it is too long."""
        await self._ask(Request(do=Do.NAMES, alloc=alloc, names=names))

    async def detach(self, alloc: AllocId) -> None:
        """Let go of the allocation's sockets, which would keep its namespace alive."""
        await self._ask(Request(do=Do.DETACH, alloc=alloc))

    async def held(self) -> frozenset[AllocId]:
        """The allocations that the responder answers for."""
        return frozenset(AllocId(alloc) for alloc in (await self._ask(Request(do=Do.HELD))).held)

    async def _ask(self, request: Request, sockets: Sequence[socket.socket] = ()) -> Reply:
        data = encode(request)
        if len(data) > MESSAGE_BYTES_MAX:
            raise InputError(f"allocation {request.alloc}: {len(request.names)} names do not fit its DNS table")
        try:
            async with self._turn, asyncio.timeout(_DEADLINE_S):
                reply = decode_reply(await self._exchange(data, sockets))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            reason = str(error) or f"no reply within {_DEADLINE_S} s"
            raise PeerError(f"DNS responder at {self._path}: {reason}") from error
        if reply.error:
            raise PeerError(f"DNS responder at {self._path}: {reply.error}")
        return reply

    async def _exchange(self, data: bytes, sockets: Sequence[socket.socket]) -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
            await loop.sock_connect(connection, str(self._path))
            # Never blocks: the connection is new, and its buffer takes the longest message.
            socket.send_fds(connection, [data], [held.fileno() for held in sockets])
            return await loop.sock_recv(connection, MESSAGE_BYTES_MAX)


def open_dns_sockets(alloc: AllocId, open_socket: OpenSocket, *, guest: bool = False) -> list[socket.socket]:
    """The DNS address of the allocation, bound: UDP, and TCP listening; for a guest, DHCP's too. Raises HostError."""
    opened: list[socket.socket] = []
    try:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            opened.append(open_socket(alloc, kind))
            if kind is socket.SOCK_STREAM:
                # What an earlier responder's clients left in TIME_WAIT must not keep the address.
                opened[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened[-1].bind((DNS_ADDRESS, _PORT))
        opened[1].listen(_BACKLOG)
        if guest:
            opened.append(open_socket(alloc, socket.SOCK_DGRAM))
            _bind_dhcp(opened[-1])
    except OSError as error:
        for each in opened:
            each.close()
        raise HostError(f"allocation {alloc}", step=f"bind {DNS_ADDRESS}:{_PORT}", hint=str(error)) from error
    return opened


def _bind_dhcp(opened: socket.socket) -> None:
    """To the guest's link alone: nobody else's broadcasts are meant, and its own must leave there."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, TAP.encode())
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    # Guests read it raw, before their kernel would have completed a checksum that the link leaves open.
    opened.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
    opened.bind(("", DHCP_PORT))


def resolv_conf() -> str:
    """/etc/resolv.conf of every workload. No AAAA questions where the C library can leave them out; no search list."""
    return f"nameserver {DNS_ADDRESS}\noptions timeout:1 attempts:2 no-aaaa\n"
