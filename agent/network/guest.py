"""The link of a virtual machine inside its allocation's namespace: a tap, and what may pass over it. Mostly pure.

A guest is told from everything else by the interface its packets come from, not by a uid. It meets the sidecar as a
process does: all it reaches is the DNS responder, the sidecar's virtual addresses, and the `egress:` of its job.
"""

import fcntl
import os
import struct

from agent.network.plan import INNER_LINK, NAMESPACE_TABLE, NetworkSpec, block_of, refusals
from outrider.errors import HostError
from outrider.model.mesh import DNS_ADDRESS, GUEST_ADDRESS, VIRTUAL_NETWORK, VIRTUAL_PORT

TAP = "tap0"
DHCP_PORT = 67
# Of the guest, and of the tap that it sends to. Always the same: each is alone on its link, and a guest that goes on
# elsewhere goes on sending to what it knew.
GUEST_MAC, TAP_MAC = "52:54:00:00:00:02", "52:54:00:00:00:01"
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def make_tap(owner: int) -> None:
    """In the namespace that this thread is in: it stays, and the host uid `owner` alone may open it."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
            fcntl.ioctl(descriptor, _TUNSETOWNER, owner)
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError("/dev/net/tun", step=f"make {TAP}: {error.strerror}", hint="the kernel needs tun") from error


def guest_rules(spec: NetworkSpec) -> list[str]:
    """Beside the namespace's own rules, before what those drop at their end."""
    table = NAMESPACE_TABLE
    virtual = f"ip daddr {VIRTUAL_NETWORK} tcp dport"
    return [
        f"add chain inet {table} claimed {{ type filter hook prerouting priority raw; policy accept; }}",
        f"add chain inet {table} arriving {{ type nat hook prerouting priority dstnat; policy accept; }}",
        # Nobody but itself: a sender's address is what the rest goes by.
        f"add rule inet {table} claimed iifname {TAP} ip saddr {GUEST_ADDRESS} accept",
        f"add rule inet {table} claimed iifname {TAP} ip saddr 0.0.0.0 udp dport {DHCP_PORT} accept",
        f"add rule inet {table} claimed iifname {TAP} drop",
        f"add rule inet {table} arriving iifname {TAP} ip daddr {DNS_ADDRESS} accept",
        f"add rule inet {table} arriving iifname {TAP} {virtual} != {VIRTUAL_PORT} dnat to :{VIRTUAL_PORT}",
        f"add rule inet {table} input iifname {TAP} ip daddr {DNS_ADDRESS} udp dport 53 accept",
        f"add rule inet {table} input iifname {TAP} ip daddr {DNS_ADDRESS} tcp dport 53 accept",
        f"add rule inet {table} input iifname {TAP} udp dport {DHCP_PORT} accept",
        f"add rule inet {table} input iifname {TAP} {virtual} {VIRTUAL_PORT} accept",
        *refusals(f"add rule inet {table} input iifname {TAP}"),
        # The agent's own sockets: checks, and those that it handed to the responder.
        f"add rule inet {table} output oifname {TAP} meta skuid 0 accept",
        *(
            [f"add rule inet {table} output oifname {TAP} meta skuid {spec.dns_uid} tcp sport 53 accept"]
            if spec.dns_uid is not None
            else []
        ),
        *_beyond(spec),
        *refusals(f"add rule inet {table} forward iifname {TAP}"),
    ]


def _beyond(spec: NetworkSpec) -> list[str]:
    """What passes between the guest and the world without the sidecar, because the job says so."""
    table = NAMESPACE_TABLE
    rules = []
    static = ", ".join(str(inner) for _, inner in spec.static_ports)
    networks = ", ".join(spec.egress)
    if static:
        at = f"iifname {INNER_LINK} ip daddr {spec.local_address} tcp dport {{ {static} }}"
        rules.append(f"add rule inet {table} arriving {at} dnat ip to {GUEST_ADDRESS}")
        rules.append(f"add rule inet {table} forward iifname {INNER_LINK} ct status dnat accept")
        rules.append(f"add rule inet {table} forward iifname {TAP} ct direction reply accept")
    if networks:
        out = f"iifname {TAP} oifname {INNER_LINK} ip daddr != {block_of(spec.local_address)} ip daddr {{ {networks} }}"
        rules.append(f"add rule inet {table} forward {out} accept")
        rules.append(f"add rule inet {table} forward iifname {INNER_LINK} ct state established,related accept")
        rules.append(f"add chain inet {table} leaving {{ type nat hook postrouting priority srcnat; policy accept; }}")
        source = f"oifname {INNER_LINK} ip saddr {GUEST_ADDRESS}"
        rules.append(f"add rule inet {table} leaving {source} snat ip to {spec.local_address}")
    return rules
