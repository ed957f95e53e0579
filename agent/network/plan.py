"""What an allocation's network is: addresses, and the nftables rules of its namespace and of its node. Pure.

The node's rules are one table per node, laid once; an allocation is a few elements of its sets and maps, so that
adding one rewrites no chain. Addresses come from blocks of 1,024 out of 100.64.0.0/10 (RFC 6598): a node claims a
block, which makes `local_address` unique among all fleets of a host.
"""

from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv4Network

from outrider.ids import AllocId
from outrider.model.job import Value
from outrider.model.mesh import DNS_ADDRESS, VIRTUAL_NETWORK, VIRTUAL_PORT

_POOL = IPv4Network("100.64.0.0/10")
_BLOCK_PREFIX = 22
BLOCKS = 1 << (_BLOCK_PREFIX - _POOL.prefixlen)
NAMESPACE_TABLE = "outrider"
REFUSED = "refused"  # names the counter of packets that a workload sent where nothing lets it
INNER_LINK = "eth0"  # the namespace's end of the veth


class NetworkSpec(Value, frozen=True, kw_only=True):
    """One allocation's network. Uids are the host's (DESIGN, decision 8)."""

    alloc: AllocId
    local_address: str  # unique on the node: `next_address`
    host_side_address: str  # the other end of the veth, the same for all of a node: `gateway_address`
    mesh_ports: tuple[tuple[int, int], ...] = ()  # (port of the node's address, the sidecar's public port)
    static_ports: tuple[tuple[int, int], ...] = ()  # (port of the node's address, the workload's port)
    egress: tuple[str, ...] = ()  # IPv4 networks that the workload may reach beside the mesh
    sidecar_uid: int  # of the one that serves it, here or in a namespace of its own
    workload_uids: tuple[int, int]  # the first, and how many
    dns_uid: int | None = None  # the responder's, where it has one of its own
    bandwidth_bytes: int = 0  # a second, each way; 0 is no limit
    guest_uid: int | None = None  # the emulator's, where the workload is a virtual machine
    # Where its sidecar is the node's shared one: on which it hangs, by ports on which its services' workloads listen.
    shared: bool = False
    service_ports: tuple[int, ...] = ()


def block_network(block: int) -> str:
    """The addresses of a node's block. Raises ValueError where there is no such block."""
    if not 0 <= block < BLOCKS:
        raise ValueError(f"address block {block}: expected 0 to {BLOCKS - 1}")
    first = _POOL.network_address + (block << (_POOL.max_prefixlen - _BLOCK_PREFIX))
    return f"{first}/{_BLOCK_PREFIX}"


def gateway_address(block: int) -> str:
    """The node's side of all its veths."""
    return str(IPv4Network(block_network(block))[1])


def shared_address(block: int) -> str:
    """The shared sidecar's, on the node and towards the allocations that hang on it."""
    return str(IPv4Network(block_network(block))[-1])


def next_address(block: int, taken: Collection[str], last: str | None = None) -> str | None:
    """A free address of the block; None where all are taken.

    It goes on after `last` rather than reusing the lowest: conntrack may still know flows to a freed address.
    """
    network = IPv4Network(block_network(block))
    first, count = 2, network.num_addresses - 3
    start = 0 if last is None else int(IPv4Address(last)) - int(network[first]) + 1
    for step in range(count):
        address = str(network[first + (start + step) % count])
        if address not in taken:
            return address
    return None


def block_of(address: str) -> str:
    """The network of the block that `address` is from."""
    return str(IPv4Network(f"{address}/{_BLOCK_PREFIX}", strict=False))


def node_table(block: int) -> str:
    return f"outrider_{block}"


def node_rules(*, block: int, node_address: str) -> str:
    """The node's table, for `nft`. Loading it again changes nothing: elements stay, rules are laid anew."""
    table, network = node_table(block), block_network(block)
    return f"""
add table ip {table}
add map ip {table} ports {{ type inet_service : ipv4_addr . inet_service; }}
add set ip {table} public {{ type ipv4_addr . inet_service; }}
add chain ip {table} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain ip {table} output {{ type nat hook output priority -100; policy accept; }}
add chain ip {table} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain ip {table} forward {{ type filter hook forward priority filter; policy accept; }}
flush table ip {table}
add rule ip {table} prerouting ip daddr {node_address} dnat ip to tcp dport map @ports
add rule ip {table} output ip daddr {node_address} dnat ip to tcp dport map @ports
add rule ip {table} postrouting ip saddr {network} ip daddr != {network} snat ip to {node_address}
add rule ip {table} forward ip saddr != {network} ip daddr != {network} accept
add rule ip {table} forward ct state established,related accept
add rule ip {table} forward ct status dnat accept
add rule ip {table} forward ip daddr . tcp dport @public accept
add rule ip {table} forward ip daddr {network} drop
"""


def node_elements(spec: NetworkSpec, *, block: int) -> tuple[str, ...]:
    """The allocation's elements of the node's table, each as it stands behind nft's `add element`."""
    table = f"ip {node_table(block)}"
    published = (*spec.mesh_ports, *spec.static_ports)
    return (
        *(f"{table} ports {{ {outer} : {spec.local_address} . {inner} }}" for outer, inner in published),
        *(f"{table} public {{ {spec.local_address} . {inner} }}" for _, inner in spec.mesh_ports),
    )


def namespace_rules(spec: NetworkSpec, guest: Sequence[str] = ()) -> str:
    """The rules inside the allocation's namespace, for `nft`; `guest` has those of its virtual machine's link.

    Who sent a packet is told by its socket's owner. Packets without one (resets, the last of a closed socket) pass
    beyond `lo` only where they belong to a connection that was let through when it had one.
    """
    first, count = spec.workload_uids
    workload = f"meta skuid {first}-{first + count - 1}"
    public = ", ".join(str(inner) for _, inner in spec.mesh_ports)
    static = ", ".join(str(inner) for _, inner in spec.static_ports)
    entrances = ", ".join(part for part in (public, static) if part)
    rules = [
        *virtual_rules(),
        *_loopback(spec, workload, public),
        f"add rule inet {NAMESPACE_TABLE} output meta skuid {spec.sidecar_uid} meta l4proto tcp accept",
    ]
    output = f"add rule inet {NAMESPACE_TABLE} output"
    if static:
        rules.append(f"{output} {workload} ct direction reply tcp sport {{ {static} }} accept")
    if spec.egress:
        # The node's other allocations are never egress, even where it covers their addresses.
        networks = ", ".join(spec.egress)
        rules.append(f"{output} {workload} ip daddr != {block_of(spec.local_address)} ip daddr {{ {networks} }} accept")
    rules += refusals(f"{output} {workload}")
    rules += guest
    rules.append(f"{output} meta skuid != {{ 0 }} drop")
    rules.append(f"{output} ct state established,related accept")
    if entrances:
        rules.append(
            f"add rule inet {NAMESPACE_TABLE} input ip daddr {spec.local_address} tcp dport {{ {entrances} }} accept"
        )
    return "\n".join([_namespace_chains(), *rules])


def refusals(rule: str) -> list[str]:
    """`rule` with the verdicts for what a workload may not: told to it at once, and counted."""
    counted = f"counter name {REFUSED}"
    return [
        f"{rule} meta l4proto tcp {counted} reject with tcp reset",
        f"{rule} {counted} reject with icmpx admin-prohibited",
    ]


def _namespace_chains() -> str:
    table = NAMESPACE_TABLE
    return f"""
add table inet {table}
add counter inet {table} {REFUSED}
add chain inet {table} virtual {{ type nat hook output priority -100; policy accept; }}
add chain inet {table} loopback
add chain inet {table} output {{ type filter hook output priority filter; policy drop; }}
add chain inet {table} input {{ type filter hook input priority filter; policy drop; }}
add chain inet {table} forward {{ type filter hook forward priority filter; policy drop; }}
add rule inet {table} input iifname lo accept
add rule inet {table} input ct state established,related accept
add rule inet {table} output oifname lo goto loopback"""


def virtual_rules() -> tuple[str, ...]:
    chain = f"add rule inet {NAMESPACE_TABLE} virtual"
    return (
        f"{chain} ip daddr {DNS_ADDRESS} accept",
        # Without an address: each virtual address is bound at VIRTUAL_PORT (docs/adr/0001).
        f"{chain} ip daddr {VIRTUAL_NETWORK} tcp dport != {VIRTUAL_PORT} dnat to :{VIRTUAL_PORT}",
    )


def _loopback(spec: NetworkSpec, workload: str, public: str) -> tuple[str, ...]:
    chain = f"add rule inet {NAMESPACE_TABLE} loopback"
    rules = []
    if spec.dns_uid is not None:
        # One responder serves every allocation of the node: it answers, and may start nothing.
        rules.append(f"{chain} meta skuid {spec.dns_uid} ip saddr {DNS_ADDRESS} tcp sport 53 accept")
        rules.append(f"{chain} meta skuid {spec.dns_uid} drop")
    if public:
        rules.append(f"{chain} {workload} ct direction original tcp dport {{ {public} }} reject with tcp reset")
    return (*rules, f"{chain} accept")
