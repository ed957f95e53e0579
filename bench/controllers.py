"""Three controllers on three Consul servers: how long until a write is accepted again, and whether any was lost."""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from bench.figure import emit
from tests.faults.test_controllers import Fleet, fleet_in, submitted

_PEER = "Nomad and Consul, published: a new leader within seconds (raft, 1 to 3 s)"
_PEER_S = 3.0


async def measure(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as directory:
        async with fleet_in(Path(directory)) as fleet:
            acknowledged: set[str] = set()
            killed = [await _lose_controller(fleet, acknowledged) for _ in range(rounds)]
            consul = [await _lose_consul_leader(fleet, acknowledged) for _ in range(rounds)]
            lost = acknowledged - await fleet.jobs(await fleet.led())
    emit("failover.controller_s", max(killed), "s", peer=_PEER, peer_value=_PEER_S)
    emit("failover.controller_median_s", statistics.median(killed), "s", peer=_PEER, peer_value=_PEER_S)
    emit("failover.consul_leader_s", max(consul), "s", peer=_PEER, peer_value=_PEER_S)
    emit("failover.consul_leader_median_s", statistics.median(consul), "s", peer=_PEER, peer_value=_PEER_S)
    emit("failover.acknowledged_lost", len(lost), "writes")


async def _lose_controller(fleet: Fleet, acknowledged: set[str]) -> float:
    acknowledged |= await submitted(fleet, 10)
    victim = await fleet.led()
    began_s = time.monotonic()
    await victim.kill()
    acknowledged |= await submitted(fleet, 1)
    took_s = time.monotonic() - began_s
    await victim.launch()
    await fleet.settled()
    return took_s


async def _lose_consul_leader(fleet: Fleet, acknowledged: set[str]) -> float:
    acknowledged |= await submitted(fleet, 10)
    server = fleet.consul.leader()
    began_s = time.monotonic()
    server.kill()
    with contextlib.ExitStack() as stack:
        stack.callback(fleet.consul.start_server, server)
        acknowledged |= await submitted(fleet, 1)
        took_s = time.monotonic() - began_s
    await fleet.settled()
    return took_s
