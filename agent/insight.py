"""What operators may know of this node's sidecars: figures of pairs, certificates, requests as they pass, a probe.

Starts no task. Values go out one by one; a caller that hangs up ends what gives them.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

import h11

from agent.metrics import Pair, SidecarFigures
from outrider import codec
from outrider.clock import monotonic_s
from outrider.errors import OutriderError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.insight import LatencyBucket, LeafState, PairFigures, ProbeOutcome, TappedCall
from outrider.model.mesh import VIRTUAL_PORT, Leaf
from outrider.v1 import insight_pb2
from outrider.v1.insight_pb2 import MeshAnswer, MeshQuery, ProbeQuery, TapQuery

OVER_S_MAX = 60.0
CALLS_PER_S_MAX = 200  # told of one sidecar; more would be no reading, and not free
PROBE_S = 5.0
_QUIET_S = 1.0  # a connection that lives so long without a word was let through
_AT_ONCE = 8
_READ_BYTES = 16 * 1024
_BODY_BYTES_MAX = 512
_OURS = b"outrider: "  # how answers begin that a sidecar made itself

OpenSocket = Callable[[AllocId, socket.SocketKind], socket.socket]


class Library(Protocol):
    """As sidecar.sidecars.Sidecars has it."""

    async def stats(self, alloc: AllocId) -> SidecarFigures: ...
    def leaves(self) -> tuple[Leaf, ...]: ...
    def tap(
        self, alloc: AllocId, source: ServiceName, destination: ServiceName, *, headers: bool
    ) -> AsyncGenerator[TappedCall, None]: ...


class Insight:
    def __init__(
        self,
        *,
        node: NodeId,
        library: Library,
        sidecars: Callable[[], Iterable[AllocId]],
        open_socket: OpenSocket,
        rng: random.Random,
    ) -> None:
        """`sidecars`: the allocations whose sidecars run."""
        self._node = node
        self._library = library
        self._sidecars = sidecars
        self._open_socket = open_socket
        self._rng = rng

    async def answers(self, query: MeshQuery) -> AsyncGenerator[MeshAnswer, None]:
        """Raises OutriderError in words for the caller."""
        match query.WhichOneof("query"):
            case "figures":
                for pair in await self._figures(min(query.figures.over_s, OVER_S_MAX)):
                    yield MeshAnswer(pair=codec.to_wire(pair, insight_pb2.PairFigures))
            case "certificates":
                for leaf in self._library.leaves():
                    state = LeafState(
                        service=leaf.service, node=self._node, serial=leaf.serial, expires_at_s=leaf.expires_at_s
                    )
                    yield MeshAnswer(leaf=codec.to_wire(state, insight_pb2.LeafState))
            case "probe":
                outcome = await self._probe(query.probe)
                yield MeshAnswer(probe=codec.to_wire(outcome, insight_pb2.ProbeOutcome))
            case "tap":
                async with contextlib.aclosing(self._tap(query.tap)) as calls:
                    async for call in calls:
                        yield MeshAnswer(call=codec.to_wire(call, insight_pb2.TappedCall))
            case other:
                raise RefusedError("unsupported", f"{other}: this agent is older than its controller")

    async def _figures(self, over_s: float) -> tuple[PairFigures, ...]:
        """The difference of two looks. A sidecar that began or ended between them is left out."""
        before = await self._look()
        await asyncio.sleep(over_s)
        after = await self._look()
        return tuple(
            _difference(alloc, at_s - before[alloc][0], old, pair)
            for alloc, (at_s, pairs) in after.items()
            if alloc in before
            for pair in pairs
            for old in [next((one for one in before[alloc][1] if _names(one) == _names(pair)), None)]
        )

    async def _look(self) -> dict[AllocId, tuple[float, Sequence[Pair]]]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(alloc: AllocId) -> tuple[float, Sequence[Pair]] | None:
            async with room:
                try:
                    figures = await self._library.stats(alloc)
                except (OutriderError, KeyError):
                    return None  # it starts, or ends
                return monotonic_s(), figures.outbound

        allocs = tuple(self._sidecars())
        found = await asyncio.gather(*(one(alloc) for alloc in allocs))
        return {alloc: each for alloc, each in zip(allocs, found, strict=True) if each is not None}

    async def _tap(self, query: TapQuery) -> AsyncGenerator[TappedCall, None]:
        calls = self._library.tap(
            AllocId(query.alloc), ServiceName(query.source), ServiceName(query.destination), headers=query.headers
        )
        second_s, told = monotonic_s(), 0
        async with contextlib.aclosing(calls):
            async for call in calls:
                if self._rng.uniform(0, 100) >= query.percent:
                    continue
                if monotonic_s() - second_s >= 1:
                    second_s, told = monotonic_s(), 0
                told += 1
                if told <= CALLS_PER_S_MAX:
                    yield call

    async def _probe(self, query: ProbeQuery) -> ProbeOutcome:
        began_s = monotonic_s()
        try:
            async with asyncio.timeout(PROBE_S):
                reached, text = await self._call(query)
        except TimeoutError:
            reached, text = False, f"no answer within {PROBE_S:g} s"
        except (OSError, h11.ProtocolError) as error:
            reached, text = False, f"the sidecar of {query.alloc} broke off: {error}"
        return ProbeOutcome(reached=reached, text=text, duration_ms=(monotonic_s() - began_s) * 1000)

    async def _call(self, query: ProbeQuery) -> tuple[bool, str]:
        """As the workload itself would: to the virtual address, from inside its namespace."""
        loop = asyncio.get_running_loop()
        with self._open_socket(AllocId(query.alloc), socket.SOCK_STREAM) as opened:
            opened.setblocking(False)
            await loop.sock_connect(opened, (query.virtual_address, VIRTUAL_PORT))
            if query.http:
                return await _request(opened, query)
            try:
                async with asyncio.timeout(_QUIET_S):
                    data = await loop.sock_recv(opened, _READ_BYTES)
            except TimeoutError:
                return True, f"a connection stays open for {_QUIET_S:g} s"
            if data:
                return True, f"it said {len(data)} bytes"
            return False, "the connection was closed before anything came"


async def _request(opened: socket.socket, query: ProbeQuery) -> tuple[bool, str]:
    loop = asyncio.get_running_loop()
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_READ_BYTES)
    headers = [("host", query.authority), ("user-agent", "outrider-probe"), ("accept", "*/*"), ("connection", "close")]
    asked = http.send(h11.Request(method="GET", target=query.path, headers=headers))
    assert asked is not None, "a request is bytes to send"
    await loop.sock_sendall(opened, asked)
    status, body = 0, b""
    while len(body) < _BODY_BYTES_MAX:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await loop.sock_recv(opened, _READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            break
    if body.startswith(_OURS):
        why = body[len(_OURS) : _BODY_BYTES_MAX].decode(errors="replace").strip()
        return False, f"HTTP {status} from a sidecar: {why}"
    return True, f"GET {query.path}: HTTP {status} from the workload"


def _names(pair: Pair) -> tuple[str, str]:
    return pair.source, pair.destination


def _difference(alloc: AllocId, seconds: float, before: Pair | None, after: Pair) -> PairFigures:
    def counts(pair: Pair | None) -> tuple[int, int, int, int, int]:
        if pair is None:
            return 0, 0, 0, 0, 0
        classes = dict(pair.requests)
        return (
            sum(classes.values()),
            classes.get("5xx", 0),
            pair.errors,
            pair.connections,
            pair.bytes_sent + pair.bytes_received,
        )

    requests, failures, errors, connections, passed = (
        max(0, new - old) for new, old in zip(counts(after), counts(before), strict=True)
    )
    old = dict(before.latency_ms) if before is not None else {}
    return PairFigures(
        source=ServiceName(after.source),
        destination=ServiceName(after.destination),
        alloc=alloc,
        seconds=seconds,
        requests=requests,
        # Of http, what its caller was told: a connection that failed and was tried again troubled nobody.
        failed=failures if after.requests else errors,
        connections=connections,
        connections_active=after.connections_active,
        bytes=passed,
        latency=tuple(
            LatencyBucket(below_ms=below, count=max(0, count - old.get(below, 0))) for below, count in after.latency_ms
        ),
    )
