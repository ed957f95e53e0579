"""Locks rest for their delay after the holder's session ended."""

import pytest

from controller.catalog import kv, registry, sessions
from controller.catalog.rows import CheckRow, NodeRow
from controller.catalog.store import Store
from outrider.errors import InputError, RefusedError

OWN = "catalog.outrider"


@pytest.fixture
def store() -> Store:
    made = Store("dc1")
    with made.transaction():
        registry.set_node(made, NodeRow(node=OWN, address="127.0.0.1"))
        registry.set_check(made, CheckRow(node=OWN, check_id="serfHealth", name="serf", status="passing"), 0.0)
    return made


def create(store: Store, session: str, **values: object) -> None:
    wanted = sessions.SessionRequest(**values)  # type: ignore[arg-type]  # each test names what it is about
    with store.transaction():
        sessions.create(store, wanted, session=session, own_node=OWN)


def acquire(store: Store, session: str, now_s: float) -> bool:
    with store.transaction():
        return kv.acquire(store, "lock", b"", 0, session=session, now_s=now_s) is not None


def test_a_lock_rests_for_the_delay_of_the_session_that_ended(store: Store) -> None:
    create(store, "s1", lock_delay="5s")
    create(store, "s2")
    assert acquire(store, "s1", 100.0)
    with store.transaction():
        sessions.invalidate(store, "s1", 110.0)
    assert not acquire(store, "s2", 114.9)
    assert acquire(store, "s2", 115.1)
    assert store.kv["lock"].lock_index == 2


def test_a_session_ends_with_its_node(store: Store) -> None:
    create(store, "s1", lock_delay=0)
    assert acquire(store, "s1", 0.0)
    with store.transaction():
        registry.delete_node(store, OWN, 0.0)
    assert store.sessions == {}
    assert store.kv["lock"].session == ""


@pytest.mark.parametrize(("given", "seconds"), [("15s", 15), ("1m", 60), ("5m", 60), (3, 3), (2_000_000_000, 2)])
def test_lock_delays_take_consuls_forms(store: Store, given: str | int, seconds: int) -> None:
    create(store, "s1", lock_delay=given)
    assert store.sessions["s1"].lock_delay == seconds * 1_000_000_000


def test_what_a_session_cannot_hang_on_is_refused(store: Store) -> None:
    with pytest.raises(RefusedError, match="Missing node"):
        create(store, "s1", node="nobody")
    with pytest.raises(RefusedError, match="Missing check 'c'"):
        create(store, "s1", node_checks=("c",))
    with pytest.raises(InputError, match="invalid duration"):
        create(store, "s1", ttl="soon")
    assert store.sessions == {}
