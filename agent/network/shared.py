"""Where the node's shared sidecar lives: a namespace between the node and the allocations that it serves. Pure.

    workload - eth0 | orALLOC - [ nftables, Envoy ] - eth0 | orsBLOCK - node

All that such an allocation sends or gets passes here. What it sends to a virtual address is led to the listener of its
own for that address (`listener_address`); whose it is, the link says that it came by, and nobody speaks for another.
Loaded once; an allocation is a few elements of sets and maps.
"""

from agent.network.plan import (
    INNER_LINK,
    NAMESPACE_TABLE,
    REFUSED,
    NetworkSpec,
    block_network,
    refusals,
    shared_address,
    virtual_rules,
)
from outrider.model.mesh import (
    DNS_ADDRESS,
    LISTENER_NETWORK,
    LOOPBACK,
    VIRTUAL_NETWORK,
    VIRTUAL_PORT,
    listener_address,
    listener_network,
)

_TABLE = f"ip {NAMESPACE_TABLE}"
_MEMBER_CHAINS = f"""
table inet {NAMESPACE_TABLE} {{
    counter {REFUSED} {{ }}
    chain virtual {{ type nat hook output priority -100; policy accept; }}
    chain arriving {{ type nat hook prerouting priority dstnat; policy accept; }}
    chain loopback {{ }}
    chain output {{ type filter hook output priority filter; policy drop; }}
    chain input {{ type filter hook input priority filter; policy drop; }}
    chain forward {{ type filter hook forward priority filter; policy drop; }}
}}"""


def outer_link(block: int) -> str:
    """The node's end of the link to the shared sidecar's namespace."""
    return f"ors{block}"


def shared_rules(*, block: int, uid: int) -> str:
    """The rules inside; `uid` is the sidecar's on the host."""
    return f"""
table {_TABLE} {{
    set senders {{ type ifname . ipv4_addr; }}
    map outbound {{ type ifname : interval ipv4_addr; }}
    map inbound {{ type ipv4_addr . inet_service : ipv4_addr . inet_service; }}
    set workloads {{ type ipv4_addr . inet_service; }}
    set published {{ type ipv4_addr . inet_service; }}
    chain claimed {{
        type filter hook prerouting priority raw; policy accept;
        iifname lo accept
        ip daddr {LISTENER_NETWORK} drop
        iifname {INNER_LINK} accept
        iifname . ip saddr != @senders drop
    }}
    chain arriving {{
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr {VIRTUAL_NETWORK} tcp dport {VIRTUAL_PORT} dnat ip prefix to iifname map @outbound
        iifname {INNER_LINK} dnat ip to ip daddr . tcp dport map @inbound
    }}
    chain calling {{
        type nat hook output priority -100; policy accept;
        dnat ip to ip daddr . tcp dport map @inbound
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname lo accept
        ct state established,related accept
        ct status dnat accept
        meta l4proto tcp reject with tcp reset
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname lo accept
        ct state established,related accept
        meta skuid != {uid} drop
        ct status dnat accept
        oifname {INNER_LINK} meta l4proto tcp accept
        ip daddr . tcp dport @workloads accept
        meta l4proto tcp reject with tcp reset
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        ip daddr {VIRTUAL_NETWORK} drop
        iifname != {INNER_LINK} oifname {INNER_LINK} ip daddr != {block_network(block)} accept
        iifname {INNER_LINK} ip daddr . tcp dport @published accept
        meta l4proto tcp reject with tcp reset
    }}
}}
"""


def shared_elements(spec: NetworkSpec, link: str) -> tuple[str, ...]:
    """The allocation's elements of that table, as they stand behind nft's `add element`; `link` is its link here."""
    local = spec.local_address
    return (
        f"{_TABLE} senders {{ {link} . {local} }}",
        f"{_TABLE} outbound {{ {link} : {listener_network(local)} }}",
        *(f"{_TABLE} workloads {{ {local} . {port} }}" for port in spec.service_ports),
        *(f"{_TABLE} published {{ {local} . {inner} }}" for _, inner in spec.static_ports),
        *entrances(spec),
    )


def entrances(spec: NetworkSpec) -> tuple[str, ...]:
    """Those of the elements that lead new calls to its services' listeners."""
    local = spec.local_address
    return tuple(
        f"{_TABLE} inbound {{ {local} . {inner} : {listener_address(local)} . {inner} }}"
        for _, inner in spec.mesh_ports
    )


def member_rules(spec: NetworkSpec, *, block: int) -> str:
    """The rules in the namespace of an allocation that hangs on it: the workload, and no sidecar.

    The workload reaches virtual addresses beside its `egress:`; the shared sidecar reaches its services' ports, at
    which it may listen on 127.0.0.1 alone, as with a sidecar of its own.
    """
    table, output = f"inet {NAMESPACE_TABLE}", f"add rule inet {NAMESPACE_TABLE} output"
    first, count = spec.workload_uids
    workload = f"meta skuid {first}-{first + count - 1}"
    sidecar = f"iifname {INNER_LINK} ip saddr {shared_address(block)}"
    services = ", ".join(map(str, spec.service_ports))
    static = ", ".join(str(inner) for _, inner in spec.static_ports)
    served = ", ".join(part for part in (services, static) if part)
    call = f"ip daddr {VIRTUAL_NETWORK} tcp dport {VIRTUAL_PORT} accept"
    rules = [*virtual_rules(), f"{output} oifname lo goto loopback"]
    if spec.dns_uid is not None:
        loopback = f"add rule {table} loopback meta skuid {spec.dns_uid}"
        rules += [f"{loopback} ip saddr {DNS_ADDRESS} tcp sport 53 accept", f"{loopback} drop"]
    rules.append(f"add rule {table} loopback accept")
    if served:
        rules.append(f"{output} {workload} ct direction reply tcp sport {{ {served} }} accept")
    # Its own name on what it begins: 127.0.0.1 may leave here too.
    rules.append(f"{output} {workload} ip saddr != {spec.local_address} drop")
    rules += [f"{output} {workload} {call}", f"{output} meta skuid 0 ip saddr {spec.local_address} {call}"]
    if spec.egress:
        networks = ", ".join(spec.egress)
        rules.append(f"{output} {workload} ip daddr != {block_network(block)} ip daddr {{ {networks} }} accept")
    rules += refusals(f"{output} {workload}")
    rules += [f"{output} meta skuid != {{ 0 }} drop", f"{output} ct state established,related accept"]
    rules += [f"add rule {table} input {what} accept" for what in ("iifname lo", "ct state established,related")]
    if services:
        rules.append(f"add rule {table} arriving {sidecar} tcp dport {{ {services} }} dnat ip to {LOOPBACK}")
        rules.append(f"add rule {table} input {sidecar} ip daddr {LOOPBACK} tcp dport {{ {services} }} accept")
    if static:
        rules.append(f"add rule {table} input ip daddr {spec.local_address} tcp dport {{ {static} }} accept")
    return "\n".join([_MEMBER_CHAINS, *rules])
