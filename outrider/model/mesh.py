"""What sidecars need to know of the mesh: services, endpoints, intentions, trust roots."""

from collections.abc import Mapping
from enum import StrEnum

from outrider.ids import AllocId, NodeId, ServiceName
from outrider.model.job import Group, Protocol, Value, has_guest
from outrider.model.sidecar import SidecarKind
from outrider.model.traffic import Permission, RateLimit, ServiceTraffic

MESH_DOMAIN = "mesh"  # services answer as NAME.mesh
# Inside every allocation's namespace, the same in each (DESIGN, decision 10). RFC 2544's range: on no real network.
VIRTUAL_NETWORK = "198.18.0.0/15"
DNS_ADDRESS = "198.18.0.1"
EXTERNALS_MAX = 64  # of one group: the last of the network's addresses are theirs, in each allocation anew
VIRTUAL_PORT = 15001  # each virtual address's listener; nftables leads every port of the address there
PUBLIC_PORT = 15100  # the first service's mTLS listener on the allocation's own address, the next one's + 1
# A guest and its side of the link, the same in every allocation. RFC 5737's: on no real network either.
GUEST_GATEWAY = "192.0.2.1"
GUEST_ADDRESS = "192.0.2.2"
GUEST_PREFIX = 30
# Where a shared sidecar listens, in its namespace alone: a network as large as VIRTUAL_NETWORK for each of the 1,024
# addresses of a node's block. Reserved (RFC 1112): on no real network either.
LISTENER_NETWORK = "240.0.0.0/5"
LOOPBACK = "127.0.0.1"
_VIRTUAL = (198 << 24) | (18 << 16)
_FIRST_VIRTUAL = _VIRTUAL + (1 << 8)
_FIRST_EXTERNAL = (198 << 24) | (19 << 16) | (255 << 8)
_LISTENER = 240 << 24
_VIRTUAL_BITS, _BLOCK_BITS = 17, 10


def virtual_address(index: int) -> str:
    """The dotted virtual address of the fleet's `index`-th service name, from 198.18.1.0 on."""
    if not 0 <= index < _FIRST_EXTERNAL - _FIRST_VIRTUAL:
        raise ValueError(f"virtual address {index}: {VIRTUAL_NETWORK} is used up")
    return _dotted(_FIRST_VIRTUAL + index)


def external_address(index: int) -> str:
    """Of a group's `index`-th external service. It means something within one allocation alone."""
    assert 0 <= index < EXTERNALS_MAX, f"{index} is beyond what validation lets pass"
    return _dotted(_FIRST_EXTERNAL + index)


def listener_address(local_address: str, virtual: str | None = None) -> str:
    """Where a shared sidecar listens for the allocation of `local_address`: for what it sends to `virtual`, a virtual
    address; or (None) for what is sent to it."""
    first = _LISTENER + ((_number(local_address) & (1 << _BLOCK_BITS) - 1) << _VIRTUAL_BITS)
    return _dotted(first + (_number(virtual) - _VIRTUAL if virtual is not None else 0))


def listener_network(local_address: str) -> str:
    """All of an allocation's listener addresses."""
    return f"{listener_address(local_address)}/{32 - _VIRTUAL_BITS}"


def _number(address: str) -> int:
    return int.from_bytes(map(int, address.split(".")))


def _dotted(number: int) -> str:
    return ".".join(str(number >> shift & 0xFF) for shift in (24, 16, 8, 0))


def shares_sidecar(group: Group) -> bool:
    return group.sidecar is SidecarKind.SHARED


def wants_own_sidecar(group: Group) -> bool:
    return bool(group.services) and not shares_sidecar(group)


def workload_address(group: Group) -> str:
    """Where the sidecar and the checks find the workload, inside its namespace."""
    return GUEST_ADDRESS if has_guest(group) else LOOPBACK


class Endpoint(Value, frozen=True, kw_only=True):
    """One sidecar that fronts the service. On the same node it is dialled at its local address."""

    id: str  # Consul's service id of the proxied instance
    node: str  # Consul's node name
    address: str
    port: int
    local_address: str = ""
    local_port: int = 0
    healthy: bool = True
    alloc: AllocId | None = None  # None: a service outside Outrider
    outrider: bool = False  # both ends ours: HTTP/2 between sidecars, ALPN
    subsets: tuple[str, ...] = ()  # of its service, to which it belongs


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class Intention(Value, frozen=True, kw_only=True):
    """Who may call whom, as Consul has it. `*` stands for all services."""

    source: str
    destination: str
    action: Action
    id: str = ""
    precedence: int = 0  # Consul's: 9 for exact -> exact, 8 * -> exact, 6 exact -> *, 5 * -> *
    owner: str = ""  # the job whose `allow:` line made it; "" by hand
    description: str = ""
    permissions: tuple[Permission, ...] = ()  # for HTTP; the action is then what no permission matches gets: deny


class MeshService(Value, frozen=True, kw_only=True):
    """A service as its callers' sidecars see it."""

    name: ServiceName
    virtual_address: str
    protocol: Protocol = Protocol.TCP
    endpoints: tuple[Endpoint, ...] = ()
    traffic: ServiceTraffic = ServiceTraffic()


class TrustRoots(Value, frozen=True, kw_only=True):
    datacenter: str = ""
    trust_domain: str = ""
    certificates_pem: tuple[str, ...] = ()  # all that are trusted; the active one first


class MeshView(Value, frozen=True, kw_only=True):
    """What one node's sidecars need. `intentions` is keyed by destination service placed on this node."""

    services: Mapping[ServiceName, MeshService] = {}
    intentions: Mapping[ServiceName, tuple[Intention, ...]] = {}  # in order of precedence, highest first
    rates: Mapping[ServiceName, RateLimit | None] = {}  # of the same services
    # Of transparent ones among them: what they may call beside their upstreams.
    reach: Mapping[ServiceName, tuple[ServiceName, ...]] = {}
    roots: TrustRoots = TrustRoots()


class MeshUpdate(Value, frozen=True, kw_only=True):
    """A change of a node's `MeshView`; `full` replaces it whole. Versions only grow within an epoch."""

    version: int
    full: bool = False
    services: tuple[MeshService, ...] = ()
    services_removed: tuple[ServiceName, ...] = ()
    intentions: tuple["ServiceIntentions", ...] = ()
    intentions_removed: tuple[ServiceName, ...] = ()
    roots: TrustRoots | None = None


class ServiceIntentions(Value, frozen=True, kw_only=True):
    service: ServiceName
    intentions: tuple[Intention, ...] = ()
    rate: RateLimit | None = None
    reach: tuple[ServiceName, ...] = ()  # of a transparent service: all that let it call


class Leaf(Value, frozen=True, kw_only=True):
    """A workload's certificate. `key_pem` is empty where the agent made the key itself."""

    service: ServiceName
    certificate_pem: str
    key_pem: str = ""
    expires_at_s: float = 0.0
    serial: str = ""
    superseded: bool = False  # of a CA that has made way for another, and still trusted: the next one is being made


class LocalService(Value, frozen=True, kw_only=True):
    """A service of an allocation of this node, as its sidecar must front it."""

    service: ServiceName
    node: NodeId
    alloc: AllocId
    public_port: int
    workload_address: str
    workload_port: int | None
    protocol: Protocol


def spiffe_id(trust_domain: str, datacenter: str, service: ServiceName) -> str:
    """Consul's own form, so that its proxies interoperate (DESIGN, decision 3)."""
    return f"spiffe://{trust_domain}/ns/default/dc/{datacenter}/svc/{service}"


class ObservedRefusal(Value, frozen=True, kw_only=True):
    """One connection or request that a server's sidecar refused: Envoy's own RBAC record."""

    at_s: float
    node: NodeId
    alloc: AllocId
    source_spiffe: str
    rule: str = ""  # the policy that Envoy matched; "" where none allowed it
    intention_id: str = ""
