"""/v1/txn: KV, node, service and check operations, all or none. Pure: works on a `Store`."""

import base64
import binascii

import msgspec

from controller.catalog import kv, registry
from controller.catalog.rows import CheckRow, KvRow, NodeRow, ServiceRow
from controller.catalog.store import Store
from outrider.errors import InputError, RefusedError

OPERATIONS_MAX = 64
BODY_BYTES_MAX = 512 * 1024


class KvOperation(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    verb: str
    key: str
    value: str | None = None  # base64
    flags: int = 0
    index: int = 0
    session: str = ""


class NodeOperation(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    verb: str
    node: NodeRow


class ServiceOperation(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    verb: str
    node: str
    service: ServiceRow


class CheckOperation(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    verb: str
    check: CheckRow


class Operation(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One of the four is set."""

    kv: KvOperation | None = msgspec.field(default=None, name="KV")
    node: NodeOperation | None = None
    service: ServiceOperation | None = None
    check: CheckOperation | None = None


class OperationError(msgspec.Struct, frozen=True, rename="pascal"):
    op_index: int
    what: str


Result = dict[str, KvRow | NodeRow | ServiceRow | CheckRow]


class FailedTransactionError(Exception):
    """Nothing was changed; `errors` says which operations could not be."""

    def __init__(self, errors: list[OperationError]) -> None:
        super().__init__("; ".join(f"{error.op_index}: {error.what}" for error in errors))
        self.errors = errors


def run(store: Store, operations: list[Operation], now_s: float) -> list[Result]:
    """Inside `store.transaction()`. Raises FailedTransactionError, whose escape takes everything back."""
    results: list[Result] = []
    errors: list[OperationError] = []
    for position, operation in enumerate(operations):
        try:
            results += _run_one(store, operation, now_s)
        except (InputError, RefusedError) as error:
            errors.append(OperationError(position, str(error)))
    if errors:
        raise FailedTransactionError(errors)
    return results


def _run_one(store: Store, operation: Operation, now_s: float) -> list[Result]:
    if operation.kv is not None:
        return [{"KV": row} for row in _run_kv(store, operation.kv, now_s)]
    if operation.node is not None:
        return [{"Node": row} for row in _run_node(store, operation.node, now_s)]
    if operation.service is not None:
        return [{"Service": row} for row in _run_service(store, operation.service, now_s)]
    if operation.check is not None:
        return [{"Check": row} for row in _run_check(store, operation.check, now_s)]
    raise InputError("operation is none of KV, Node, Service, Check")


def _run_kv(store: Store, wanted: KvOperation, now_s: float) -> list[KvRow]:
    match wanted.verb:
        case "get":
            return [_present(store, wanted.key)]
        case "get-tree":
            return [store.kv[key] for key in store.kv_below(wanted.key)]
        case "delete" | "delete-tree" | "delete-cas":
            _delete_kv(store, wanted)
            return []
        case "check-session" | "check-index" | "check-not-exists":
            return _check_kv(store, wanted)
        case "set" | "cas" | "lock" | "unlock":
            return [msgspec.structs.replace(_write_kv(store, wanted, now_s), value=None)]
    raise InputError(f'unknown KV verb "{wanted.verb}"')


def _delete_kv(store: Store, wanted: KvOperation) -> None:
    if wanted.verb == "delete-tree":
        kv.delete_tree(store, wanted.key)
    elif wanted.verb == "delete":
        kv.delete(store, wanted.key)
    elif not kv.delete_if(store, wanted.key, wanted.index):
        raise RefusedError("conflict", f'failed to delete key "{wanted.key}", index is stale')


def _write_kv(store: Store, wanted: KvOperation, now_s: float) -> KvRow:
    value, key, row = _value(wanted), wanted.key, None
    match wanted.verb:
        case "set":
            row = kv.put(store, key, value, wanted.flags)
        case "cas":
            row = kv.put_if(store, key, value, wanted.flags, wanted.index)
        case "lock":
            row = kv.acquire(store, key, value, wanted.flags, session=wanted.session, now_s=now_s)
        case "unlock":
            row = kv.release(store, key, value, wanted.flags, wanted.session)
    if row is None:
        reason = {"cas": "index is stale", "lock": "lock is already held"}.get(wanted.verb, "lock isn't held")
        raise RefusedError("conflict", f'failed to {wanted.verb} key "{key}", {reason}')
    return row


def _check_kv(store: Store, wanted: KvOperation) -> list[KvRow]:
    key = wanted.key
    if wanted.verb == "check-not-exists":
        if key in store.kv:
            raise RefusedError("conflict", f'key "{key}" exists')
        return []
    row = _present(store, key)
    if wanted.verb == "check-session" and row.session != wanted.session:
        text = f'failed session check for key "{key}", current session "{row.session}" != "{wanted.session}"'
        raise RefusedError("conflict", text)
    if wanted.verb == "check-index" and row.modify_index != wanted.index:
        text = f'failed index check for key "{key}", current modify index {row.modify_index} != {wanted.index}'
        raise RefusedError("conflict", text)
    return [msgspec.structs.replace(row, value=None)]


def _run_node(store: Store, wanted: NodeOperation, now_s: float) -> list[NodeRow]:
    row, old = wanted.node, store.nodes.get(wanted.node.node)
    match wanted.verb:
        case "get":
            if old is None:
                raise RefusedError("not_found", f'node "{row.node}" doesn\'t exist')
            return [old]
        case "set":
            return [registry.set_node(store, row)]
        case "cas":
            _fresh(old, row, f'failed to set node "{row.node}", index is stale')
            return [registry.set_node(store, row)]
        case "delete":
            registry.delete_node(store, row.node, now_s)
            return []
        case "delete-cas":
            _fresh(old, row, f'failed to delete node "{row.node}", index is stale')
            registry.delete_node(store, row.node, now_s)
            return []
    raise InputError(f'unknown Node verb "{wanted.verb}"')


def _run_service(store: Store, wanted: ServiceOperation, now_s: float) -> list[ServiceRow]:
    row, service_id = wanted.service, wanted.service.id or wanted.service.service
    old = store.services_of(wanted.node).get(service_id)
    match wanted.verb:
        case "get":
            if old is None:
                raise RefusedError("not_found", f'service "{service_id}" on node "{wanted.node}" doesn\'t exist')
            return [old]
        case "set":
            return [registry.set_service(store, wanted.node, row)]
        case "cas":
            _fresh(old, row, f'failed to set service "{service_id}" on node "{wanted.node}", index is stale')
            return [registry.set_service(store, wanted.node, row)]
        case "delete":
            registry.delete_service(store, wanted.node, service_id, now_s)
            return []
        case "delete-cas":
            _fresh(old, row, f'failed to delete service "{service_id}" on node "{wanted.node}", index is stale')
            registry.delete_service(store, wanted.node, service_id, now_s)
            return []
    raise InputError(f'unknown Service verb "{wanted.verb}"')


def _run_check(store: Store, wanted: CheckOperation, now_s: float) -> list[CheckRow]:
    row, check_id = wanted.check, wanted.check.check_id or wanted.check.name
    old = store.checks_of(row.node).get(check_id)
    match wanted.verb:
        case "get":
            if old is None:
                raise RefusedError("not_found", f'check "{check_id}" on node "{row.node}" doesn\'t exist')
            return [old]
        case "set":
            return [registry.set_check(store, row, now_s)]
        case "cas":
            _fresh(old, row, f'failed to set check "{check_id}" on node "{row.node}", index is stale')
            return [registry.set_check(store, row, now_s)]
        case "delete":
            registry.delete_check(store, row.node, check_id, now_s)
            return []
        case "delete-cas":
            _fresh(old, row, f'failed to delete check "{check_id}" on node "{row.node}", index is stale')
            registry.delete_check(store, row.node, check_id, now_s)
            return []
    raise InputError(f'unknown Check verb "{wanted.verb}"')


def _fresh(old: NodeRow | ServiceRow | CheckRow | None, wanted: NodeRow | ServiceRow | CheckRow, message: str) -> None:
    if (old.modify_index if old else 0) != wanted.modify_index:
        raise RefusedError("conflict", message)


def _present(store: Store, key: str) -> KvRow:
    if key not in store.kv:
        raise RefusedError("not_found", f'key "{key}" doesn\'t exist')
    return store.kv[key]


def _value(wanted: KvOperation) -> bytes:
    try:
        return base64.b64decode(wanted.value or "", validate=True)
    except binascii.Error as error:
        raise InputError(f"{wanted.key}: value is not base64") from error
