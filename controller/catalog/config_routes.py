"""/v1/config: the config entries that bear on traffic, and intentions in their later form. Works on a `Store`."""

from typing import Any

import msgspec

from controller import entries
from controller.catalog import intentions
from controller.catalog.api import Access, Answer, Call, Route, Scope, decode
from controller.catalog.rows import ConfigRow, JsonObject
from controller.catalog.store import CONFIG, INTENTIONS, Store
from outrider.errors import InputError, RefusedError

_KINDS = (*entries.TRAFFIC_KINDS, entries.INTENTIONS)


class _Source(entries.Shape, frozen=True, kw_only=True):
    name: str
    action: str = ""
    permissions: tuple[intentions.PermissionRow, ...] | None = None
    type: str = "consul"
    description: str = ""


class _ServiceIntentions(entries.Shape, frozen=True, kw_only=True):
    kind: str
    name: str
    sources: tuple[_Source, ...] = ()
    meta: dict[str, str] | None = None


def put(scope: Scope, call: Call) -> Answer:
    body = decode(call, JsonObject)
    kind, name = _known(str(body.get("Kind", ""))), str(body.get("Name", ""))
    if not name:
        raise InputError("Name is required")
    store = scope.store
    if kind == entries.INTENTIONS:
        _put_intentions(scope, call)
        return Answer(body=True)
    row = store.config.get(f"{kind}/{name}")
    if "cas" in call.query and call.number("cas") != (row.modify_index if row else 0):
        return Answer(body=False)
    _require_good(store, decode(call, entries.Entry))
    content = {key: value for key, value in body.items() if key not in ("CreateIndex", "ModifyIndex")}
    if row is None or row.content != content:
        created = row.create_index if row is not None else store.index + 1
        fresh = ConfigRow(content=content, create_index=created, modify_index=store.index + 1)
        store.set_config(f"{kind}/{name}", fresh)
    return Answer(body=True)


def read(scope: Scope, call: Call) -> Answer:
    kind, name = _known(call.path["kind"]), call.path["name"]
    found = [one for one in _shown(scope.store, kind) if one["Name"] == name]
    if not found:
        raise RefusedError("not_found", f'Config entry not found for "{kind}" / "{name}"')
    return _indexed(scope, kind, found[0])


def read_all(scope: Scope, call: Call) -> Answer:
    kind = _known(call.path["kind"])
    return _indexed(scope, kind, _shown(scope.store, kind))


def delete(scope: Scope, call: Call) -> Answer:
    kind, name, store = _known(call.path["kind"]), call.path["name"], scope.store
    if kind == entries.INTENTIONS:
        for row in [row for row in store.intentions.values() if row.destination_name == name]:
            store.set_intention(row.id, None)
    else:
        if kind == entries.DEFAULTS:
            _require_unused(store, name)
        store.set_config(f"{kind}/{name}", None)
    return Answer(body={})


def _known(kind: str) -> str:
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise InputError(
            f"invalid config entry kind: {kind}: the embedded catalog has {known}; run a Consul for others"
        )
    return kind


def _require_good(store: Store, entry: entries.Entry) -> None:
    """As Consul refuses, in its words where it has some."""
    if not entries.splits_whole(entry):
        total = sum(split.weight for split in entry.splits or ())
        raise InputError(f"the sum of all split weights must be 100, not {total:f}")
    if problem := entries.problem(entry):
        raise InputError(problem)
    found = entries.keyed(_entries(store))
    found[entry.kind, entry.name] = entry
    if entry.kind in (entries.ROUTER, entries.SPLITTER) and not entries.permits_routing(found, entry.name):
        raise InputError(
            f'discovery chain "{entry.name}" uses a protocol "tcp" that does not permit advanced routing or '
            "splitting behavior"
        )


def _require_unused(store: Store, name: str) -> None:
    for kind in (entries.ROUTER, entries.SPLITTER):
        if f"{kind}/{name}" in store.config:
            raise InputError(f'discovery chain "{name}" needs its protocol: delete its {kind} first')


def _entries(store: Store) -> list[entries.Entry]:
    return [msgspec.convert(row.content, entries.Entry) for row in store.config.values()]


def _shown(store: Store, kind: str) -> list[dict[str, Any]]:
    if kind == entries.INTENTIONS:
        return _shown_intentions(store)
    prefix = f"{kind}/"
    return [
        {**row.content, "CreateIndex": row.create_index, "ModifyIndex": row.modify_index}
        for key, row in sorted(store.config.items())
        if key.startswith(prefix)
    ]


def _shown_intentions(store: Store) -> list[dict[str, Any]]:
    by_destination: dict[str, list[dict[str, Any]]] = {}
    indexes: dict[str, tuple[int, int]] = {}
    for row in intentions.ordered(store):
        source = {
            "Name": row.source_name,
            **({"Permissions": row.permissions} if row.permissions else {"Action": row.action}),
            "Precedence": row.precedence,
            "Type": "consul",
            "Description": row.description,
        }
        by_destination.setdefault(row.destination_name, []).append(source)
        created, modified = indexes.get(row.destination_name, (row.create_index, 0))
        indexes[row.destination_name] = min(created, row.create_index), max(modified, row.modify_index)
    return [
        {
            "Kind": entries.INTENTIONS,
            "Name": name,
            "Sources": sources,
            "CreateIndex": indexes[name][0],
            "ModifyIndex": indexes[name][1],
        }
        for name, sources in by_destination.items()
    ]


def _put_intentions(scope: Scope, call: Call) -> None:
    """The destination's whole list: what it leaves out goes."""
    wanted, store = decode(call, _ServiceIntentions), scope.store
    at = call.at.isoformat()
    named = {source.name for source in wanted.sources}
    for row in [row for row in store.intentions.values() if row.destination_name == wanted.name]:
        if row.source_name not in named:
            store.set_intention(row.id, None)
    for number, source in enumerate(wanted.sources):
        request = intentions.IntentionRequest(
            source_name=source.name,
            destination_name=wanted.name,
            source_type=source.type,
            action=source.action,
            permissions=source.permissions,
            description=source.description,
        )
        old = intentions.find(store, source.name, wanted.name)
        if old is not None:
            intentions.update(store, request, intention=old.id, at=at)
        else:
            intentions.create(store, request, intention=f"{call.new_id[:-4]}{number:04x}", at=at)


def _indexed(scope: Scope, kind: str, body: object) -> Answer:
    topic = INTENTIONS if kind == entries.INTENTIONS else CONFIG
    return Answer(body=body, index=scope.store.topic_index(topic), topics=(topic,))


ROUTES = (
    Route(method="PUT", path="/config", access=Access.INTENTIONS, handler=put),
    Route(method="GET", path="/config/{kind}", access=Access.READ, handler=read_all),
    Route(method="GET", path="/config/{kind}/{name}", access=Access.READ, handler=read),
    Route(method="DELETE", path="/config/{kind}/{name}", access=Access.INTENTIONS, handler=delete),
)
