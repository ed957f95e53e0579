"""Sessions: who may hold a lock, and what becomes of it when the holder goes. Pure: works on a `Store`.

When a session's time runs out is the edge's to know: it keeps the deadlines and calls `invalidate`.
"""

import msgspec

from controller.catalog.durations import parse_duration_s
from controller.catalog.rows import SessionRow
from controller.catalog.store import Store
from outrider.errors import InputError, RefusedError

TTL_MIN_S, TTL_MAX_S = 10.0, 86_400.0
LOCK_DELAY_MAX_S = 60.0
_NS = 1_000_000_000


class SessionRequest(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """PUT /v1/session/create."""

    name: str = ""
    node: str = ""
    ttl: str = msgspec.field(default="", name="TTL")
    lock_delay: str | int | float = "15s"
    behavior: str = ""
    node_checks: tuple[str, ...] | None = None


def create(store: Store, wanted: SessionRequest, *, session: str, own_node: str) -> SessionRow:
    """`session`: the new id. Raises InputError, or RefusedError where node or check are not there or critical."""
    behavior = wanted.behavior or "release"
    if behavior not in ("release", "delete"):
        raise InputError(f"Invalid Behavior setting '{behavior}'")
    if wanted.ttl and not TTL_MIN_S <= parse_duration_s(wanted.ttl) <= TTL_MAX_S:
        raise InputError(f"Invalid Session TTL '{wanted.ttl}', must be between [10s=24h0m0s]")
    node = wanted.node or own_node
    if node not in store.nodes:
        raise RefusedError("conflict", "Missing node registration")
    checks = ("serfHealth",) if wanted.node_checks is None else wanted.node_checks
    for check in checks:
        found = store.checks_of(node).get(check)
        if found is None:
            raise RefusedError("conflict", f"Missing check '{check}' registration")
        if found.status == "critical":
            raise RefusedError("conflict", f"Check '{check}' is in critical state")
    row = SessionRow(
        id=session,
        name=wanted.name,
        node=node,
        lock_delay=_lock_delay_ns(wanted.lock_delay),
        behavior=behavior,
        ttl=wanted.ttl,
        node_checks=checks,
        create_index=store.index + 1,
        modify_index=store.index + 1,
    )
    store.set_session(session, row)
    return row


def invalidate(store: Store, session: str, now_s: float) -> None:
    """The session ends: its locks are released, or their keys deleted, and rest for the lock delay."""
    row = store.sessions.get(session)
    if row is None:
        return
    for key, held in tuple(store.kv.items()):
        if held.session != session:
            continue
        if row.behavior == "delete":
            store.set_kv(key, None)
        else:
            store.set_kv(key, msgspec.structs.replace(held, session="", modify_index=store.index + 1))
        if row.lock_delay:
            store.lock_delays[key] = now_s + row.lock_delay / _NS
    store.set_session(session, None)


def invalidate_check(store: Store, node: str, check_id: str, now_s: float) -> None:
    for row in tuple(store.sessions.values()):
        if row.node == node and check_id in row.node_checks:
            invalidate(store, row.id, now_s)


def invalidate_node(store: Store, node: str, now_s: float) -> None:
    for row in tuple(store.sessions.values()):
        if row.node == node:
            invalidate(store, row.id, now_s)


def _lock_delay_ns(delay: str | float) -> int:
    if isinstance(delay, str):
        return _lock_delay_ns(parse_duration_s(delay))
    seconds = delay if delay < 1000 else delay / _NS  # Consul: small numbers are seconds, large are nanoseconds
    return int(min(max(seconds, 0.0), LOCK_DELAY_MAX_S) * _NS)
