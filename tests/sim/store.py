"""What Consul is to the controllers: a lock on a session, and a journal that only its holder extends.

Linearizable, and now and then away: a request or its answer is lost, and whoever asked does not know which.
"""

from collections.abc import Callable, Sequence
from typing import Any

from controller.core.records import JobVersionAdded, Record
from tests.sim.kernel import BrokenError, Kernel, Process
from tests.sim.network import Network

NAME = "kv"
TIMEOUT_S = 1.0
CHECK_S = 1.0


class Store:
    def __init__(self, kernel: Kernel, network: Network) -> None:
        self.kernel, self.network = kernel, network
        self.up = True
        self.holder = ""  # the session that has the lock
        self.index = 0
        self.nonce = ""
        self.records: list[Record] = []
        self.versions: dict[str, int] = {}
        self.acknowledged: dict[str, int] = {}  # by job: the newest version that an operator was told of
        self.epochs: list[int] = []
        self._sessions: dict[str, tuple[Process, int]] = {}
        self._count = 0
        self.freed: list[Callable[[], None]] = []

    def call(self, caller: Process, act: Callable[[], Any], answered: Callable[[Any], None]) -> None:
        """`answered(None)` where no answer came: then nobody knows whether it was done."""
        life = caller.life
        done: list[bool] = []

        def arrive() -> None:
            if not self.up or self.network.is_cut(caller.name, NAME):
                return
            answer = act()
            self.kernel.at(self.network.delay_s(), lambda: reply(answer))

        def reply(answer: object) -> None:
            if not self.network.is_cut(NAME, caller.name):
                finish(answer)

        def finish(answer: object) -> None:
            if not done and caller.alive and caller.life == life:
                done.append(True)
                caller.now(lambda: answered(answer))

        self.kernel.at(self.network.delay_s(), arrive)
        self.kernel.at(TIMEOUT_S, lambda: finish(None))

    def open_session(self, owner: Process) -> str:
        """Ends those of earlier lives, as a controller does that begins."""
        for name, (process, _) in list(self._sessions.items()):
            if process is owner:
                self._end(name)
        self._count += 1
        session = f"s{self._count}"
        self._sessions[session] = (owner, owner.life)
        self.kernel.at(CHECK_S, lambda: self._check(session))
        return session

    def acquire(self, session: str) -> bool:
        if session in self._sessions and self.holder in ("", session):
            self.holder = session
        return self.holder == session and session in self._sessions

    def exists(self, session: str) -> bool:
        return session in self._sessions

    def release(self, session: str) -> None:
        self._end(session)

    def write(self, session: str, index: int, nonce: str, records: Sequence[Record], *, whole: bool) -> int:
        """The new index; 0: not done, the session has no lock or the index is another one."""
        if self.nonce == nonce:
            return self.index  # a try before this one did it
        if self.holder != session or index != self.index:
            return 0
        self.index, self.nonce = self.index + 1, nonce
        if whole:
            self.records, self.versions = [], {}
        self.records.extend(records)
        for record in records:
            if isinstance(record, JobVersionAdded):
                self.versions[record.job.name] = record.version
        self.check()
        return self.index

    def acknowledge(self, job: str, version: int) -> None:
        self.acknowledged[job] = max(version, self.acknowledged.get(job, 0))
        self.check()

    def check(self) -> None:
        for job, version in self.acknowledged.items():
            if self.versions.get(job, 0) < version:
                raise BrokenError(f"version {version} of {job} was acknowledged, and the journal does not have it")

    def _check(self, session: str) -> None:
        """Consul's agent asks whether the controller gets on."""
        if session not in self._sessions:
            return
        owner, life = self._sessions[session]
        if owner.alive and owner.life == life and not owner.frozen:
            self.kernel.at(CHECK_S, lambda: self._check(session))
        elif self.up:
            self._end(session)
        else:
            self.kernel.at(CHECK_S, lambda: self._check(session))

    def _end(self, session: str) -> None:
        self._sessions.pop(session, None)
        if self.holder == session:
            self.holder = ""
            self.kernel.note(NAME, f"the lock of {session} is free")
            freed, self.freed = self.freed, []
            for tell in freed:
                self.kernel.at(self.network.delay_s(), tell)
