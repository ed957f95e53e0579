"""The key/value store with its locks, as Consul's. Pure: works on a `Store`; each change says whether it was made."""

import msgspec

from controller.catalog.rows import KvRow
from controller.catalog.store import Store
from outrider.errors import InputError

VALUE_BYTES_MAX = 512 * 1024


def put(store: Store, key: str, value: bytes, flags: int) -> KvRow:
    _check(key, value)
    old = store.kv.get(key)
    return _write(store, key, value, flags, session=old.session if old else "", locks=old.lock_index if old else 0)


def put_if(store: Store, key: str, value: bytes, flags: int, index: int) -> KvRow | None:
    """Only if the key's ModifyIndex is `index`; 0 means that it must not exist."""
    old = store.kv.get(key)
    if (old.modify_index if old else 0) != index:
        return None
    return put(store, key, value, flags)


def acquire(store: Store, key: str, value: bytes, flags: int, *, session: str, now_s: float) -> KvRow | None:
    _check(key, value)
    if session not in store.sessions:
        raise InputError(f"invalid session {session!r}")
    if store.lock_delays.get(key, 0.0) > now_s:
        return None
    old = store.kv.get(key)
    if old is not None and old.session not in ("", session):
        return None
    locks = old.lock_index if old else 0
    held = old is not None and old.session == session
    return _write(store, key, value, flags, session=session, locks=locks if held else locks + 1)


def release(store: Store, key: str, value: bytes, flags: int, session: str) -> KvRow | None:
    _check(key, value)
    old = store.kv.get(key)
    if old is None or not session or old.session != session:
        return None
    return _write(store, key, value, flags, session="", locks=old.lock_index)


def delete(store: Store, key: str) -> None:
    store.set_kv(key, None)


def delete_if(store: Store, key: str, index: int) -> bool:
    old = store.kv.get(key)
    if old is not None and old.modify_index != index:
        return False
    store.set_kv(key, None)
    return True


def delete_tree(store: Store, prefix: str) -> None:
    for key in store.kv_below(prefix):
        store.set_kv(key, None)


def _write(store: Store, key: str, value: bytes, flags: int, *, session: str, locks: int) -> KvRow:
    old = store.kv.get(key)
    row = KvRow(
        key=key,
        value=value,
        flags=flags,
        session=session,
        lock_index=locks,
        create_index=old.create_index if old else store.index + 1,
        modify_index=old.modify_index if old else 0,
    )
    if row != old:
        row = msgspec.structs.replace(row, modify_index=store.index + 1)
        store.set_kv(key, row)
    return row


def _check(key: str, value: bytes) -> None:
    if not key:
        raise InputError("Missing key name")
    if len(value) > VALUE_BYTES_MAX:
        raise InputError(f"{key}: value of {len(value)} bytes exceeds {VALUE_BYTES_MAX} byte limit")
