"""Guests on their way between nodes: what the agent of either end does, over a connection from the one to the other.

Owns the conversation. The one that is left offers its guest; the other says what it lacks, and waits with an emulator;
then disk and memory follow. Only when all has arrived, and the one that is left has written down that it is no more
its own, may the guest go on: it never runs twice, and where anything breaks off before, it stays where it was.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from agent import qmp
from agent.core.events import GuestMoved
from agent.drivers.vm import DISK_SOCKET, QMP, SEED
from agent.guest_states import GuestPlace
from agent.peers import Line, Peers, Purpose
from agent.qmp.moving import Leaving, arrive, go_on, leaving, open_disk
from agent.sandbox.spec import StartError
from agent.snapshots import FileSum
from outrider.apart import apart
from outrider.clock import monotonic_s
from outrider.errors import HostError, OutriderError, PeerError, RefusedError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.allocation import Move, MoveReport, MoveStage
from outrider.model.job import MIB, Value

_EXPECT_S = 60.0  # until the other end has a sidecar and an emulator: its node may be busy
_STEP_S = 30.0
_GO_S = 60.0  # until nobody calls the one that is left
_IMAGE_S = 1800.0
_IDLE_S = 2.0
_LOOK_S = 1.0
_POLL_S = 0.02
_ASK_S = 2.0
_BLOCK_BYTES = 256 * 1024
_SEED_BYTES_MAX = 16 * MIB


class Offer(Value, frozen=True, kw_only=True):
    """The guest as it is, for the other end to be like it."""

    qemu: str
    machine: str
    accelerator: str
    processor: str
    identity: str  # its generation id
    images: Mapping[str, FileSum] = {}
    seed: bool = False


class Answer(Value, frozen=True, kw_only=True):
    """Of either end, to the step before. `refused`: why it goes no further."""

    refused: str = ""
    want: tuple[str, ...] = ()  # checksums of images that are not here


class Arrival:
    """A guest that is awaited, at the node that it comes to."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self._lines: dict[str, asyncio.Future[Line]] = {}
        self.void = False  # the other end takes its guest back
        self.over = asyncio.Event()  # the connections' handlers wait for it

    def line(self, kind: str) -> asyncio.Future[Line]:
        return self._lines.setdefault(kind, asyncio.get_running_loop().create_future())

    async def wait(self, kind: str, timeout_s: float) -> Line:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.line(kind))
        except TimeoutError as error:
            raise PeerError(f"node {self.move.node} brought no {kind} within {timeout_s:g} s") from error


class Departure:
    """A guest's move away from here, while it is under way."""

    def __init__(self, move: Move) -> None:
        self.to = move.alloc
        self.go = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Migration:
    """`came`: whether an allocation's guest is here since; `idle`: how many connections to its services are open."""

    def __init__(
        self,
        *,
        peers: Peers,
        came: Callable[[AllocId], bool],
        idle: Callable[[AllocId], Awaitable[int]],
        tell: Callable[[GuestMoved], Awaitable[None]],
        log: Log,
    ) -> None:
        self._peers = peers
        self._came = came
        self._idle = idle
        self._tell = tell
        self._log = log
        self._arrivals: dict[AllocId, Arrival] = {}
        self._expected = asyncio.Condition()

    # The node that a guest comes to.

    async def take(self, purpose: Purpose, line: Line) -> None:
        """A connection from another agent (agent.peers.Handler)."""
        alloc = AllocId(purpose.alloc)
        if purpose.kind == "ask":
            has_come = self._came(alloc)
            if not has_come and alloc in self._arrivals:
                self._arrivals[alloc].void = True  # whoever asks takes a no for good
            await line.say(Answer(refused="" if has_come else "it did not come"))
            return
        try:
            async with asyncio.timeout(_EXPECT_S), self._expected:
                await self._expected.wait_for(lambda: alloc in self._arrivals)
        except TimeoutError:
            await line.say(Answer(refused=f"no guest is awaited as {alloc}"))
            return
        arrival = self._arrivals[alloc]
        waiting = arrival.line(purpose.kind + (f" {purpose.name}" if purpose.name else ""))
        if arrival.move.node != line.node or waiting.done():
            await line.say(Answer(refused=f"{alloc} is not awaited from node {line.node}"))
            return
        waiting.set_result(line)
        await arrival.over.wait()

    @asynccontextmanager
    async def arrival(self, alloc: AllocId, move: Move) -> AsyncIterator[Arrival]:
        """While it is open, the guest may come."""
        arrival = Arrival(move)
        async with self._expected:
            self._arrivals[alloc] = arrival
            self._expected.notify_all()
        try:
            yield arrival
        except OutriderError as error:
            line = arrival.line("control")
            if line.done():
                with suppress(OSError):
                    await line.result().say(Answer(refused=str(error)))
            raise
        finally:
            del self._arrivals[alloc]
            arrival.over.set()

    async def offer(self, arrival: Arrival) -> Offer:
        return await (await arrival.wait("control", _EXPECT_S)).hear(Offer, _STEP_S)

    async def want(
        self, arrival: Arrival, images: tuple[FileSum, ...]
    ) -> AsyncIterator[tuple[FileSum, AsyncIterator[bytes]]]:
        """The images that this node lacks, one after the other, as they come."""
        control = await arrival.wait("control", 0)
        await control.say(Answer(want=tuple(image.sha256 for image in images)))
        for image in images:
            line = await arrival.wait(f"image {image.sha256}", _STEP_S)
            yield image, _blocks(line)

    async def seed(self, arrival: Arrival) -> bytes:
        line = await arrival.wait("seed", _STEP_S)
        found = b""
        async for block in _blocks(line):
            found += block
            if len(found) > _SEED_BYTES_MAX:
                raise PeerError(f"node {line.node} brings more than a seed")
        return found

    async def settle(self, arrival: Arrival, place: GuestPlace, *, disk: bool, taken_up: Callable[[], None]) -> None:
        """The emulator at `place` waits: the guest moves in, and goes on. Raises StartError where it does not."""
        try:
            await apart(self._settle(arrival, place, disk=disk, taken_up=taken_up), name="guest-arrives")
        except (OSError, OutriderError) as error:
            raise StartError(f"the guest did not arrive from node {arrival.move.node}: {error}") from error
        except ExceptionGroup as group_error:
            first = group_error.exceptions[0]
            raise StartError(f"the guest did not arrive from node {arrival.move.node}: {first}") from group_error

    async def _settle(self, arrival: Arrival, place: GuestPlace, *, disk: bool, taken_up: Callable[[], None]) -> None:
        control_socket = place.directory / QMP
        control = await arrival.wait("control", 0)
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            pumps = []
            if disk:
                await open_disk(control_socket, f"/vm/{DISK_SOCKET}")
                end = qmp.connect(place.directory / DISK_SOCKET)
                stack.callback(end.close)
            await control.say(Answer())
            # It says nothing until the guest is here, unless it is gone: then whatever is awaited does not come.
            left = group.create_task(_until_left(control), name="left")
            if disk:
                line = await arrival.wait("disk", _STEP_S)
                pumps += [group.create_task(work, name="disk") for work in _both_ways(line, end)]
            alive = group.create_task(_while_alive(control_socket), name="alive")
            line = await arrival.wait("memory", _IMAGE_S)
            alive.cancel()
            ours, theirs = _pair(stack)
            pumps.append(group.create_task(_from_line(line, ours), name="memory"))
            await arrive(control_socket, theirs)
            if left.done():
                raise PeerError(f"node {control.node} is ahead of what it was told")
            await control.say(Answer())
            async with asyncio.timeout(_STEP_S):
                await left
            if arrival.void:
                raise PeerError(f"node {control.node} took its guest back")
            taken_up()  # before it runs: an agent that comes later lets it run on
            await go_on(control_socket, disk=disk)
            with suppress(OSError):  # it asks where it does not hear
                await control.say(Answer())
            for pump in pumps:
                pump.cancel()

    # The node that it leaves.

    async def depart(
        self, alloc: AllocId, departure: Departure, move: Move, place: GuestPlace, make: "MakeOffer"
    ) -> None:
        """All of it. Every outcome is told; cancelled, the guest stays."""
        try:
            await self._tell_stage(alloc, move, MoveStage.COPYING)
            work = self._depart(alloc, departure, move, place, make)
            downtime_ms, cut = await apart(work, name=f"{alloc}-departs")
            await self._tell_stage(alloc, move, MoveStage.DONE, downtime_ms=downtime_ms, cut=cut)
        except (OSError, OutriderError, ExceptionGroup) as error:
            reason = str(error.exceptions[0]) if isinstance(error, ExceptionGroup) else str(error)
            await self.settle_departure(alloc, move, place, reason)

    async def settle_departure(self, alloc: AllocId, move: Move, place: GuestPlace, reason: str) -> None:
        """Whose is the guest, after something broke off? It runs on here unless it may run there."""
        if left_for(place.sandbox) == move.alloc:
            while not await self._answers(move):  # noqa: ASYNC110 - it can be told by that node alone, or by a stop
                await asyncio.sleep(_ASK_S)
            if left_for(place.sandbox) is not None and await self._runs_there(move):
                await self._tell_stage(alloc, move, MoveStage.DONE, message=reason)
                return
            stays(place.sandbox)
        with suppress(HostError):  # its emulator has ended: whoever watches it tells
            await qmp.resume(place.directory / QMP)
        await self._tell_stage(alloc, move, MoveStage.FAILED, message=f"the guest runs on here: {reason}")

    async def _depart(
        self, alloc: AllocId, departure: Departure, move: Move, place: GuestPlace, make: "MakeOffer"
    ) -> tuple[float, int]:
        """The downtime in ms, and how many connections to its services were open."""
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(self._dial(move, "control"))
            guest = await stack.enter_async_context(leaving(place.directory / QMP))
            offer, paths = await make(await guest.identity(), await guest.version())
            await control.say(offer)
            wanted = _accepted(await control.hear(Answer, _EXPECT_S)).want
            for sha256 in wanted:
                await self._send_file(move, "image", paths[sha256], sha256)
            if offer.seed:
                await self._send_file(move, "seed", place.memory / SEED)
            _accepted(await control.hear(Answer, _EXPECT_S))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            pumps = []
            if "disk" in offer.images:
                line = await stack.enter_async_context(self._dial(move, "disk"))
                ours, theirs = _pair(stack)
                pumps += [group.create_task(work, name=f"{alloc}-disk") for work in _both_ways(line, ours)]
                await guest.mirror(theirs)
            line = await stack.enter_async_context(self._dial(move, "memory"))
            ours, theirs = _pair(stack)
            pumps.append(group.create_task(_to_line(ours, line), name=f"{alloc}-memory"))
            await guest.copy(theirs)
            theirs.close()
            await self._tell_stage(alloc, move, MoveStage.READY)
            arrived = group.create_task(control.hear(Answer, _GO_S + _STEP_S), name=f"{alloc}-arrived")
            go = group.create_task(departure.go.wait(), name=f"{alloc}-go")
            until_s = monotonic_s() + _GO_S
            while not (go.done() or arrived.done()) and monotonic_s() < until_s:
                await asyncio.wait({arrived, go}, return_when=asyncio.FIRST_COMPLETED, timeout=_LOOK_S)
                await guest.look()
            if not go.done():
                go.cancel()
                _accepted(arrived.result() if arrived.done() else Answer(refused=f"not let go within {_GO_S:g} s"))
                raise PeerError(f"node {move.node} is ahead of what it was told")
            async with asyncio.timeout(_STEP_S):
                found = await self._leave(alloc, guest, control, arrived, move, place)
            for pump in pumps:
                pump.cancel()
            return found

    async def _leave(  # noqa: PLR0917 - of one move
        self,
        alloc: AllocId,
        guest: Leaving,
        control: Line,
        arrived: asyncio.Task[Answer],
        move: Move,
        place: GuestPlace,
    ) -> tuple[float, int]:
        until_s = monotonic_s() + _IDLE_S
        while (cut := await self._idle(alloc)) and monotonic_s() < until_s:  # noqa: ASYNC110 - nobody
            await asyncio.sleep(_POLL_S)  # nobody tells when the last request is done
        downtime_ms = await guest.leave()
        left_s = monotonic_s()
        _accepted(await arrived)
        leaves(place.sandbox, move)  # from here on it is not ours to run
        await control.say(Answer())
        _accepted(await control.hear(Answer, _STEP_S))
        return downtime_ms + 1000 * (monotonic_s() - left_s), cut

    def _dial(self, move: Move, kind: str, name: str = "") -> AbstractAsyncContextManager[Line]:
        return self._peers.dial(move.address, move.node, Purpose(kind=kind, alloc=move.alloc, name=name))

    async def _send_file(self, move: Move, kind: str, path: Path, name: str = "") -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            async with self._dial(move, kind, name) as line:
                while block := await asyncio.to_thread(file.read, _BLOCK_BYTES):
                    line.writer.write(block)
                    await line.writer.drain()

    async def _answers(self, move: Move) -> bool:
        try:
            await self._runs_there(move)
        except PeerError as error:
            self._log.warning("cannot tell where the guest is", alloc=move.alloc, reason=str(error))
            return False
        return True

    async def _runs_there(self, move: Move) -> bool:
        async with self._dial(move, "ask") as line:
            return not (await line.hear(Answer, _STEP_S)).refused

    async def _tell_stage(
        self,
        alloc: AllocId,
        move: Move,
        stage: MoveStage,
        *,
        message: str = "",
        downtime_ms: float = 0.0,
        cut: int = 0,
    ) -> None:
        report = MoveReport(to=move.alloc, stage=stage, message=message, downtime_ms=downtime_ms, connections_cut=cut)
        self._log.info("guest moves", alloc=alloc, to=move.alloc, stage=stage, message=message)
        await self._tell(GuestMoved(alloc=alloc, report=report))


MakeOffer = Callable[[str, str], Awaitable[tuple[Offer, Mapping[str, Path]]]]

_LEFT = "left"  # in the sandbox's own directory: the guest was given away, to the allocation that is named


def leaves(sandbox: Path, move: Move) -> None:
    """Durable on return."""
    path = sandbox / _LEFT
    with path.open("w") as file:
        file.write(move.alloc)
        file.flush()
        os.fsync(file.fileno())


def stays(sandbox: Path) -> None:
    (sandbox / _LEFT).unlink(missing_ok=True)


def left_for(sandbox: Path) -> AllocId | None:
    """The allocation that has the guest of `sandbox` since, or is about to; None where it is its own."""
    try:
        return AllocId((sandbox / _LEFT).read_text())
    except FileNotFoundError:
        return None


def _accepted(answer: Answer) -> Answer:
    if answer.refused:
        raise RefusedError("not-moved", answer.refused)
    return answer


async def _until_left(control: Line) -> None:
    """The other end has written down that its guest is ours. Raises PeerError where it keeps it, or breaks off."""
    if (await control.hear(Answer, _IMAGE_S + _GO_S + _STEP_S)).refused:
        raise PeerError(f"node {control.node} keeps its guest")


async def _while_alive(control_socket: Path) -> None:
    """Never returns. Raises OSError once the emulator has ended: whoever copies to its disk would wait for ever."""
    while True:
        await asyncio.sleep(_LOOK_S)
        qmp.connect(control_socket).close()


def _pair(stack: AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs


def _both_ways(line: Line, end: socket.socket) -> tuple[Coroutine[None, None, None], ...]:
    return _from_line(line, end), _to_line(end, line)


async def _from_line(line: Line, end: socket.socket) -> None:
    with suppress(OSError):  # whoever drives the emulator sees its end
        async for block in _blocks(line):
            await asyncio.get_running_loop().sock_sendall(end, block)
        end.shutdown(socket.SHUT_WR)


async def _to_line(end: socket.socket, line: Line) -> None:
    try:
        while block := await asyncio.get_running_loop().sock_recv(end, _BLOCK_BYTES):
            line.writer.write(block)
            await line.writer.drain()
    except OSError:
        # The other node is gone: the emulator must not wait for it.
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


async def _blocks(line: Line) -> AsyncIterator[bytes]:
    while block := await line.reader.read(_BLOCK_BYTES):
        yield block
