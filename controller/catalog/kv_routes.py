"""/v1/kv, /v1/session and /v1/txn."""

from typing import Any

import msgspec

from controller.catalog import kv, sessions, txn
from controller.catalog.api import Access, Answer, Call, Route, Scope, decode
from controller.catalog.rows import KvRow
from controller.catalog.store import KV, SESSIONS, Store
from outrider.errors import InputError, RefusedError


def kv_get(scope: Scope, call: Call) -> Answer:
    store, key = scope.store, call.path["key"]
    if call.flag("keys"):
        return _found(store, _keys(store, key, call.query.get("separator", "")))
    if call.flag("recurse"):
        return _found(store, [_shown(store.kv[name]) for name in store.kv_below(key)])
    if not key:
        raise InputError("Missing key name")
    row = store.kv.get(key)
    if row is None:
        return _found(store, [])
    body = (row.value or b"") if call.flag("raw") else [_shown(row)]
    # The key's own index, so that other keys' changes wake no watcher.
    return Answer(body=body, index=row.modify_index, topics=(KV,))


def kv_put(scope: Scope, call: Call) -> Answer:
    store, key, flags, query = scope.store, call.path["key"], call.number("flags"), call.query
    if sum(name in query for name in ("cas", "acquire", "release")) > 1:
        raise InputError("Conflicting flags: cas, acquire and release exclude each other")
    row: KvRow | None
    if "cas" in query:
        row = kv.put_if(store, key, call.body, flags, call.number("cas"))
    elif "acquire" in query:
        row = kv.acquire(store, key, call.body, flags, session=query["acquire"], now_s=call.monotonic_s)
    elif "release" in query:
        row = kv.release(store, key, call.body, flags, query["release"])
    else:
        row = kv.put(store, key, call.body, flags)
    return Answer(body=row is not None)


def kv_delete(scope: Scope, call: Call) -> Answer:
    key = call.path["key"]
    if call.flag("recurse"):
        kv.delete_tree(scope.store, key)
        return Answer(body=True)
    if not key:
        raise InputError("Missing key name")
    if "cas" in call.query:
        return Answer(body=kv.delete_if(scope.store, key, call.number("cas")))
    kv.delete(scope.store, key)
    return Answer(body=True)


def session_create(scope: Scope, call: Call) -> Answer:
    wanted = decode(call, sessions.SessionRequest)
    row = sessions.create(scope.store, wanted, session=call.new_id, own_node=scope.own_node)
    return Answer(body={"ID": row.id})


def session_destroy(scope: Scope, call: Call) -> Answer:
    sessions.invalidate(scope.store, call.path["id"], call.monotonic_s)
    return Answer(body=True)


def session_renew(scope: Scope, call: Call) -> Answer:
    """Its deadline is the server's to push out."""
    row = scope.store.sessions.get(call.path["id"])
    if row is None:
        raise RefusedError("not_found", f"Session id '{call.path['id']}' not found")
    return Answer(body=[row], renewed=row.id)


def session_info(scope: Scope, call: Call) -> Answer:
    row = scope.store.sessions.get(call.path["id"])
    return _sessions(scope, [] if row is None else [row])


def session_list(scope: Scope, _call: Call) -> Answer:
    rows = scope.store.sessions
    return _sessions(scope, [rows[name] for name in sorted(rows)])


def session_node(scope: Scope, call: Call) -> Answer:
    rows = scope.store.sessions.values()
    return _sessions(scope, sorted((row for row in rows if row.node == call.path["name"]), key=lambda row: row.id))


def transaction(scope: Scope, call: Call) -> Answer:
    """Raises FailedTransactionError, so that the transaction around it takes everything back."""
    operations = decode(call, list[txn.Operation]) if call.body else []
    if len(operations) > txn.OPERATIONS_MAX:
        text = f"Transaction contains too many operations ({len(operations)} > {txn.OPERATIONS_MAX})"
        raise RefusedError("too_large", text)
    results = txn.run(scope.store, operations, call.monotonic_s)
    return Answer(body={"Results": results, "Errors": None})


def _keys(store: Store, prefix: str, separator: str) -> list[str]:
    names: dict[str, None] = {}
    for key in store.kv_below(prefix):
        end = key.find(separator, len(prefix)) if separator else -1
        names[key if end < 0 else key[: end + len(separator)]] = None
    return list(names)


def _found(store: Store, found: list[Any]) -> Answer:
    return Answer(body=found or b"", status=200 if found else 404, index=store.topic_index(KV), topics=(KV,))


def _shown(row: KvRow) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(row)
    if not row.session:
        del shown["Session"]  # Consul leaves it out: clients ask whether the key is there
    return shown


def _sessions(scope: Scope, rows: list[Any]) -> Answer:
    return Answer(body=rows, index=scope.store.topic_index(SESSIONS), topics=(SESSIONS,))


ROUTES = (
    Route(method="GET", path="/kv/{key:.*}", access=Access.PRIVATE, handler=kv_get),
    Route(method="PUT", path="/kv/{key:.*}", access=Access.WRITE, handler=kv_put),
    Route(method="DELETE", path="/kv/{key:.*}", access=Access.WRITE, handler=kv_delete),
    Route(method="PUT", path="/session/create", access=Access.WRITE, handler=session_create),
    Route(method="PUT", path="/session/destroy/{id}", access=Access.WRITE, handler=session_destroy),
    Route(method="PUT", path="/session/renew/{id}", access=Access.WRITE, handler=session_renew),
    Route(method="GET", path="/session/info/{id}", access=Access.PRIVATE, handler=session_info),
    Route(method="GET", path="/session/list", access=Access.PRIVATE, handler=session_list),
    Route(method="GET", path="/session/node/{name}", access=Access.PRIVATE, handler=session_node),
    Route(method="PUT", path="/txn", access=Access.WRITE, handler=transaction),
)
