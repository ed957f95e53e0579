"""Addresses of a node's block, and the elements and rules that follow from a spec."""

from ipaddress import IPv4Network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.network.plan import (
    BLOCKS,
    NetworkSpec,
    block_network,
    block_of,
    gateway_address,
    namespace_rules,
    next_address,
    node_elements,
    node_rules,
)
from outrider.ids import AllocId

BLOCK = 5
SPEC = NetworkSpec(
    alloc=AllocId("0a0a0a0a0a"),
    local_address="100.64.20.9",
    host_side_address="100.64.20.1",
    mesh_ports=((20_001, 15_100), (20_002, 15_101)),
    static_ports=((8081, 8080),),
    sidecar_uid=1000,
    workload_uids=(65_536, 131_072),
)


@given(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1))
def test_blocks_do_not_overlap_and_stay_in_the_shared_range(one: int, other: int) -> None:
    first, second = IPv4Network(block_network(one)), IPv4Network(block_network(other))
    assert first.subnet_of(IPv4Network("100.64.0.0/10"))
    assert first.overlaps(second) == (one == other)


@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_a_block_that_does_not_exist_is_an_error(block: int) -> None:
    with pytest.raises(ValueError, match="address block"):
        block_network(block)


@pytest.mark.parametrize("block", [0, BLOCKS - 1])
def test_a_block_gives_every_address_once_and_then_says_that_none_is_left(block: int) -> None:
    taken: set[str] = set()
    last = None
    while (address := next_address(block, taken, last)) is not None:
        assert block_of(address) == block_network(block)
        assert address not in taken
        taken.add(address)
        last = address
    assert gateway_address(block) not in taken
    assert len(taken) == 1021


def test_a_freed_address_is_not_given_out_again_while_others_were_never_used() -> None:
    first = next_address(BLOCK, ())
    assert first is not None
    second = next_address(BLOCK, (), first)
    assert second not in (None, first)
    assert next_address(BLOCK, (), "100.64.23.254") == first


def test_an_allocation_is_a_few_elements_of_the_nodes_table() -> None:
    assert node_elements(SPEC, block=BLOCK) == (
        "ip outrider_5 ports { 20001 : 100.64.20.9 . 15100 }",
        "ip outrider_5 ports { 20002 : 100.64.20.9 . 15101 }",
        "ip outrider_5 ports { 8081 : 100.64.20.9 . 8080 }",
        "ip outrider_5 public { 100.64.20.9 . 15100 }",
        "ip outrider_5 public { 100.64.20.9 . 15101 }",
    )


def test_the_nodes_rules_name_no_allocation() -> None:
    rules = node_rules(block=BLOCK, node_address="10.0.0.1")
    assert "100.64.20.0/22" in rules
    assert "100.64.20.9" not in rules


def test_whoever_is_not_told_apart_by_uid_starts_nothing() -> None:
    output = [
        line.split(" output ", 1)[1]
        for line in namespace_rules(SPEC).splitlines()
        if "rule" in line and " output " in line
    ]
    # In this order: each accept is behind a uid, and the one for packets without an owner comes after the last refusal.
    assert output == [
        "oifname lo goto loopback",
        "meta skuid 1000 meta l4proto tcp accept",
        "meta skuid 65536-196607 ct direction reply tcp sport { 8080 } accept",
        "meta skuid 65536-196607 meta l4proto tcp counter name refused reject with tcp reset",
        "meta skuid 65536-196607 counter name refused reject with icmpx admin-prohibited",
        "meta skuid != { 0 } drop",
        "ct state established,related accept",
    ]


def test_egress_excludes_the_nodes_other_allocations() -> None:
    opened = msgspec.structs.replace(SPEC, egress=("10.0.0.0/8",))
    assert "meta skuid 65536-196607 ip daddr != 100.64.20.0/22 ip daddr { 10.0.0.0/8 } accept" in namespace_rules(
        opened
    )
