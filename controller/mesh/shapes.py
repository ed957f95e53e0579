"""Consul's JSON, as far as the mesh reads and writes it. Fields it does not know are ignored. No behaviour."""

from collections.abc import Mapping
from typing import Any

import msgspec

from controller.entries import HttpRule


class Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """Base of every shape. Consul writes null for what is empty: hence the many `| None`."""


class SelfConfig(Shape, frozen=True, kw_only=True):
    version: str
    revision: str = ""
    datacenter: str


class Self(Shape, frozen=True, kw_only=True):
    config: SelfConfig


class CatalogNode(Shape, frozen=True, kw_only=True):
    node: str
    address: str = ""
    meta: Mapping[str, str] | None = None


class TaggedAddress(Shape, frozen=True, kw_only=True):
    address: str = ""
    port: int = 0


class Upstream(Shape, frozen=True, kw_only=True):
    destination_name: str
    local_bind_address: str = ""
    local_bind_port: int = 0


class Proxy(Shape, frozen=True, kw_only=True):
    destination_service_name: str = ""
    destination_service_id: str = msgspec.field(default="", name="DestinationServiceID")
    upstreams: tuple[Upstream, ...] | None = None


class ConnectOptions(Shape, frozen=True, kw_only=True):
    native: bool | None = None


class ConsulService(Shape, frozen=True, kw_only=True):
    id: str = msgspec.field(default="", name="ID")
    service: str
    kind: str = ""
    address: str = ""
    port: int = 0
    tagged_addresses: Mapping[str, TaggedAddress] | None = None
    meta: Mapping[str, str] | None = None
    proxy: Proxy | None = None
    connect: ConnectOptions | None = None


class ConsulCheck(Shape, frozen=True, kw_only=True):
    node: str = ""
    check_id: str = msgspec.field(name="CheckID")
    name: str = ""
    status: str
    output: str = ""
    service_id: str = msgspec.field(default="", name="ServiceID")


class CatalogNodeServices(Shape, frozen=True, kw_only=True):
    node: CatalogNode
    services: Mapping[str, ConsulService] | None = None


class HealthRow(Shape, frozen=True, kw_only=True):
    node: CatalogNode
    service: ConsulService
    checks: tuple[ConsulCheck, ...] | None = None


class ConsulPermission(Shape, frozen=True, kw_only=True):
    action: str
    http: HttpRule = msgspec.field(name="HTTP")


class ConsulIntention(Shape, frozen=True, kw_only=True):
    id: str = msgspec.field(default="", name="ID")
    source_name: str
    destination_name: str
    source_type: str = "consul"
    action: str = ""  # "" where an intention of 1.9 and later has permissions for HTTP instead
    permissions: tuple[ConsulPermission, ...] | None = None
    description: str = ""
    precedence: int = 0


class ConsulRoot(Shape, frozen=True, kw_only=True):
    root_cert: str
    active: bool = False
    signing_key_id: str = msgspec.field(default="", name="SigningKeyID")


class ConsulRoots(Shape, frozen=True, kw_only=True):
    trust_domain: str
    roots: tuple[ConsulRoot, ...]


class ConsulLeaf(Shape, frozen=True, kw_only=True):
    service: str
    serial_number: str
    cert_pem: str = msgspec.field(name="CertPEM")
    private_key_pem: str = msgspec.field(name="PrivateKeyPEM")
    valid_after: str
    valid_before: str
    modify_index: int


class Written(Shape, frozen=True, kw_only=True):
    """Of anything: when it was written last."""

    modify_index: int


class ConsulSession(Shape, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    name: str = ""


class KvPair(Shape, frozen=True, kw_only=True):
    key: str
    value: bytes | None = None
    session: str = ""


class TxnKv(Shape, frozen=True, kw_only=True):
    verb: str
    key: str
    session: str = ""


class TxnNode(Shape, frozen=True, kw_only=True):
    verb: str
    node: CatalogNode


class TxnService(Shape, frozen=True, kw_only=True):
    verb: str
    node: str
    service: ConsulService


class TxnCheck(Shape, frozen=True, kw_only=True):
    verb: str
    check: ConsulCheck


class Txn(Shape, frozen=True, kw_only=True):
    """One operation of a transaction: one of the four is set."""

    kv: TxnKv | None = msgspec.field(default=None, name="KV")
    node: TxnNode | None = None
    service: TxnService | None = None
    check: TxnCheck | None = None


class Registration(Shape, frozen=True, kw_only=True):
    """PUT /v1/catalog/register of one service with its check; the node is there already."""

    node: str
    address: str
    skip_node_update: bool
    service: ConsulService
    check: ConsulCheck


class TxnError(Shape, frozen=True, kw_only=True):
    op_index: int  # -1: it is about the whole
    what: str


class TxnAnswer(Shape, frozen=True, kw_only=True):
    results: list[Any] | None = None
    errors: tuple[TxnError, ...] | None = None
