"""Three controllers on three Consul servers that stop hearing each other: in a network namespace, cut by nftables."""

import contextlib
import functools
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.faults.test_controllers import WAIT_S, Fleet, fleet_in, submitted
from tests.integration.network_lab import lab
from tests.integration.processes import until

pytestmark = [pytest.mark.host, pytest.mark.deep, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    with lab():  # this thread lives there, and whatever it starts
        async with fleet_in(tmp_path_factory.mktemp("partitions")) as made:
            yield made


@contextlib.contextmanager
def cut(port: int) -> Iterator[None]:
    """Nobody reaches `port` any more, and no packet comes back from it: no reset, nothing but silence."""
    _nft("add table inet cut")
    try:
        _nft("add chain inet cut in { type filter hook input priority 0; }")
        _nft(f"add rule inet cut in tcp dport {port} drop")
        _nft(f"add rule inet cut in tcp sport {port} drop")
        yield
    finally:
        _nft("delete table inet cut")


def _nft(rule: str) -> None:
    subprocess.run(["nft", rule], check=True, timeout=20)


async def all_know(fleet: Fleet, names: set[str]) -> None:
    for controller in fleet.controllers:
        await until(functools.partial(fleet.knows, controller, names), "each controller knows all of it", WAIT_S)


async def test_a_leader_that_consul_reaches_and_that_does_not_reach_consul_is_followed(fleet: Fleet) -> None:
    """Its check passes by itself: it has to say that it is of no use."""
    names = await submitted(fleet, 3)
    victim = await fleet.led()
    others = [one for one in fleet.controllers if one is not victim]
    with cut(fleet.consul.servers[fleet.controllers.index(victim)].http):
        await until(lambda: any(one.leads() for one in others), "another leads", 2 * WAIT_S)
        names |= await submitted(fleet, 2)
    await all_know(fleet, names)
    await until(lambda: not victim.leads(), "the one before knows it, too", WAIT_S)


async def test_a_follower_that_does_not_reach_consul_disturbs_nobody(fleet: Fleet) -> None:
    leader = await fleet.led()
    follower = next(one for one in fleet.controllers if one is not leader)
    with cut(fleet.consul.servers[fleet.controllers.index(follower)].http):
        names = await submitted(fleet, 3)
        assert await fleet.led() is leader
    await all_know(fleet, names)


async def test_a_stopped_consul_leader_loses_nothing(fleet: Fleet) -> None:
    """Its connections stay open, and nobody answers on them."""
    names = await submitted(fleet, 3)
    server = fleet.consul.leader()
    server.signal(signal.SIGSTOP)
    try:
        names |= await submitted(fleet, 1)
    finally:
        server.signal(signal.SIGCONT)
    await until(fleet.consul.ready, "Consul is whole again", WAIT_S)
    await all_know(fleet, names)
