"""Agents among themselves: bulk data straight from node to node, over mTLS. The controller says who may bring what.

Owns the listener and the dialling; each connection says in its first line what it is for. Tasks: one for each
connection that is taken, until its handler has done with it.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from outrider.config import host_port
from outrider.errors import PeerError
from outrider.ids import NodeId
from outrider.log import Log
from outrider.model.job import Value
from outrider.tls import IdentityKind, TlsFiles, certificate_identity, ssl_context

DIAL_S = 5.0
_LINE_S = 5.0
_LINE_BYTES_MAX = 256 * 1024
_CLOSE_S = 1.0
CONNECTIONS_MAX = 256
# A host that is gone without a word is noticed within 20 s also where nothing is left to be said to it.
KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}

S = TypeVar("S", bound=msgspec.Struct)


class Purpose(Value, frozen=True, kw_only=True):
    """The first line of a connection. `alloc`: of the guest that is brought; `name`: of a file, where it is one."""

    kind: str  # "control", "memory", "disk", "seed", "image", "ask"
    alloc: str
    name: str = ""


class Line:
    """One connection: lines of JSON, or bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, node: NodeId) -> None:
        self.reader = reader
        self.writer = writer
        self.node = node  # by its certificate
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    async def say(self, value: msgspec.Struct) -> None:
        self.writer.write(msgspec.json.encode(value) + b"\n")
        await self.writer.drain()

    async def hear(self, kind: type[S], timeout_s: float) -> S:
        """Raises PeerError where it does not come, or is something else."""
        try:
            async with asyncio.timeout(timeout_s):
                text = await self.reader.readuntil(b"\n")
            return msgspec.json.decode(text, type=kind)
        except TimeoutError as error:
            raise PeerError(f"node {self.node} did not answer within {timeout_s:g} s") from error
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise PeerError(f"node {self.node} broke off") from error
        except msgspec.DecodeError as error:
            raise PeerError(f"node {self.node} said something else: it may be of another version: {error}") from error

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.writer.wait_closed()


Handler = Callable[[Purpose, Line], Awaitable[None]]


class Peers:
    def __init__(self, *, cluster: str, tls: TlsFiles, log: Log) -> None:
        self._cluster = cluster
        self._tls = tls
        self._log = log
        self._open = 0

    @asynccontextmanager
    async def listening(self, address: str, port: int, handler: Handler) -> AsyncIterator[str]:
        """The address that others dial. `handler` may keep a connection as long as it likes."""

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._open >= CONNECTIONS_MAX:
                writer.close()
                return
            self._open += 1
            try:
                await self._take(reader, writer, handler)
            finally:
                self._open -= 1

        context = ssl_context(self._tls, server=True)
        server = await asyncio.start_server(take, address, port, ssl=context, limit=_LINE_BYTES_MAX)
        try:
            yield f"{address}:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    @asynccontextmanager
    async def dial(self, address: str, node: NodeId, purpose: Purpose) -> AsyncIterator[Line]:
        """A connection to the agent of `node`, and no other's. Raises PeerError."""
        context = ssl_context(self._tls, server=False)
        context.check_hostname = False  # its certificate names the node: that is what is checked
        host, port = host_port(address)
        try:
            async with asyncio.timeout(DIAL_S):
                reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=_LINE_BYTES_MAX)
        except (OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            raise PeerError(f"node {node} at {address}: {str(error) or f'no answer within {DIAL_S:g} s'}") from error
        line = Line(reader, writer, node)
        try:
            found = self._node(writer)
            if found != node:
                raise PeerError(f"{address} is node {found or 'of no fleet'}, not {node}")
            try:
                await line.say(purpose)
                yield line
            except (ConnectionError, ssl.SSLError) as error:
                raise PeerError(f"node {node} broke off: {error}") from error
        finally:
            await line.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
        node = self._node(writer)
        line = Line(reader, writer, NodeId(node or ""))
        try:
            if node is None:
                raise PeerError("no node of this fleet")  # noqa: TRY301 - said and closed below
            await handler(await line.hear(Purpose, _LINE_S), line)
        except (PeerError, ConnectionError, ssl.SSLError) as error:
            peer = writer.get_extra_info("peername")
            self._log.info("peer's connection ended", node=node, peer=str(peer), reason=str(error))
        finally:
            await line.close()

    def _node(self, writer: asyncio.StreamWriter) -> str | None:
        identity = certificate_identity(writer.get_extra_info("peercert"))
        if identity is None or identity.kind is not IdentityKind.NODE or identity.cluster != self._cluster:
            return None
        return identity.name
