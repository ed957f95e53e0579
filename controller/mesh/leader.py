"""The leader lock in Consul: only its holder writes the catalog (DESIGN, decision 2). Owns one session; no task.

The lock's value says which process holds it, so that a controller started again on the same host need not wait until
the session of its dead predecessor runs out.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Protocol

import msgspec

from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.shapes import Txn, TxnKv
from outrider.errors import OutriderError
from outrider.log import Log
from outrider.model.job import Value

TTL_S = 15  # Consul's least is 10
RENEW_S = 5.0
_RELEASE_TIMEOUT_S = 1.0


class Holder(Value, frozen=True, kw_only=True):
    """A process, named so that its death can be told for sure by another one on the same host."""

    boot: str
    pid_namespace: str
    pid: int
    started: str  # in ticks since boot: pids are used again


class Lock(Protocol):
    """What the mesh asks of whoever says that this controller leads."""

    @property
    def held(self) -> bool: ...
    async def take(self) -> bool: ...
    async def renew(self) -> None: ...
    def lost(self) -> None: ...
    def guard(self) -> Txn: ...
    async def release(self) -> None: ...


class Leadership:
    """The lock of a controller whose journal is a file, taken or not."""

    def __init__(self, consul: ConsulAdapter, cluster: str, log: Log) -> None:
        self._consul, self._cluster, self._log = consul, cluster, log
        self._key = f"outrider/{cluster}/leader"
        self._session = ""
        self._past: set[str] = set()  # sessions of ours that Consul said had ended
        self.held = False

    async def take(self) -> bool:
        """Whether this controller holds the lock now. Raises PeerError, RefusedError."""
        if self.held:
            return True
        if not self._session or not await self._consul.renew_session(self._session):
            self._session = await self._consul.create_session(f"outrider-{self._cluster}", TTL_S)
        value = msgspec.json.encode(_this_process())
        self.held = await self._consul.acquire(self._key, value, self._session)
        if not self.held and await self._bury_predecessor():
            self.held = await self._consul.acquire(self._key, value, self._session)
        return self.held

    async def renew(self) -> None:
        """Keeps the session alive. Where it has ended, the lock is not held any more."""
        if self._session and not await self._consul.renew_session(self._session):
            self.lost()

    def lost(self) -> None:
        if self._session:
            self._past.add(self._session)
        self._session, self.held = "", False

    def guard(self) -> Txn:
        """Fails the transaction that it stands in unless the lock is still ours."""
        return Txn(kv=TxnKv(verb="check-session", key=self._key, session=self._session))

    async def release(self) -> None:
        """So that the next controller leads at once. Consul may be away: then the session runs out by itself."""
        session, self._session, self.held = self._session, "", False
        if session:
            with contextlib.suppress(OutriderError, TimeoutError):
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self._consul.destroy_session(session)

    async def _bury_predecessor(self) -> bool:
        found = await self._consul.key(self._key)
        if found is None or not found.session:
            return found is None
        if found.session in self._past:
            # A server that had just come to lead, and had not read its log yet, did not know it.
            await self._consul.destroy_session(found.session)
            return True
        try:
            holder = msgspec.json.decode(found.value or b"", type=Holder)
        except msgspec.MsgspecError:
            return False
        if not _is_dead(holder):
            return False
        self._log.info("leader is dead", pid=holder.pid)
        await self._consul.destroy_session(found.session)
        return True


def _this_process() -> Holder:
    pid = int(Path("/proc/self").resolve().name)
    return Holder(boot=_boot(), pid_namespace=_pid_namespace(), pid=pid, started=_started(pid))


def _is_dead(holder: Holder) -> bool:
    """True only where it is certain: same boot, same pid namespace, and no such process."""
    same_host = holder.boot == _boot() and holder.pid_namespace == _pid_namespace()
    return same_host and _started(holder.pid) != holder.started


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _started(pid: int) -> str:
    """ "" where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[19]
