"""Addresses of hosts outside: told as they are found, kept when they are not, never of what is inside."""

import asyncio
from collections.abc import Mapping

import pytest

from agent.externals import Externals, resolved
from agent.names import outside_names
from outrider.ids import AllocId, GroupName, JobName, ServiceName
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.external import External, ExternalPort
from outrider.model.job import Group, Network

ALLOC = AllocId("00000000a1")
PORTS = (ExternalPort(port=443, to=443),)


def group(*hosts: str) -> Group:
    first = External(name=ServiceName("pay"), hosts=hosts, ports=PORTS)
    second = External(name=ServiceName("mail"), hosts=("203.0.113.7",), ports=PORTS)
    return Group(name=GroupName("web"), tasks=(), network=Network(external=(first, second)))


class Told:
    """Takes what is given, and answers for hosts."""

    def __init__(self) -> None:
        self.given: asyncio.Queue[Mapping[str, tuple[str, ...]]] = asyncio.Queue()
        self.hosts: dict[str, tuple[str, ...]] = {"203.0.113.7": ("203.0.113.7",)}

    def give(self, _alloc: AllocId, addresses: Mapping[str, tuple[str, ...]]) -> None:
        self.given.put_nowait(addresses)

    async def resolve(self, host: str) -> tuple[str, ...]:
        if host not in self.hosts:
            raise OSError("Name or service not known")
        return self.hosts[host]


async def test_a_host_keeps_its_addresses_when_it_is_no_more_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.externals._AGAIN_S", 0.0)
    monkeypatch.setattr("agent.externals._RETRY_S", 0.0)
    told = Told()
    told.hosts |= {"a.example": ("203.0.113.2", "203.0.113.1"), "sly.example": ("127.0.0.1", "198.18.0.1")}
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        externals = Externals(give=told.give, resolve=told.resolve, tasks=tasks, log=Log("test"))
        externals.acquire(assignment(group("a.example", "sly.example", "gone.example")))
        await externals.tried(ALLOC)
        both = {"a.example": ("203.0.113.1", "203.0.113.2"), "203.0.113.7": ("203.0.113.7",)}
        assert await told.given.get() == both
        del told.hosts["a.example"]
        told.hosts["gone.example"] = ("203.0.113.9",)
        while (now := await told.given.get()) == both:
            pass
        assert now == {**both, "gone.example": ("203.0.113.9",)}
        externals.release(ALLOC)


async def test_a_group_without_any_waits_for_nothing() -> None:
    async with asyncio.TaskGroup() as tasks:
        externals = Externals(give=Told().give, resolve=resolved, tasks=tasks, log=Log("test"))
        externals.acquire(assignment(Group(name=GroupName("web"), tasks=())))
        await asyncio.wait_for(externals.tried(ALLOC), 10)


async def test_the_nodes_own_resolver_is_asked() -> None:
    assert await resolved("localhost") == ("127.0.0.1",)


def test_each_is_known_by_its_name_and_by_those_of_its_hosts() -> None:
    assert outside_names(group("a.example", "b.example")) == {
        "pay.mesh": "198.19.255.0",
        "a.example": "198.19.255.0",
        "b.example": "198.19.255.0",
        "mail.mesh": "198.19.255.1",
    }


def assignment(wanted: Group) -> Assignment:
    return Assignment(alloc=ALLOC, job=JobName("shop"), job_version=1, group=wanted, index=0)
