"""Where hosts outside of the mesh are, for the sidecars that lead there: resolved by this node, again and again.

Owns one named task for each allocation whose group names external services, until it is gone. A host that cannot be
resolved keeps the addresses that it had. Never connects to any.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address

from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.validate_external import outside

_AGAIN_S = 30.0
_RETRY_S = 2.0  # while some host has no address
_DEADLINE_S = 5.0  # for one round
_ADDRESSES_MAX = 32  # of one host

Give = Callable[[AllocId, Mapping[str, tuple[str, ...]]], None]
Resolve = Callable[[str], Awaitable[tuple[str, ...]]]  # raises OSError


async def resolved(host: str) -> tuple[str, ...]:
    """IPv4 addresses, as this node's C library finds them. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


class Externals:
    """Used by the one event loop."""

    def __init__(self, *, give: Give, resolve: Resolve, tasks: asyncio.TaskGroup, log: Log) -> None:
        self._give = give
        self._resolve = resolve
        self._tasks = tasks
        self._log = log
        self._asking: dict[AllocId, asyncio.Task[None]] = {}
        self._first: dict[AllocId, asyncio.Event] = {}

    def acquire(self, assignment: Assignment) -> None:
        """Its sidecar is known: told where its hosts are, from now on."""
        hosts = tuple(dict.fromkeys(host for one in assignment.group.network.external for host in one.hosts))
        if hosts:
            alloc = assignment.alloc
            self._first[alloc] = asyncio.Event()
            self._asking[alloc] = self._tasks.create_task(self._keep(alloc, hosts), name=f"{alloc}-externals")

    def release(self, alloc: AllocId) -> None:
        self._first.pop(alloc, None)
        asking = self._asking.pop(alloc, None)
        if asking is not None:
            asking.cancel()

    async def tried(self, alloc: AllocId) -> None:
        """Returns once each of its hosts was asked for, found or not: a workload's first call need not fail."""
        first = self._first.get(alloc)
        if first is not None:
            await first.wait()

    async def _keep(self, alloc: AllocId, hosts: tuple[str, ...]) -> None:
        known: dict[str, tuple[str, ...]] = {}
        lost: frozenset[str] = frozenset()
        while True:
            answers = await asyncio.gather(*(self._answer(host) for host in hosts))
            for host, (addresses, _) in zip(hosts, answers, strict=True):
                if addresses:
                    known[host] = addresses
            self._give(alloc, dict(known))
            self._first[alloc].set()
            why = {host: reason for host, (addresses, reason) in zip(hosts, answers, strict=True) if not addresses}
            for host in why.keys() - lost:
                kept = "the last ones stay" if host in known else "calls of it are refused until it has some"
                self._log.warning("no address of an external host", alloc=alloc, host=host, reason=why[host], now=kept)
            lost = frozenset(why)
            await asyncio.sleep(_RETRY_S if lost else _AGAIN_S)

    async def _answer(self, host: str) -> tuple[tuple[str, ...], str]:
        """Addresses, in an order that does not change from one answer to the next; or why there are none."""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                found = await self._resolve(host)
        except TimeoutError:
            return (), f"no answer within {_DEADLINE_S:g} s"
        except (OSError, UnicodeError) as error:
            return (), str(error)
        # A name must not lead a sidecar to where no job file may.
        good = sorted(address for address in found if outside(IPv4Address(address)))
        return tuple(good[:_ADDRESSES_MAX]), "" if good else f"it is said to be at {', '.join(found)}, which is inside"
