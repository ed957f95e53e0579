"""Joins an operator's logs or exec call with the Tunnel that the agent opens for it. Bulk data never meets the session.

Queues: two for each tunnel, FRAMES_MAX frames each; when one is full, gRPC's flow control stops its sender.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Iterator

from outrider.errors import PeerError, RefusedError
from outrider.ids import NodeId
from outrider.v1.fleet_pb2 import TunnelFrame

FRAMES_MAX = 16
TUNNELS_MAX = 512
OPEN_TIMEOUT_S = 10.0


class Frames:
    """One direction: `put` waits while FRAMES_MAX are under way, `close` never does."""

    def __init__(self) -> None:
        self._frames: deque[TunnelFrame] = deque()
        self._room = asyncio.Semaphore(FRAMES_MAX)
        self._ready = asyncio.Event()
        self._closed = False

    async def put(self, frame: TunnelFrame) -> None:
        await self._room.acquire()
        self._frames.append(frame)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def get(self) -> TunnelFrame | None:
        """The next, or None: closed, and all was taken."""
        while not self._frames:
            if self._closed:
                return None
            self._ready.clear()
            await self._ready.wait()
        self._room.release()
        return self._frames.popleft()


class Tunnel:
    """One operator's call and one agent's, frame by frame."""

    def __init__(self, node: NodeId) -> None:
        self.id = secrets.token_urlsafe(24)  # the agent proves with it that it was asked
        self.node = node
        self.to_agent = Frames()
        self.to_operator = Frames()
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()  # the operator's call has ended, for whatever reason

    async def frames(self) -> AsyncGenerator[TunnelFrame, None]:
        """What the agent sends, its end included. Raises PeerError where it does not come, or breaks off."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self.opened.wait()
        except TimeoutError as error:
            raise PeerError(f"node {self.node} did not answer within {OPEN_TIMEOUT_S:g} s") from error
        while (frame := await self.to_operator.get()) is not None:
            yield frame
            if frame.HasField("end"):
                return
        raise PeerError(f"node {self.node} broke off")


class Tunnels:
    """Those that wait for their agent, and those that run."""

    def __init__(self) -> None:
        self._waiting: dict[str, Tunnel] = {}
        self.running = 0

    @contextlib.contextmanager
    def open(self, node: NodeId) -> Iterator[Tunnel]:
        """For the operator's call. Raises RefusedError("too-many-tunnels")."""
        if self.running >= TUNNELS_MAX:
            raise RefusedError("too-many-tunnels", f"{TUNNELS_MAX} logs and exec calls run already; end one")
        tunnel = Tunnel(node)
        self._waiting[tunnel.id] = tunnel
        self.running += 1
        try:
            yield tunnel
        finally:
            self.running -= 1
            self._waiting.pop(tunnel.id, None)
            tunnel.closed.set()

    def claim(self, tunnel_id: str, node: NodeId) -> Tunnel:
        """For the agent's call, once. Raises RefusedError("not-found"), for another node's tunnel too."""
        tunnel = self._waiting.get(tunnel_id)
        if tunnel is None or tunnel.node != node:
            raise RefusedError("not-found", "no such tunnel: its caller has gone, or it was never asked of this node")
        del self._waiting[tunnel_id]
        tunnel.opened.set()
        return tunnel
