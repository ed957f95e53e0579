"""What the catalog holds, in Consul's own shapes: a row encodes to the JSON that Consul's API shows. No behaviour.

The parts that Consul hands through without looking into them (a proxy's config, say) stay as parsed JSON.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

JsonObject = dict[str, Any]


class Row(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Base of every row. Indexes are set by the store alone."""

    create_index: int = 0
    modify_index: int = 0


class NodeRow(Row, frozen=True, kw_only=True):
    id: str = msgspec.field(default="", name="ID")
    node: str
    address: str = ""  # deletions come without
    datacenter: str = ""
    tagged_addresses: Mapping[str, str] | None = None
    meta: Mapping[str, str] | None = None


class ServiceRow(Row, frozen=True, kw_only=True):
    id: str = msgspec.field(default="", name="ID")
    service: str = ""
    kind: str = ""
    tags: tuple[str, ...] | None = None
    address: str = ""
    tagged_addresses: JsonObject | None = None
    meta: Mapping[str, str] | None = None
    port: int = 0
    weights: JsonObject | None = None
    enable_tag_override: bool = False
    proxy: JsonObject | None = None
    connect: JsonObject | None = None


class CheckRow(Row, frozen=True, kw_only=True):
    node: str = ""
    check_id: str = msgspec.field(default="", name="CheckID")
    name: str = ""
    status: str = ""
    notes: str = ""
    output: str = ""
    service_id: str = msgspec.field(default="", name="ServiceID")
    service_name: str = ""
    service_tags: tuple[str, ...] | None = None
    type: str = ""
    definition: JsonObject | None = None


class KvRow(Row, frozen=True, kw_only=True):
    key: str
    value: bytes | None = None  # base64 in JSON, as Consul has it
    flags: int = 0
    lock_index: int = 0
    session: str = ""


class SessionRow(Row, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    name: str = ""
    node: str
    lock_delay: int  # nanoseconds
    behavior: str
    ttl: str = msgspec.field(default="", name="TTL")
    node_checks: tuple[str, ...] = ()


class IntentionRow(Row, frozen=True, kw_only=True):
    id: str = msgspec.field(default="", name="ID")
    description: str = ""
    source_ns: str = msgspec.field(default="default", name="SourceNS")
    source_name: str
    destination_ns: str = msgspec.field(default="default", name="DestinationNS")
    destination_name: str
    source_type: str = "consul"
    action: str
    meta: Mapping[str, str] | None = None
    permissions: tuple[JsonObject, ...] | None = None
    precedence: int = 0
    created_at: str = ""
    updated_at: str = ""


class ConfigRow(Row, frozen=True, kw_only=True):
    """A config entry as it was written, without its indexes."""

    content: JsonObject


class RetiredRoot(Row, frozen=True, kw_only=True):
    """Signs no more; what it signed is trusted until its last leaf has ended."""

    certificate_pem: str
    until_s: float


class CaRow(Row, frozen=True, kw_only=True):
    """The Connect CA's own key and certificate. Never leaves the database but for `ConnectCa`."""

    trust_domain: str
    certificate_pem: str
    key_pem: str
    # While a rotation is under way: trusted by all before it signs.
    next_certificate_pem: str = ""
    next_key_pem: str = ""
    retired: tuple[RetiredRoot, ...] = ()


def connect_destination(row: ServiceRow) -> str:
    """The service whose callers may dial this instance by mTLS; "" where it takes no part in the mesh."""
    if row.kind == "connect-proxy":
        return str((row.proxy or {}).get("DestinationServiceName", ""))
    return row.service if (row.connect or {}).get("Native") else ""
