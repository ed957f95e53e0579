"""A tunnel joins two calls: only the node that was asked may claim it, once; flow stops when nobody takes."""

import asyncio

import pytest

from controller import tunnels
from controller.tunnels import Frames, Tunnels
from outrider.errors import PeerError, RefusedError
from outrider.ids import NodeId
from outrider.v1.fleet_pb2 import TunnelEnd, TunnelFrame

N1, N2 = NodeId("n1"), NodeId("n2")


async def test_only_the_asked_node_claims_a_tunnel_and_once() -> None:
    table = Tunnels()
    with table.open(N1) as tunnel:
        with pytest.raises(RefusedError):
            table.claim(tunnel.id, N2)
        with pytest.raises(RefusedError):
            table.claim("guess", N1)
        assert table.claim(tunnel.id, N1) is tunnel
        with pytest.raises(RefusedError):
            table.claim(tunnel.id, N1)
    assert tunnel.closed.is_set()
    assert table.running == 0


async def test_frames_arrive_until_the_end() -> None:
    with Tunnels().open(N1) as tunnel:
        tunnel.opened.set()
        await tunnel.to_operator.put(TunnelFrame(stdout=b"a"))
        await tunnel.to_operator.put(TunnelFrame(end=TunnelEnd(exit_code=3)))
        got = [frame async for frame in tunnel.frames()]
    assert [frame.WhichOneof("frame") for frame in got] == ["stdout", "end"]


async def test_a_node_that_breaks_off_or_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Tunnels().open(N1) as tunnel:
        tunnel.opened.set()
        tunnel.to_operator.close()
        with pytest.raises(PeerError, match="node n1 broke off"):
            await anext(tunnel.frames())
    monkeypatch.setattr(tunnels, "OPEN_TIMEOUT_S", 0.01)
    with Tunnels().open(N1) as tunnel, pytest.raises(PeerError, match="did not answer"):
        await anext(tunnel.frames())


async def test_a_sender_waits_while_nobody_takes() -> None:
    frames = Frames()
    for _ in range(tunnels.FRAMES_MAX):
        await frames.put(TunnelFrame())
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(frames.put(TunnelFrame()))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await frames.get() is not None


def test_tunnels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "TUNNELS_MAX", 0)
    with pytest.raises(RefusedError, match="end one"), Tunnels().open(N1):
        pass
