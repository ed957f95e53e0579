"""The responder: one loop over the DNS sockets of all allocations of a node and the agent's control connections.
Guests get their address from it too.

Imports only the standard library, dnslib and its two neighbours, to stay small. Keeps nothing on disk: the agent
pushes everything, and again after either of them restarted. No packet and no client ends it or makes it wait.
"""

import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.network.dhcp import CLIENT_PORT, PACKET_BYTES_MAX, reply
from agent.network.dns.answers import QUERY_BYTES_MAX, MalformedQueryError, answer
from agent.network.dns.control import MESSAGE_BYTES_MAX, Do, Reply, Request, decode_request, encode

_BATCH = 16  # datagrams of one allocation at a time, so that one that floods delays the others little
_CLIENTS_MAX = 8  # TCP connections of one allocation; more are closed at once
_CLIENT_IDLE_S = 5.0
_AGENTS_MAX = 16  # control connections: one in use, and those whose end is yet to be noticed
_LENGTH_BYTES = 2


class Responder:
    """Serves until the process ends."""

    def __init__(self, path: Path) -> None:
        """Listens at `path`; a socket that an earlier responder left there is replaced."""
        self._selector = selectors.DefaultSelector()
        self._attached: dict[str, _Attached] = {}
        self._agents = 0
        self._answered = self._malformed = self._refused = 0
        path.unlink(missing_ok=True)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._control.bind(str(path))
        self._control.listen(_AGENTS_MAX)
        self._watch(self._control, self._accept_agent)

    def serve(self) -> None:
        while True:
            self.turn(timeout_s=_CLIENT_IDLE_S)

    def turn(self, *, timeout_s: float) -> None:
        """Wait for what there is to do, at most `timeout_s`, and do it."""
        for key, _ in self._selector.select(timeout_s):
            # A handler earlier in this turn may have closed it.
            if key.fileobj in self._selector.get_map():
                handler: Callable[[], None] = key.data
                handler()
        self._close_idle()

    def _accept_agent(self) -> None:
        try:
            agent, _ = self._control.accept()
        except OSError:
            return  # it gave up before we got here
        if self._agents >= _AGENTS_MAX:
            agent.close()
            return
        self._agents += 1
        agent.setblocking(False)
        self._watch(agent, lambda: self._hear(agent))

    def _hear(self, agent: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(agent, MESSAGE_BYTES_MAX, 3)
            sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
            if data:
                agent.send(encode(self._obey(data, sockets)))
                return
        except OSError:
            pass  # it went away, or does not read its replies
        self._agents -= 1
        self._drop(agent)

    def _obey(self, data: bytes, sockets: list[socket.socket]) -> Reply:
        try:
            error = self._apply(decode_request(data), sockets)
        except ValueError as problem:
            error = f"not understood: {problem}"
        if error:
            for unused in sockets:
                unused.close()
        return Reply(
            error=error,
            held=tuple(self._attached),
            answered=self._answered,
            malformed=self._malformed,
            refused=self._refused,
        )

    def _apply(self, request: Request, sockets: list[socket.socket]) -> str:
        """What is wrong with the request; "" where it was done."""
        match request.do:
            case Do.ATTACH:
                if len(sockets) not in (2, 3):
                    return f"attach takes 2 or 3 sockets, not {len(sockets)}"
                self._detach(request.alloc)
                self._attach(request.alloc, *sockets)
            case Do.NAMES:
                if request.alloc not in self._attached:
                    return f"allocation {request.alloc} is not attached"
                self._attached[request.alloc].names = request.names
            case Do.DETACH:
                self._detach(request.alloc)
            case Do.HELD:
                pass  # every reply tells
        return ""

    def _attach(self, alloc: str, udp: socket.socket, tcp: socket.socket, dhcp: socket.socket | None = None) -> None:
        attached = self._attached[alloc] = _Attached(udp=udp, tcp=tcp, dhcp=dhcp)
        if dhcp is not None:
            dhcp.setblocking(False)
            self._watch(dhcp, lambda: self._lease(dhcp))
        udp.setblocking(False)
        tcp.setblocking(False)
        self._watch(udp, lambda: self._answer_datagrams(attached))
        self._watch(tcp, lambda: self._accept_client(attached))

    def _detach(self, alloc: str) -> None:
        attached = self._attached.pop(alloc, None)
        if attached is not None:
            for held in (attached.udp, attached.tcp, attached.dhcp, *attached.clients):
                if held is not None:
                    self._drop(held)

    def _answer_datagrams(self, attached: "_Attached") -> None:
        for _ in range(_BATCH):
            try:
                query, sender = attached.udp.recvfrom(QUERY_BYTES_MAX)
                reply = self._answer(query, attached.names)
                if reply:
                    attached.udp.sendto(reply, sender)
            except OSError:
                return  # nothing more to read, or the last one's sender is gone

    def _lease(self, dhcp: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                answered = reply(dhcp.recv(PACKET_BYTES_MAX))
                if answered is not None:
                    dhcp.sendto(answered[0], (answered[1], CLIENT_PORT))
            except OSError:
                return  # nothing more to read, or the guest's link is down

    def _accept_client(self, attached: "_Attached") -> None:
        try:
            client, _ = attached.tcp.accept()
        except OSError:
            return
        if len(attached.clients) >= _CLIENTS_MAX:
            self._refused += 1
            client.close()
            return
        client.setblocking(False)
        attached.clients[client] = _Client(since_s=time.monotonic())
        self._watch(client, lambda: self._answer_client(attached, client))

    def _answer_client(self, attached: "_Attached", client: socket.socket) -> None:
        state = attached.clients[client]
        try:
            data = client.recv(QUERY_BYTES_MAX)
            state.received += data
            while data and (query := state.next_query()) is not None:
                reply = self._answer(query, attached.names)
                whole = len(reply).to_bytes(_LENGTH_BYTES) + reply
                # A client that does not read its answers is not waited for.
                if not reply or client.send(whole) < len(whole):
                    data = b""
            if data and len(state.received) <= QUERY_BYTES_MAX:
                state.since_s = time.monotonic()
                return
        except OSError:
            pass
        del attached.clients[client]
        self._drop(client)

    def _answer(self, query: bytes, names: Mapping[str, str]) -> bytes:
        try:
            reply = answer(query, names)
        except MalformedQueryError:
            self._malformed += 1
            return b""
        self._answered += 1
        return reply

    def _close_idle(self) -> None:
        oldest_s = time.monotonic() - _CLIENT_IDLE_S
        for attached in self._attached.values():
            for client in [client for client, state in attached.clients.items() if state.since_s < oldest_s]:
                del attached.clients[client]
                self._drop(client)

    def _watch(self, watched: socket.socket, handler: Callable[[], None]) -> None:
        self._selector.register(watched, selectors.EVENT_READ, handler)

    def _drop(self, watched: socket.socket) -> None:
        self._selector.unregister(watched)
        watched.close()


@dataclass(kw_only=True, slots=True)
class _Client:
    since_s: float  # when it last said something
    received: bytes = b""

    def next_query(self) -> bytes | None:
        length = int.from_bytes(self.received[:_LENGTH_BYTES]) + _LENGTH_BYTES
        if len(self.received) < max(length, _LENGTH_BYTES):
            return None
        query, self.received = self.received[_LENGTH_BYTES:length], self.received[length:]
        return query


@dataclass(kw_only=True, slots=True)
class _Attached:
    udp: socket.socket
    tcp: socket.socket
    dhcp: socket.socket | None
    names: Mapping[str, str] = field(default_factory=dict)
    clients: dict[socket.socket, _Client] = field(default_factory=dict)
