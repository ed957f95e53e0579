"""Intentions as Consul 1.8 keeps them: one row per pair, found by id or by pair. Pure: works on a `Store`."""

from collections.abc import Mapping

import msgspec

from controller.catalog.rows import IntentionRow
from controller.catalog.store import Store
from controller.entries import HttpRule, Shape
from outrider.errors import InputError, RefusedError

WILDCARD = "*"


class PermissionRow(Shape, frozen=True, kw_only=True):
    """One rule for HTTP; Consul 1.9 and later."""

    action: str
    http: HttpRule = msgspec.field(name="HTTP")


class IntentionRequest(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """POST /v1/connect/intentions, PUT /v1/connect/intentions/ID, PUT /v1/connect/intentions/exact."""

    source_name: str = ""
    destination_name: str = ""
    source_type: str = "consul"
    action: str = ""
    permissions: tuple[PermissionRow, ...] | None = None
    description: str = ""
    meta: Mapping[str, str] | None = None


def create(store: Store, wanted: IntentionRequest, *, intention: str, at: str) -> IntentionRow:
    """`intention`: the new id; `at`: the wall clock, RFC 3339. Raises RefusedError where the pair has one."""
    if (old := find(store, wanted.source_name, wanted.destination_name)) is not None:
        raise RefusedError(
            "conflict",
            f"duplicate intention found: {old.action.upper()} default/{old.source_name} => "
            f"default/{old.destination_name} (ID: {old.id}, Precedence: {old.precedence})",
        )
    return _write(store, wanted, intention, at)


def update(store: Store, wanted: IntentionRequest, *, intention: str, at: str) -> IntentionRow:
    if intention not in store.intentions:
        raise RefusedError("not_found", f"Cannot modify non-existent intention: '{intention}'")
    other = find(store, wanted.source_name, wanted.destination_name)
    if other is not None and other.id != intention:
        raise RefusedError("conflict", f"duplicate intention found (ID: {other.id})")
    return _write(store, wanted, intention, at)


def find(store: Store, source: str, destination: str) -> IntentionRow | None:
    pair = (source, destination)
    return next((row for row in store.intentions.values() if (row.source_name, row.destination_name) == pair), None)


def ordered(store: Store) -> list[IntentionRow]:
    """All, highest precedence first, as Consul lists them."""
    return sorted(store.intentions.values(), key=_order)


def matching(store: Store, *, by: str, name: str) -> list[IntentionRow]:
    """Those that bear on `name` as "source" or as "destination", highest precedence first."""
    rows = store.intentions.values()
    return sorted(
        (row for row in rows if (row.source_name if by == "source" else row.destination_name) in (name, WILDCARD)),
        key=_order,
    )


def decide(store: Store, source: str, destination: str) -> IntentionRow | None:
    """The intention that decides; None: the default does, which is deny."""
    for row in matching(store, by="destination", name=destination):
        if row.source_name in (source, WILDCARD):
            return row
    return None


def precedence(source: str, destination: str) -> int:
    """Consul's numbers: an exact destination outweighs an exact source."""
    return {(False, False): 9, (True, False): 8, (False, True): 6, (True, True): 5}[
        (source == WILDCARD, destination == WILDCARD)
    ]


def _order(row: IntentionRow) -> tuple[int, str, str]:
    return (-row.precedence, row.source_name, row.destination_name)


def _write(store: Store, wanted: IntentionRequest, intention: str, at: str) -> IntentionRow:
    if wanted.permissions:
        if wanted.action:
            raise InputError("Action must be omitted if Permissions are specified")
        if any(one.action not in ("allow", "deny") for one in wanted.permissions):
            raise InputError("Permissions.Action must be set to 'allow' or 'deny'")
        if wanted.destination_name == WILDCARD:
            raise InputError("Permissions need one destination: a wildcard may be any protocol")
    elif wanted.action not in ("allow", "deny"):
        raise InputError("Action must be set to 'allow' or 'deny'")
    if not wanted.source_name or not wanted.destination_name:
        raise InputError("SourceName and DestinationName must be set")
    if wanted.source_type not in ("", "consul"):
        raise InputError(f"SourceType {wanted.source_type!r}: must be 'consul'")
    for name in (wanted.source_name, wanted.destination_name):
        if WILDCARD in name and name != WILDCARD:
            raise InputError(f"{name!r}: the wildcard stands alone")
    old = store.intentions.get(intention)
    row = IntentionRow(
        id=intention,
        description=wanted.description,
        source_name=wanted.source_name,
        destination_name=wanted.destination_name,
        action=wanted.action,
        permissions=tuple(msgspec.to_builtins(one) for one in wanted.permissions or ()) or None,
        meta=wanted.meta or {},
        precedence=precedence(wanted.source_name, wanted.destination_name),
        created_at=old.created_at if old else at,
        updated_at=at,
        create_index=old.create_index if old else store.index + 1,
        modify_index=store.index + 1,
    )
    store.set_intention(intention, row)
    return row
