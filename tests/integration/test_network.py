"""An allocation's network on a node: what reaches it, what it reaches, and what it must never reach."""
# ruff: noqa: ASYNC240 - a test may block its own loop

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.network.namespaces import AllocationNetwork, AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address
from outrider.errors import HostError
from outrider.ids import AllocId
from tests.integration.network_lab import (
    NODE,
    OTHER_HOST,
    SERVER_PORT,
    Lab,
    arrived,
    inside,
    links,
    mounts_below,
    node,
    told,
)

__all__ = ["node"]
pytestmark = pytest.mark.host

BLOCK = 7
A, B = AllocId("0a0a0a0a0a"), AllocId("0b0b0b0b0b")
SIDECAR, WORKLOAD, DNS = 500_000, 600_000, 700_000  # the host's uids, of no user of any host
A_MESH, B_MESH, A_STATIC = 20_001, 20_002, 8_081


@pytest.fixture
async def networks(node: Lab, tmp_path: Path) -> AsyncIterator[AllocationNetworks]:
    assert node.run("nft list ruleset") == ""
    made = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)
    yield made
    await made.reap(())
    await made.close()
    assert mounts_below(tmp_path) == 0


def spec(alloc: AllocId, *, egress: tuple[str, ...] = ()) -> NetworkSpec:
    first = next_address(BLOCK, ())
    assert first is not None
    address = first if alloc == A else next_address(BLOCK, {first})
    assert address is not None
    return NetworkSpec(
        alloc=alloc,
        local_address=address,
        host_side_address=gateway_address(BLOCK),
        mesh_ports=((A_MESH if alloc == A else B_MESH, 15100),),
        static_ports=((A_STATIC, 8080),) if alloc == A else (),
        egress=egress,
        sidecar_uid=SIDECAR,
        workload_uids=(WORKLOAD, 65_536),
        dns_uid=DNS,
    )


async def two(
    node: Lab, networks: AllocationNetworks, *, egress: tuple[str, ...] = ()
) -> tuple[AllocationNetwork, ...]:
    """Two allocations, each with a sidecar's listener; the first's workload is published, the second's is not."""
    a, b = await networks.create(spec(A, egress=egress)), await networks.create(spec(B))
    for each in (a, b):
        node.serve_in(each.namespace, SIDECAR, ("0.0.0.0", 15100), ("198.18.1.0", 15001))
        node.serve_in(each.namespace, WORKLOAD + 5, ("0.0.0.0", 8080))
    return a, b


async def test_a_mesh_port_is_reached_from_other_hosts_the_node_and_sidecars_of_the_node(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks)
    (from_afar,) = node.from_other_host(("tcp", NODE, A_MESH))
    (from_node,) = node.from_node(("tcp", NODE, A_MESH))
    direct, hairpin, away = node.from_inside(
        b.namespace, SIDECAR, ("tcp", a.local_address, 15100), ("tcp", NODE, A_MESH), ("tcp", OTHER_HOST, SERVER_PORT)
    )

    assert told(from_afar) == {"peer": OTHER_HOST, "own": [a.local_address, 15100], "dialled": 15100}
    assert told(from_node)["own"] == [a.local_address, 15100]
    assert told(direct)["peer"] == told(hairpin)["peer"] == b.local_address
    assert told(away)["peer"] == NODE  # what leaves the node carries the node's address


async def test_a_static_port_leads_to_the_workload_and_other_ports_lead_nowhere(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, _ = await two(node, networks)
    published, unpublished = node.from_other_host(("tcp", NODE, A_STATIC), ("tcp", NODE, A_STATIC + 1))

    assert told(published)["own"] == [a.local_address, 8080]
    assert unpublished == "ConnectionRefusedError"


async def test_any_port_of_a_virtual_address_leads_to_its_one_listener(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)
    usual, odd, unknown, udp = node.from_inside(
        a.namespace,
        WORKLOAD,
        ("tcp", "198.18.1.0", 80),
        ("tcp", "198.18.1.0", 6379),
        ("tcp", "198.18.1.1", 80),
        ("udp", "198.18.1.0", 80),
    )

    assert told(usual)["own"] == told(odd)["own"] == ["198.18.1.0", 15001]
    assert (told(usual)["dialled"], told(odd)["dialled"]) == (80, 6379)
    assert (unknown, udp) == ("ConnectionRefusedError", "ConnectionRefusedError")


async def test_a_workload_reaches_nothing_beyond_its_namespace(node: Lab, networks: AllocationNetworks) -> None:
    a, b = await two(node, networks)
    beyond = (
        *((kind, address, SERVER_PORT) for kind in ("tcp", "udp") for address in (NODE, OTHER_HOST)),
        *(("tcp", b.local_address, port) for port in (15100, 8080)),
        ("udp", b.local_address, 15100),
        ("tcp", NODE, B_MESH),
        ("tcp", NODE, A_MESH),
        ("tcp", gateway_address(BLOCK), SERVER_PORT),
        *((kind, address, 0) for kind in ("ping", "raw") for address in (NODE, OTHER_HOST, b.local_address)),
        ("packet", "eth0", 0),
        ("tcp", "::1", 15100),
        ("udp", "fe80::1", 53),
    )
    # The first and the last uid of its range, and one that nobody was given.
    for uid in (WORKLOAD, WORKLOAD + 65_535, WORKLOAD + 65_536):
        outcomes = node.from_inside(a.namespace, uid, *beyond)
        assert [attempt for attempt, outcome in zip(beyond, outcomes, strict=True) if arrived(outcome)] == []


async def test_a_refused_workload_learns_it_at_once(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)

    assert node.from_inside(a.namespace, WORKLOAD, ("tcp", OTHER_HOST, SERVER_PORT)) == ["ConnectionRefusedError"]


async def test_a_workload_cannot_dial_its_own_sidecars_public_listener(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)
    attempts = (("tcp", a.local_address, 15100), ("tcp", "127.0.0.1", 15100), ("tcp", "198.18.9.9", 15100))

    assert node.from_inside(a.namespace, WORKLOAD, *attempts) == ["ConnectionRefusedError"] * 2 + [
        "ConnectionRefusedError"
    ]
    (own,) = node.from_inside(a.namespace, WORKLOAD, ("tcp", "127.0.0.1", 8080))
    assert arrived(own)


async def test_a_workload_in_the_place_of_its_sidecar_answers_nobody(node: Lab, networks: AllocationNetworks) -> None:
    a = await networks.create(spec(A))
    node.serve_in(a.namespace, WORKLOAD, ("0.0.0.0", 15100))

    (outcome,) = node.from_other_host(("tcp", NODE, A_MESH))
    assert not arrived(outcome)


async def test_a_sidecar_reaches_its_workload_and_other_hosts_by_tcp_alone(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks)
    own, away, udp, private = node.from_inside(
        a.namespace,
        SIDECAR,
        ("tcp", "127.0.0.1", 8080),
        ("tcp", OTHER_HOST, SERVER_PORT),
        ("udp", OTHER_HOST, SERVER_PORT),
        ("tcp", b.local_address, 8080),
    )

    assert arrived(own)
    assert arrived(away)
    assert not arrived(udp)
    assert not arrived(private)  # another allocation's workload, however published


async def test_the_node_lets_through_to_mesh_ports_alone_whatever_a_namespaces_own_rules_say(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks)
    for each in (a, b):
        node.run(" ".join((*inside(each.namespace, 0), "nft flush ruleset")))
    node.run(f"{' '.join(node.other_host)} ip route add {b.local_address} via {NODE}")

    attempts = (("tcp", b.local_address, 15100), ("tcp", b.local_address, 8080), ("udp", b.local_address, 8080))
    assert [arrived(outcome) for outcome in node.from_inside(a.namespace, WORKLOAD, *attempts)] == [True, False, False]
    assert [arrived(outcome) for outcome in node.from_other_host(*attempts)] == [True, False, False]


async def test_egress_opens_its_networks_to_the_workload_and_never_other_allocations(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, b = await two(node, networks, egress=("0.0.0.0/0", "10.77.0.0/24"))
    tcp, udp, *others = node.from_inside(
        a.namespace,
        WORKLOAD,
        ("tcp", OTHER_HOST, SERVER_PORT),
        ("udp", OTHER_HOST, SERVER_PORT),
        ("tcp", b.local_address, 15100),
        ("udp", b.local_address, 15100),
        ("tcp", b.local_address, 8080),
    )

    assert arrived(tcp)
    assert arrived(udp)
    assert not any(arrived(outcome) for outcome in others)


async def test_the_responders_user_may_answer_and_start_nothing(node: Lab, networks: AllocationNetworks) -> None:
    a, _ = await two(node, networks)
    outcomes = node.from_inside(
        a.namespace, DNS, ("tcp", "127.0.0.1", 8080), ("udp", "127.0.0.1", 8080), ("tcp", OTHER_HOST, SERVER_PORT)
    )

    assert not any(arrived(outcome) for outcome in outcomes)


async def test_a_port_below_1024_needs_no_capability(node: Lab, networks: AllocationNetworks) -> None:
    a = await networks.create(spec(A))
    node.serve_in(a.namespace, WORKLOAD, ("127.0.0.1", 80))

    assert all(arrived(outcome) for outcome in node.from_inside(a.namespace, WORKLOAD, ("tcp", "127.0.0.1", 80)))


async def test_a_socket_opened_inside_is_inside_and_leaves_the_agent_where_it_was(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, _ = await two(node, networks)
    home = _own_namespace()
    with networks.open_socket(A, socket.SOCK_STREAM) as opened:
        opened.settimeout(2)
        opened.connect(("127.0.0.1", 15100))
        assert told(opened.recv(1000).decode())["own"] == ["127.0.0.1", 15100]
    with networks.open_socket(A, socket.SOCK_STREAM) as away:
        away.settimeout(0.3)
        with pytest.raises(TimeoutError):
            away.connect((OTHER_HOST, SERVER_PORT))

    assert _own_namespace() == home
    with pytest.raises(HostError, match="0c0c0c0c0c"):
        networks.open_socket(AllocId("0c0c0c0c0c"), socket.SOCK_STREAM)
    assert arrived(node.from_inside(a.namespace, WORKLOAD, ("tcp", "127.0.0.1", 8080))[0])


async def test_deleting_is_complete_and_may_be_repeated(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    await networks.create(spec(A))
    b = await networks.create(spec(B))
    await networks.delete(A)
    await networks.delete(A)

    assert await networks.list() == (b,)
    assert mounts_below(tmp_path) == 1
    assert str(A_MESH) not in node.run("nft list ruleset")
    assert await networks.reap(()) == (B,)
    assert node.run("nft list ruleset") == ""
    a = await networks.create(spec(A))  # the same names and addresses again, at once
    assert await networks.list() == (a,)


async def test_a_reserved_namespace_becomes_an_allocations_or_is_reaped(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    reserved = await networks.reserve(AllocId("spare-0a0b0c"))
    unused = await networks.reserve(AllocId("spare-0d0e0f"))
    same = Path(reserved).stat().st_ino
    a = await networks.create(spec(A), reserved=AllocId("spare-0a0b0c"))

    assert Path(a.namespace).stat().st_ino == same
    assert not Path(reserved).exists()
    assert arrived(node.from_inside(a.namespace, SIDECAR, ("tcp", OTHER_HOST, SERVER_PORT))[0])
    assert await networks.list() == (a,)
    assert await networks.reap({A}) == (AllocId("spare-0d0e0f"),)
    assert not Path(unused).exists()
    assert mounts_below(tmp_path) == 1


async def test_the_next_agent_finds_networks_and_mends_flushed_rules(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    a, b = await two(node, networks)
    node.run("nft flush ruleset")
    later = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)

    assert await later.list() == (a, b)
    assert await later.reap({A}) == (B,)
    assert arrived(node.from_other_host(("tcp", NODE, A_MESH))[0])
    assert not arrived(node.from_other_host(("tcp", NODE, B_MESH))[0])
    await later.close()


@pytest.mark.parametrize("written", [1.0, 0.5, 0.0])
async def test_what_a_killed_agent_left_half_made_is_never_adopted(
    node: Lab, networks: AllocationNetworks, tmp_path: Path, written: float
) -> None:
    a = await networks.create(spec(A))
    finished = Path(a.namespace).with_suffix(".json")
    half = finished.read_bytes()[: int(finished.stat().st_size * written)]
    finished.unlink()
    Path(a.namespace).with_suffix(".making").write_bytes(half)
    if written < 1:  # killed while it wrote: nothing else was made yet
        node.run(f"umount {a.namespace}")
        node.run("nft delete table ip outrider_7")
    later = AllocationNetworks(run_directory=tmp_path, node_address=NODE, block=BLOCK)

    assert await later.list() == ()
    assert await later.reap({B}) == (A,)
    assert await later.create(spec(A)) == a
    assert arrived(node.from_inside(a.namespace, SIDECAR, ("tcp", OTHER_HOST, SERVER_PORT))[0])
    await later.close()


async def test_a_path_of_a_smaller_mtu_is_learnt(node: Lab, networks: AllocationNetworks) -> None:
    a = await networks.create(spec(A))
    node.run("ip link set up0 mtu 1300")
    node.from_inside(a.namespace, SIDECAR, ("big", OTHER_HOST, SERVER_PORT))

    assert "mtu 1300" in node.run(" ".join((*inside(a.namespace, 0), "ip route get", OTHER_HOST)))


async def test_a_port_that_another_allocation_holds_is_refused_and_stays_with_it(
    node: Lab, networks: AllocationNetworks
) -> None:
    a, _ = await two(node, networks)
    await networks.delete(B)
    before = links()
    taken = spec(B)
    with pytest.raises(HostError, match=f"{B}.*rules"):
        await networks.create(
            NetworkSpec(
                **{name: getattr(taken, name) for name in taken.__struct_fields__} | {"mesh_ports": ((A_MESH, 15100),)}
            )
        )

    assert await networks.list() == (a,)
    assert links() <= before
    assert told(node.from_other_host(("tcp", NODE, A_MESH))[0])["own"] == [a.local_address, 15100]


async def test_a_network_that_cannot_be_made_leaves_nothing(
    node: Lab, networks: AllocationNetworks, tmp_path: Path
) -> None:
    await networks.create(spec(B))
    with pytest.raises(HostError, match=rf"allocation {A}.*rules"):
        await networks.create(spec(A, egress=("everywhere",)))
    in_the_way = directory(tmp_path / "netns" / A)
    with pytest.raises(HostError, match=f"make the network of {A}"):
        await networks.create(spec(A))
    in_the_way.rmdir()

    assert [network.alloc for network in await networks.list()] == [B]
    assert str(A_MESH) not in node.run("nft list ruleset")
    await networks.create(spec(A))


async def test_an_isolated_namespace_has_no_link(node: Lab, networks: AllocationNetworks) -> None:
    path = await networks.isolated()

    assert await networks.isolated() == path
    assert node.run(" ".join((*inside(path, 0), "ip -br link show up"))) == ""


def _own_namespace() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


def directory(path: Path) -> Path:
    path.mkdir()
    return path
