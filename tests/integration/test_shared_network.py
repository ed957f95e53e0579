"""The networks of allocations that hang on the node's shared sidecar: whose traffic is led where, and what is not."""
# ruff: noqa: ASYNC240 - a test may block its own loop

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.network.namespaces import AllocationNetwork, AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address, shared_address
from outrider.ids import AllocId
from outrider.model.mesh import listener_address
from tests.integration.network_lab import (
    NODE,
    OTHER_HOST,
    SERVER_PORT,
    Lab,
    arrived,
    inside,
    mounts_below,
    node,
    told,
)

__all__ = ["node"]
pytestmark = pytest.mark.host

BLOCK = 9
A, B, C = AllocId("0a0a0a0a0a"), AllocId("0b0b0b0b0b"), AllocId("0c0c0c0c0c")
ORDER = (A, B, C)
SIDECAR, OWN_SIDECAR, WORKLOAD, DNS = 500_000, 550_000, 600_000, 700_000  # the host's uids, of no user of any host
MESH = {A: 20_001, B: 20_002, C: 20_003}
VIRTUAL = "198.18.1.0"
EVERYWHERE = ("0.0.0.0/0",)


@pytest.fixture
async def networks(node: Lab, tmp_path: Path) -> AsyncIterator[AllocationNetworks]:
    assert node.run("nft list ruleset") == ""
    made = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)
    yield made
    await made.reap(())
    await made.close()
    assert mounts_below(tmp_path) == 0
    assert "ors9" not in node.run("ip -o link")


def spec(alloc: AllocId, *, shared: bool = True, egress: tuple[str, ...] = ()) -> NetworkSpec:
    taken: list[str] = []
    for _ in ORDER[: ORDER.index(alloc) + 1]:
        address = next_address(BLOCK, taken)
        assert address is not None
        taken.append(address)
    return NetworkSpec(
        alloc=alloc,
        local_address=taken[-1],
        host_side_address=shared_address(BLOCK) if shared else gateway_address(BLOCK),
        mesh_ports=((MESH[alloc], 15100),),
        static_ports=((8_081, 8080),) if alloc == A else (),
        egress=egress,
        sidecar_uid=SIDECAR if shared else OWN_SIDECAR,
        workload_uids=(WORKLOAD, 65_536),
        dns_uid=DNS,
        shared=shared,
        service_ports=(8080,) if shared else (),
    )


async def two(
    node: Lab, networks: AllocationNetworks, *, egress: tuple[str, ...] = ()
) -> tuple[AllocationNetwork, AllocationNetwork]:
    """Two allocations on the shared sidecar, which listens for both; the first's workload is published."""
    a, b = await networks.create(spec(A, egress=egress)), await networks.create(spec(B, egress=egress))
    listeners = [
        place
        for each in (a, b)
        for place in (
            (listener_address(each.local_address), 15100),
            (listener_address(each.local_address, VIRTUAL), 15001),
        )
    ]
    node.serve_in(networks.shared_namespace, SIDECAR, *listeners)
    node.serve_in(a.namespace, WORKLOAD + 5, ("0.0.0.0", 8080))
    node.serve_in(b.namespace, WORKLOAD + 5, ("127.0.0.1", 8080))
    return a, b


async def test_a_virtual_address_leads_to_the_callers_own_listener(node: Lab, networks: AllocationNetworks) -> None:
    a, b = await two(node, networks)
    for each in (a, b):
        usual, odd, unknown, udp = node.from_inside(
            each.namespace,
            WORKLOAD,
            ("tcp", VIRTUAL, 80),
            ("tcp", VIRTUAL, 6379),
            ("tcp", "198.18.1.1", 80),
            ("udp", VIRTUAL, 80),
        )
        assert told(usual)["own"] == told(odd)["own"] == [listener_address(each.local_address, VIRTUAL), 15001]
        assert told(usual)["peer"] == told(odd)["peer"] == each.local_address
        assert (unknown, udp) == ("ConnectionRefusedError", "PermissionError"), "each at once"
    with networks.open_socket(A, socket.SOCK_STREAM) as opened:  # as the agent's probe does
        opened.settimeout(2)
        opened.connect((VIRTUAL, 15001))
        assert told(opened.recv(1000).decode())["peer"] == a.local_address


async def test_its_public_listener_is_reached_by_those_who_reach_any_sidecar(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, _ = await two(node, networks)
    c = await networks.create(spec(C, shared=False))
    at = [listener_address(a.local_address), 15100]
    (afar,) = node.from_other_host(("tcp", NODE, MESH[A]))
    (near,) = node.from_node(("tcp", NODE, MESH[A]))
    (neighbour,) = node.from_inside(c.namespace, OWN_SIDECAR, ("tcp", a.local_address, 15100))
    itself, away = node.from_inside(
        networks.shared_namespace, SIDECAR, ("tcp", a.local_address, 15100), ("tcp", OTHER_HOST, SERVER_PORT)
    )
    assert [told(each)["own"] for each in (afar, near, neighbour, itself)] == [at] * 4
    assert told(afar)["peer"] == OTHER_HOST
    assert told(away)["peer"] == NODE


async def test_the_sidecar_reaches_the_ports_of_services_where_workloads_listen_on_loopback_alone(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks)
    node.serve_in(b.namespace, WORKLOAD, ("0.0.0.0", 9090))
    attempts = (("tcp", a.local_address, 8080), ("tcp", b.local_address, 8080), ("tcp", b.local_address, 9090))
    everywhere, loopback, other = node.from_inside(networks.shared_namespace, SIDECAR, *attempts)
    assert told(everywhere) == {"peer": shared_address(BLOCK), "own": ["127.0.0.1", 8080], "dialled": 8080}
    assert arrived(loopback)
    assert other == "ConnectionRefusedError"
    assert not any(map(arrived, node.from_inside(networks.shared_namespace, SIDECAR + 1, *attempts)))
    (closed,) = node.from_inside(
        networks.shared_namespace, SIDECAR, ("tcp", (await networks.create(spec(C))).local_address, 8080)
    )
    assert closed == "ConnectionRefusedError", "nobody listens, which is told at once"


@pytest.mark.parametrize("egress", [(), EVERYWHERE])
async def test_a_workload_reaches_virtual_addresses_and_its_egress_alone(
    node: Lab, networks: AllocationNetworks, egress: tuple[str, ...]
) -> None:
    a, b = await two(node, networks, egress=egress)
    never = (
        *(("tcp", b.local_address, port) for port in (15100, 8080)),
        ("udp", b.local_address, 15100),
        ("tcp", listener_address(a.local_address), 15100),
        ("tcp", listener_address(b.local_address, VIRTUAL), 15001),
        ("tcp", shared_address(BLOCK), 15001),
        ("raw", OTHER_HOST, 0),
        ("packet", "eth0", 0),
        ("tcp", "::1", 15100),
    )
    beyond = (*((kind, OTHER_HOST, SERVER_PORT) for kind in ("tcp", "udp")), ("tcp", NODE, SERVER_PORT))
    outcomes = node.from_inside(a.namespace, WORKLOAD + 65_535, *never)
    assert [attempt for attempt, outcome in zip(never, outcomes, strict=True) if arrived(outcome)] == []
    assert [arrived(outcome) for outcome in node.from_inside(a.namespace, WORKLOAD, *beyond)] == [bool(egress)] * 3
    nobody = node.from_inside(a.namespace, WORKLOAD + 65_536, beyond[0], ("tcp", VIRTUAL, 80))
    assert not any(map(arrived, nobody))
    assert not any(map(arrived, node.from_inside(a.namespace, DNS, ("tcp", VIRTUAL, 80), ("tcp", "127.0.0.1", 8080))))


async def test_nobody_speaks_for_another_whatever_its_namespaces_own_rules_say(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks)
    root = " ".join(inside(b.namespace, 0))
    node.run(f"{root} nft flush ruleset")
    others = (
        ("tcp", a.local_address, 8080),
        ("tcp", a.local_address, 15100),
        ("tcp", listener_address(a.local_address), 15100),
        ("tcp", listener_address(a.local_address, VIRTUAL), 15001),
        ("tcp", listener_address(b.local_address, VIRTUAL), 15001),
        ("tcp", shared_address(BLOCK), 15001),
        ("udp", a.local_address, 8080),
    )
    assert not any(map(arrived, node.from_inside(b.namespace, WORKLOAD, *others)))
    (own,) = node.from_inside(b.namespace, WORKLOAD, ("tcp", VIRTUAL, 15001))
    assert told(own)["own"] == [listener_address(b.local_address, VIRTUAL), 15001]
    # In another's name, or in the sidecar's.
    for address in (a.local_address, shared_address(BLOCK)):
        node.run(f"{root} nft add table ip forged")
        node.run(f"{root} nft add chain ip forged leaving {{ type nat hook postrouting priority srcnat ; }}")
        node.run(f"{root} nft add rule ip forged leaving snat to {address}")
        assert not any(map(arrived, node.from_inside(b.namespace, WORKLOAD, ("tcp", VIRTUAL, 15001), *others[:2])))
        node.run(f"{root} nft delete table ip forged")
    (still,) = node.from_inside(a.namespace, WORKLOAD, ("tcp", VIRTUAL, 80))
    assert told(still)["peer"] == a.local_address


async def test_a_published_port_leads_to_the_workload(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)
    published, unpublished = node.from_other_host(("tcp", NODE, 8_081), ("tcp", NODE, 8_082))
    assert told(published) == {"peer": OTHER_HOST, "own": [a.local_address, 8080], "dialled": 8080}
    assert unpublished == "ConnectionRefusedError"


async def test_closed_entrances_take_no_new_call_and_nobody_elses(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)
    await networks.close_entrances(A)
    await networks.close_entrances(A)
    closed, other = node.from_other_host(("tcp", NODE, MESH[A]), ("tcp", NODE, MESH[B]))
    (itself,) = node.from_inside(networks.shared_namespace, SIDECAR, ("tcp", a.local_address, 15100))
    (outbound,) = node.from_inside(a.namespace, WORKLOAD, ("tcp", VIRTUAL, 80))
    assert closed == itself == "ConnectionRefusedError"
    assert arrived(other)
    assert arrived(outbound)


async def test_it_is_there_as_long_as_something_hangs_on_it(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    _, b = await two(node, networks)
    await networks.delete(A)
    assert [each.alloc for each in await networks.list() if each.shared] == [B]
    assert arrived(node.from_inside(b.namespace, WORKLOAD, ("tcp", VIRTUAL, 80))[0])
    assert not arrived(node.from_other_host(("tcp", NODE, MESH[A]))[0])
    later = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)
    a = await later.create(spec(A))
    assert arrived(node.from_inside(a.namespace, WORKLOAD, ("tcp", VIRTUAL, 80))[0]), "an earlier agent made it"
    await later.close()
    await networks.delete(A)
    await networks.delete(B)
    assert not Path(networks.shared_namespace).exists()
    assert "ors9" not in node.run("ip -o link")


async def test_what_a_killed_agent_left_half_made_is_made_anew(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    await networks.create(spec(A))
    await networks.delete(A)
    Path(networks.shared_namespace).touch()
    node.run("ip link add ors9 type veth peer name left9")
    a = await networks.create(spec(A))
    node.serve_in(networks.shared_namespace, SIDECAR, (listener_address(a.local_address, VIRTUAL), 15001))
    assert arrived(node.from_inside(a.namespace, WORKLOAD, ("tcp", VIRTUAL, 80))[0])
    assert mounts_below(tmp_path) == 2
