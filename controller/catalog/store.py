"""The catalog's state: tables, the index that grows with every change, and what each change touches.

Owns the tables and their atomic change; knows nothing of HTTP, clocks or disks. Rules of the single operations stand
in `registry`, `kv`, `sessions` and `intentions`; each works inside `Store.transaction()`, which takes all back if one
raises.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

import msgspec

from controller.catalog.rows import (
    CaRow,
    CheckRow,
    ConfigRow,
    IntentionRow,
    KvRow,
    NodeRow,
    Row,
    ServiceRow,
    SessionRow,
    connect_destination,
)

R = TypeVar("R", bound=Row)

# Topics: what a blocking query waits on.
NODES, SERVICES, CHECKS, KV = "nodes", "services", "checks", "kv"
SESSIONS, INTENTIONS, CA, CONFIG = "sessions", "intentions", "ca", "config"
_PLAIN_TOPICS = {"kv": KV, "session": SESSIONS, "intention": INTENTIONS, "ca": CA, "config": CONFIG}


def node_topic(node: str) -> str:
    return f"node:{node}"


def service_topic(service: str) -> str:
    return f"service:{service}"


def connect_topic(service: str) -> str:
    return f"connect:{service}"


class Table(StrEnum):
    NODE = "node"
    SERVICE = "service"
    CHECK = "check"
    KV = "kv"
    SESSION = "session"
    INTENTION = "intention"
    CA = "ca"
    CONFIG = "config"


ROW_TYPES: dict[Table, type[Row]] = {
    Table.NODE: NodeRow,
    Table.SERVICE: ServiceRow,
    Table.CHECK: CheckRow,
    Table.KV: KvRow,
    Table.SESSION: SessionRow,
    Table.INTENTION: IntentionRow,
    Table.CA: CaRow,
    Table.CONFIG: ConfigRow,
}


class Change(msgspec.Struct, frozen=True):
    """One row as it is now; None where it is gone. `owner` is the node of a service or check, else ""."""

    table: Table
    owner: str
    key: str
    row: Row | None


class Commit(msgspec.Struct, frozen=True):
    """What one transaction did. Nothing, where `changes` is empty."""

    index: int
    changes: tuple[Change, ...]
    topics: frozenset[str]


class Store:
    """The tables. Read them freely; change them by `set_*` inside `transaction()` alone."""

    def __init__(self, datacenter: str, index: int = 1) -> None:
        self.datacenter = datacenter
        self.index = index
        self.nodes: dict[str, NodeRow] = {}
        self.services: dict[str, dict[str, ServiceRow]] = defaultdict(dict)  # node -> service id -> row
        self.checks: dict[str, dict[str, CheckRow]] = defaultdict(dict)  # node -> check id -> row
        self.kv: dict[str, KvRow] = {}
        self.kv_keys: list[str] = []  # sorted, for prefixes
        self.sessions: dict[str, SessionRow] = {}
        self.intentions: dict[str, IntentionRow] = {}  # by id
        self.config: dict[str, ConfigRow] = {}  # by KIND/NAME
        self.ca: CaRow | None = None
        self.by_name: dict[str, set[tuple[str, str]]] = defaultdict(set)  # service name -> (node, service id)
        self.by_destination: dict[str, set[tuple[str, str]]] = defaultdict(set)  # the same, for who fronts it
        self.lock_delays: dict[str, float] = {}  # key -> until when nobody may lock it; volatile, as Consul's
        self._topics: dict[str, int] = {}
        self._extinct = index  # the index of topics that have nothing to show
        self._undo: list[Callable[[], None]] | None = None
        self._changes: list[Change] = []
        self._touched: set[str] = set()
        self.last_commit = Commit(index, (), frozenset())

    @contextmanager
    def transaction(self) -> Iterator[int]:
        """All of the `set_*` inside, or none where an exception leaves it. Gives the index of its rows."""
        assert self._undo is None, "transactions do not nest"
        self._undo, self._changes, self._touched = [], [], set()
        index = self.index + 1
        try:
            yield index
        except BaseException:
            undo, self._undo = self._undo, None
            for step in reversed(undo):
                step()
            raise
        self._undo = None
        if self._changes:
            self.index = index
            self._stamp(index)
        self.last_commit = Commit(self.index, tuple(self._changes), frozenset(self._touched))

    def topic_index(self, *topics: str) -> int:
        """The index of the newest change to any of `topics`; never falls."""
        return max(self._topics.get(topic, self._extinct) for topic in topics)

    def load(self, changes: Iterable[Change]) -> None:
        """Rows as they were stored; to be called once, on an empty store."""
        for change in changes:
            self._place(change)

    def set_node(self, name: str, row: NodeRow | None) -> None:
        self._set(Change(Table.NODE, "", name, row), self.nodes.get(name))

    def set_service(self, node: str, service_id: str, row: ServiceRow | None) -> None:
        self._set(Change(Table.SERVICE, node, service_id, row), self.services_of(node).get(service_id))

    def set_check(self, node: str, check_id: str, row: CheckRow | None) -> None:
        self._set(Change(Table.CHECK, node, check_id, row), self.checks_of(node).get(check_id))

    def set_kv(self, key: str, row: KvRow | None) -> None:
        self._set(Change(Table.KV, "", key, row), self.kv.get(key))

    def set_session(self, session: str, row: SessionRow | None) -> None:
        self._set(Change(Table.SESSION, "", session, row), self.sessions.get(session))

    def set_intention(self, intention: str, row: IntentionRow | None) -> None:
        self._set(Change(Table.INTENTION, "", intention, row), self.intentions.get(intention))

    def set_config(self, key: str, row: ConfigRow | None) -> None:
        self._set(Change(Table.CONFIG, "", key, row), self.config.get(key))

    def set_ca(self, row: CaRow) -> None:
        self._set(Change(Table.CA, "", "root", row), self.ca)

    def services_of(self, node: str) -> dict[str, ServiceRow]:
        return self.services.get(node, {})

    def checks_of(self, node: str) -> dict[str, CheckRow]:
        return self.checks.get(node, {})

    def kv_below(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, in order."""
        first = bisect_left(self.kv_keys, prefix)
        keys = []
        for key in self.kv_keys[first:]:
            if not key.startswith(prefix):
                break
            keys.append(key)
        return keys

    def _set(self, change: Change, old: Row | None) -> None:
        assert self._undo is not None, "outside a transaction"
        if change.row is None and old is None:
            return
        before = Change(change.table, change.owner, change.key, old)
        self._touched |= self._topics_of(before)
        self._place(change)
        self._touched |= self._topics_of(change)
        self._undo.append(lambda: self._place(before))
        self._changes.append(change)

    def _place(self, change: Change) -> None:
        row, key = change.row, change.key
        match change.table:
            case Table.NODE:
                _put(self.nodes, key, row, NodeRow)
            case Table.SERVICE:
                self._place_service(change.owner, key, row)
            case Table.CHECK:
                _put(self.checks[change.owner], key, row, CheckRow)
                if not self.checks[change.owner]:
                    del self.checks[change.owner]
            case Table.KV:
                self._place_kv(key, row)
            case Table.SESSION:
                _put(self.sessions, key, row, SessionRow)
            case Table.INTENTION:
                _put(self.intentions, key, row, IntentionRow)
            case Table.CONFIG:
                _put(self.config, key, row, ConfigRow)
            case Table.CA:
                assert row is None or isinstance(row, CaRow)
                self.ca = row

    def _place_service(self, node: str, service_id: str, row: Row | None) -> None:
        services = self.services[node]
        if (old := services.get(service_id)) is not None:
            _unlink(self.by_name, old.service, (node, service_id))
            _unlink(self.by_destination, connect_destination(old), (node, service_id))
        _put(services, service_id, row, ServiceRow)
        if isinstance(row, ServiceRow):
            self.by_name[row.service].add((node, service_id))
            if destination := connect_destination(row):
                self.by_destination[destination].add((node, service_id))
        if not services:
            del self.services[node]

    def _place_kv(self, key: str, row: Row | None) -> None:
        if row is None:
            if key in self.kv:
                del self.kv_keys[bisect_left(self.kv_keys, key)]
        elif key not in self.kv:
            insort(self.kv_keys, key)
        _put(self.kv, key, row, KvRow)

    def _topics_of(self, change: Change) -> set[str]:
        match change.table:
            case Table.NODE:
                return {NODES, node_topic(change.key), *self._service_topics(change.key)}
            case Table.SERVICE:
                return {SERVICES, node_topic(change.owner), *_topics_of_service(change.row)}
            case Table.CHECK:
                topics = {CHECKS, node_topic(change.owner)}
                if isinstance(change.row, CheckRow):
                    topics |= self._service_topics(change.owner, change.row.service_id)
                return topics
        return {_PLAIN_TOPICS[change.table]}

    def _service_topics(self, node: str, service_id: str = "") -> set[str]:
        """Of one service of the node, or of all: what a check of the node itself bears on."""
        services = self.services_of(node)
        rows = [services.get(service_id)] if service_id else services.values()
        return {topic for row in rows for topic in _topics_of_service(row)}

    def _stamp(self, index: int) -> None:
        for topic in self._touched:
            if self._alive(topic):
                self._topics[topic] = index
            else:
                # One number for all that is gone, so that names nobody uses any more take no memory.
                self._topics.pop(topic, None)
                self._extinct = index

    def _alive(self, topic: str) -> bool:
        kind, _, name = topic.partition(":")
        match kind:
            case "node":
                return name in self.nodes
            case "service":
                return name in self.by_name
            case "connect":
                return name in self.by_destination
        return True


def _topics_of_service(row: Row | None) -> tuple[str, ...]:
    if not isinstance(row, ServiceRow):
        return ()
    destination = connect_destination(row)
    own = service_topic(row.service)
    return (own, connect_topic(destination)) if destination else (own,)


def _put(rows: dict[str, R], key: str, row: Row | None, kind: type[R]) -> None:
    if row is None:
        rows.pop(key, None)
    else:
        assert isinstance(row, kind)
        rows[key] = row


def _unlink(index: dict[str, set[tuple[str, str]]], name: str, member: tuple[str, str]) -> None:
    if name in index:
        index[name].discard(member)
        if not index[name]:
            del index[name]
