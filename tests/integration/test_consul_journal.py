"""The journal in a real Consul's KV: what was appended is there, whoever lost the lock writes nothing any more."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from controller.core.records import EpochBegun, JobStopped, JobVersionAdded, Record
from controller.journal import LeadershipLostError
from controller.journal import consul as journal_in_consul
from controller.journal.consul import ConsulJournal, lock_key
from controller.journal.kv import ConsulKv, Operation
from outrider.errors import JournalError
from outrider.ids import GroupName, JobName, TaskName
from outrider.model.job import File, Group, Job, Task
from tests.integration.consul import RealConsul, real_consul

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def consul(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealConsul]:
    with real_consul(tmp_path_factory.mktemp("consul")) as running:
        yield running


class Fleet:
    """A lock and journals under it."""

    def __init__(self, consul: RealConsul, name: str) -> None:
        self.name = name
        self.kv = ConsulKv(consul.url)
        self.session = self.lock()

    def lock(self) -> str:
        """Takes the lock from whoever had it."""
        if hasattr(self, "session"):
            self.kv._call("put", f"/v1/session/destroy/{self.session}", [])
        body = json.dumps({"LockDelay": "0s"}).encode()
        session: str = json.loads(self.kv._call("put", "/v1/session/create", [], body).body)["ID"]
        key = lock_key(self.name)
        assert self.kv._call("put", f"/v1/kv/{key}", [("acquire", session)], b"x").body.strip() == "true"
        return session

    def journal(self) -> ConsulJournal:
        made = ConsulJournal(self.kv, cluster=self.name, session=self.session)
        made.open()
        return made

    def keys(self) -> list[str]:
        return [pair.key for pair in self.kv.pairs(f"outrider/{self.name}/journal/")]


@pytest.fixture
def fleet(consul: RealConsul, request: pytest.FixtureRequest) -> Fleet:
    return Fleet(consul, f"t{abs(hash(request.node.name)):x}")


def heavy(name: str, size: int) -> Record:
    """A record that no compression makes small."""
    content = bytes((at * at * 7919 + at // 251 * 104729) >> 3 & 0xFF for at in range(4096))
    noise = b"".join(bytes(byte ^ at & 0xFF ^ at >> 8 for byte in content) for at in range(size // 4096))
    task = Task(name=TaskName("t"), files=(File(path="blob", content=noise),))
    job = Job(name=JobName(name), groups=(Group(name=GroupName("g"), tasks=(task,)),))
    return JobVersionAdded(job=job, version=1, submitted_at_s=0.0)


def test_records_come_back_in_order(fleet: Fleet) -> None:
    journal = fleet.journal()
    assert list(journal.load()) == []
    first: list[Record] = [EpochBegun(epoch=1, salt=7), JobStopped(job=JobName("a"))]
    journal.append(first)
    journal.append([JobStopped(job=JobName("b"))])
    assert list(fleet.journal().load()) == [*first, JobStopped(job=JobName("b"))]


def test_an_append_beyond_one_transaction_is_whole_or_not_there(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_in_consul, "VALUE_BYTES_MAX", 4096)
    monkeypatch.setattr("controller.journal.consul.OPERATIONS_MAX", 5)
    journal = fleet.journal()
    record = heavy("big", 64 * 1024)
    journal.append([record])
    assert len(fleet.keys()) > 3
    assert list(fleet.journal().load()) == [record]
    # Cut short before its head was written: as if it had never been.
    head = journal._head
    journal.append([heavy("cut", 64 * 1024)])
    found = fleet.kv.get(f"outrider/{fleet.name}/journal/head")
    assert found is not None
    packed = msgspec.json.encode(head)
    fleet.kv.transact([Operation(verb="cas", key=found.key, value=packed, index=found.index)])
    assert list(fleet.journal().load()) == [record]


def test_a_job_of_megabytes_fits_consuls_limits(fleet: Fleet) -> None:
    journal = fleet.journal()
    record = heavy("mega", 3 * 1024 * 1024)
    journal.append([record])
    assert list(fleet.journal().load()) == [record]


def test_a_snapshot_replaces_what_came_before_it_and_keeps_what_comes_after(fleet: Fleet) -> None:
    journal = fleet.journal()
    for number in range(20):
        journal.append([EpochBegun(epoch=number)])
    journal.snapshot([EpochBegun(epoch=19, salt=1)])
    journal.append([JobStopped(job=JobName("shop"))])
    assert list(fleet.journal().load()) == [EpochBegun(epoch=19, salt=1), JobStopped(job=JobName("shop"))]
    assert len(fleet.keys()) == 3, "the head, the snapshot, what came after it"


def test_a_snapshot_is_due_once_much_was_appended(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_in_consul, "_CHUNKS_DUE", 3)
    journal = fleet.journal()
    for number in range(4):
        assert not journal.due()
        journal.append([EpochBegun(epoch=number)])
    assert journal.due()
    journal.snapshot([EpochBegun(epoch=4)])
    assert not journal.due()


def test_who_lost_the_lock_writes_nothing_any_more(fleet: Fleet) -> None:
    old = fleet.journal()
    old.append([EpochBegun(epoch=1)])
    fleet.session = fleet.lock()
    new = fleet.journal()
    with pytest.raises(LeadershipLostError):
        old.append([EpochBegun(epoch=666)])
    with pytest.raises(LeadershipLostError):
        old.snapshot([EpochBegun(epoch=666)])
    new.append([EpochBegun(epoch=2)])
    assert list(fleet.journal().load()) == [EpochBegun(epoch=1), EpochBegun(epoch=2)]


def test_two_with_the_same_lock_do_not_overwrite_each_other(fleet: Fleet) -> None:
    """One term after the other in one process has the same session at most by mistake: the index still fences."""
    first, second = fleet.journal(), fleet.journal()
    first.append([EpochBegun(epoch=1)])
    with pytest.raises(LeadershipLostError):
        second.append([EpochBegun(epoch=2)])
    assert list(fleet.journal().load()) == [EpochBegun(epoch=1)]


def test_a_full_journal_says_so_by_name_and_twice_full_is_the_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_in_consul, "BYTES_MAX", 100)
    journal = fleet.journal()
    assert journal.refusal() == ""
    journal.append([heavy("big", 8192)])
    assert "limit" in journal.refusal()
    with pytest.raises(JournalError, match="twice the limit"):
        journal.append([EpochBegun(epoch=1)])


def test_a_damaged_chunk_is_refused(fleet: Fleet) -> None:
    fleet.journal().append([EpochBegun(epoch=1)])
    key = f"outrider/{fleet.name}/journal/00000000/00000000"
    for value in (b"", b"\x01\x00\x00\x00\x00rubbish"):
        fleet.kv.transact([Operation(verb="set", key=key, value=value)])
        with pytest.raises(JournalError, match="is damaged"):
            list(fleet.journal().load())


def test_a_newer_format_is_refused(fleet: Fleet) -> None:
    key = f"outrider/{fleet.name}/journal/head"
    fleet.kv.transact([Operation(verb="set", key=key, value=b'{"format": 99}')])
    with pytest.raises(JournalError, match="start the newer Outrider"):
        fleet.journal()


def test_a_consul_that_is_away_gives_up_when_told(tmp_path: Path) -> None:
    with real_consul(tmp_path) as other:
        lonely = Fleet(other, "lonely")
        journal = lonely.journal()
    journal._closed.set()
    with pytest.raises(LeadershipLostError, match="fate is not known"):
        journal.append([EpochBegun(epoch=1)])
