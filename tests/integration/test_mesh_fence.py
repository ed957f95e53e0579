"""Who lost the lock writes nothing any more: neither what Consul takes in transactions nor what it takes only alone."""

from collections.abc import AsyncIterator, Callable

import pytest

from controller.core.mesh_intent import OwnedIntention
from controller.election import HeldLock
from controller.entries import DEFAULTS, TRAFFIC_KINDS, Entry
from controller.journal.consul import lock_key
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.leader import Leadership
from controller.mesh.registrations import operations, wanted_record
from controller.mesh.writer import Writer
from outrider.errors import PeerError
from outrider.ids import JobName
from outrider.log import Log
from tests.integration import test_mesh
from tests.integration.test_mesh import API, CLUSTER, WEB, Record, instance, node

record = test_mesh.record  # the fixture
ENTRY = Entry(kind=DEFAULTS, name=API, protocol="http", meta={"outrider-owner": f"{CLUSTER}/shop"})
Wish = Callable[[Writer], None]


@pytest.fixture
async def consul(record: Record) -> AsyncIterator[ConsulAdapter]:
    made = ConsulAdapter(record.url)
    await made.probe()
    yield made
    await made.close()


async def lock(consul: ConsulAdapter) -> tuple[str, HeldLock]:
    """Taken from whoever had it; the one before believes that it still has it."""
    for old in await consul.sessions("controller"):
        await consul.destroy_session(old)
    session = await consul.create_session("controller", 15)
    assert await consul.acquire(lock_key(CLUSTER), b"{}", session)
    return session, HeldLock(cluster=CLUSTER, session=session, confirmed=lambda: True)


async def written(consul: ConsulAdapter) -> tuple[set[str], int, int]:
    """Services of the node, intentions, config entries."""
    services, _ = await consul.node(f"{CLUSTER}-n1")
    _, intentions = await consul.watch_intentions(0)
    entries = [one for kind in TRAFFIC_KINDS for one in await consul.entries(kind)]
    return set(services.services or {}) if services is not None else set(), len(intentions), len(entries)


WISHES: dict[str, tuple[Wish, Wish]] = {
    "services": (
        lambda writer: writer.set_node(node("n1", instance("a1"))),
        lambda writer: writer.set_node(node("n1", instance("a1"), instance("a2"))),
    ),
    "intentions": (
        lambda writer: writer.set_intentions((OwnedIntention(source=WEB, destination=API, job=JobName("shop")),)),
        lambda writer: writer.set_intentions(()),
    ),
    "entries": (lambda writer: writer.set_entries((ENTRY,)), lambda writer: writer.set_entries(())),
}


@pytest.mark.parametrize("kind", WISHES)
async def test_a_write_after_the_lock_was_lost_is_none(consul: ConsulAdapter, kind: str) -> None:
    first, second = WISHES[kind]
    _, held = await lock(consul)
    deposed = Writer(consul, CLUSTER, held, Log("mesh"))
    deposed.begin()
    first(deposed)
    await deposed.write()
    before = await written(consul)
    assert before != (set(), 0, 0)
    await lock(consul)
    second(deposed)
    deposed.fence._asked_s -= 1.0  # what Consul said of the lock is not of just now
    with pytest.raises(PeerError, match="lock is lost"):
        await deposed.write()
    assert await written(consul) == before
    assert not held.held
    with pytest.raises(PeerError, match="not held"):
        await deposed.fence.check()


async def test_a_session_that_was_wrongly_called_ended_is_no_obstacle(consul: ConsulAdapter) -> None:
    """As a server says it that has just come to lead and has not read its log yet."""
    ours, other = (Leadership(consul, CLUSTER, Log("mesh")) for _ in range(2))
    assert await ours.take()
    ours.lost()
    assert await ours.take()
    assert not await other.take(), "a lock that somebody else of this process holds is held"


async def test_a_proxy_is_registered_by_the_leader_alone(consul: ConsulAdapter) -> None:
    _, held = await lock(consul)
    deposed = Writer(consul, CLUSTER, held, Log("mesh"))
    await lock(consul)
    wanted = wanted_record(node("n1", instance("a1")), CLUSTER, {})
    with pytest.raises(PeerError, match="lock is lost"):
        await deposed._register(list(operations(None, wanted).proxies))
    assert await written(consul) == (set(), 0, 0)


async def test_an_entry_is_replaced_only_as_it_was_read(consul: ConsulAdapter) -> None:
    await consul.put_entry(ENTRY, 0)
    ((_, index),) = await consul.entries(DEFAULTS)
    await consul.put_entry(Entry(kind=DEFAULTS, name=API, protocol="grpc"))  # by hand
    for as_read in (0, index):
        with pytest.raises(PeerError, match="changed by somebody else"):
            await consul.put_entry(ENTRY, as_read)
    ((found, _),) = await consul.entries(DEFAULTS)
    assert found.protocol == "grpc"


def test_a_lock_that_is_not_confirmed_is_not_held() -> None:
    confirmed = [True]
    held = HeldLock(cluster=CLUSTER, session="s", confirmed=lambda: confirmed[0])
    assert held.held
    confirmed[0] = False
    assert not held.held
    confirmed[0] = True
    held.lost()
    assert not held.held
