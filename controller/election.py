"""Who leads: a lock in Consul's KV, held by a session that hangs on this process's progress check.

Owns the session, the check and what is known of the leader. Tasks: `run`, which watches the lock's key and takes it
where it is free; `confirm`, while this controller leads. Never decides what a leader does.

The check is asked every second and the lock has no delay: a dead or stopped leader is replaced within about two
seconds (a session with a time to live takes fifteen). A leader that could not confirm its lock for CONFIRMED_S stops
acting until it can; one that could not for GIVE_UP_S fails its own check; one that lost it ends its term.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import msgspec

from controller.journal import LeadershipLostError
from controller.journal.consul import lock_key
from controller.mesh.backoff import Backoff
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.shapes import Txn, TxnKv
from outrider.clock import monotonic_s
from outrider.config import host_port
from outrider.errors import OutriderError, PeerError, RefusedError
from outrider.log import Log
from outrider.model.job import Value

CONFIRMED_S: Final = 2.0
GIVE_UP_S: Final = 12.0  # longer than Consul takes for a leader of its own: that is no reason for another controller
CHECK_INTERVAL_S: Final = 1
_CONFIRM_EVERY_S: Final = 0.25
_CONFIRM_TIMEOUT_S: Final = 1.0
_RELEASE_TIMEOUT_S: Final = 1.0
_SERVICE: Final = "outrider-controller"  # HOST of every controller, by Consul's DNS: outrider-controller.service.consul


class Member(Value, frozen=True, kw_only=True):
    """A controller, as the lock's value tells of it."""

    name: str
    address: str  # FleetService and OperatorService
    join_address: str


class Election:
    def __init__(self, consul: ConsulAdapter, *, cluster: str, member: Member, log: Log) -> None:
        self.leader: Member | None = None  # as far as is known
        self.changed = asyncio.Event()  # set when `leader` changed; who waits for it clears it
        self._consul, self._cluster, self._member = consul, cluster, member
        self.progress_url = ""  # said before `win`
        self._log = log
        self._key = lock_key(cluster)
        self._id = f"{_SERVICE}-{cluster}-{member.name}"
        self.session = ""
        self._confirmed_s = 0.0
        self._lost = False
        self._confirmation = asyncio.Event()

    async def win(self) -> None:
        """Returns once this controller holds the lock; Consul may be away meanwhile."""
        backoff = Backoff()
        index = 0
        while True:
            try:
                if not self.session:
                    self.session = await self._begin_session()
                    index = 0
                asked_s = monotonic_s()
                if await self._consul.acquire(self._key, msgspec.json.encode(self._member), self.session):
                    self._confirmed_s, self._lost = asked_s, False
                    self._know(self._member)
                    return
                index = await self._watch(index)
                backoff.reset()
            except (PeerError, RefusedError) as error:
                self._log.debug("election", error=error)
                index = 0
                self.session = ""  # it may have ended meanwhile
                await backoff.pause()

    async def confirm(self) -> None:
        """While this controller leads. Raises LeadershipLostError once it does not."""
        while True:
            asked_s = monotonic_s()
            with contextlib.suppress(PeerError, RefusedError, TimeoutError):
                async with asyncio.timeout(_CONFIRM_TIMEOUT_S):
                    if not await self._consul.holds(self._key, self.session):
                        self._lose()
                    self._confirmed_s = asked_s
                    self._confirmation.set()
            await asyncio.sleep(_CONFIRM_EVERY_S)

    def confirmed(self) -> bool:
        return not self._lost and monotonic_s() - self._confirmed_s < CONFIRMED_S

    def of_use(self) -> bool:
        """False of a leader that could not confirm its lock for so long that another had better have it."""
        leads = self.leader == self._member and not self._lost
        return not leads or monotonic_s() - self._confirmed_s < GIVE_UP_S

    async def wait(self) -> None:
        """Until the lock is confirmed again. Raises LeadershipLostError."""
        while not self.confirmed():
            if self._lost:
                raise LeadershipLostError("the lock is another controller's, or nobody's")
            self._confirmation.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRMED_S):
                    await self._confirmation.wait()

    async def resign(self) -> None:
        """So that another controller leads at once. Consul may be away: then the check ends the session."""
        session, self.session = self.session, ""
        self._lost = True
        self._know(None)
        if session:
            with contextlib.suppress(OutriderError, TimeoutError):
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self._consul.destroy_session(session)

    async def leave(self) -> None:
        """This controller ends: Consul need not look for it any more."""
        with contextlib.suppress(OutriderError, TimeoutError):
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await self._consul.deregister_service(self._id)

    def _lose(self) -> None:
        self._lost = True
        self._confirmation.set()
        raise LeadershipLostError("the lock is another controller's, or nobody's")

    async def _begin_session(self) -> str:
        """The session of an earlier life of this controller is ended: it would hold the lock for nobody."""
        host, port = host_port(self._member.address)
        check = f"{self._id}-progress"
        await self._consul.register_service(
            name=_SERVICE,
            id=self._id,
            address=host,
            port=port,
            tags=(self._cluster, self._member.name),
            check_id=check,
            check_url=self.progress_url,
            check_interval_s=CHECK_INTERVAL_S,
        )
        for session in await self._consul.sessions(self._id):
            await self._consul.destroy_session(session)
        return await self._consul.create_checked_session(self._id, check)

    async def _watch(self, index: int) -> int:
        """Somebody else has the lock: wait for a change of that."""
        index, found = await self._consul.watch_key(self._key, index)
        leader = None
        if found is not None and found.session:
            with contextlib.suppress(msgspec.MsgspecError):
                leader = msgspec.json.decode(found.value or b"", type=Member)
        self._know(leader)
        if leader is None:
            return index
        if not await self._consul.session_exists(self.session):
            raise PeerError("this controller's own session has ended")
        return index

    def _know(self, leader: Member | None) -> None:
        if leader != self.leader:
            self.leader = leader
            self._log.info("leader", name=leader.name if leader else "none")
            self.changed.set()


class HeldLock:
    """The mesh's leadership where the journal's lock already says who leads: its writes are fenced by the same one."""

    def __init__(self, *, cluster: str, session: str, confirmed: Callable[[], bool]) -> None:
        self._key, self._session, self._confirmed = lock_key(cluster), session, confirmed
        self._lost = False

    @property
    def held(self) -> bool:
        """A leader that could not confirm its lock for CONFIRMED_S writes nothing until it can."""
        return not self._lost and self._confirmed()

    async def take(self) -> bool:
        return self.held

    async def renew(self) -> None:
        """The progress check does."""

    def lost(self) -> None:
        self._lost = True

    def guard(self) -> Txn:
        return Txn(kv=TxnKv(verb="check-session", key=self._key, session=self._session))

    async def release(self) -> None:
        self._lost = True
