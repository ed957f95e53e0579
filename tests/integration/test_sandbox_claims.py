"""Numbers that are host-wide are taken once, found again by their owner, and reaped when it is gone."""

from pathlib import Path

import msgspec
import pytest

from agent.claims import UID_BLOCKS, UID_RANGES, Claim, Owner, claim, uid_first
from agent.sandbox.spec import UID_RANGE
from outrider.errors import HostError


def owner(tmp_path: Path, node: str, fleet: str = "dev") -> Owner:
    data = tmp_path / fleet / node
    data.mkdir(parents=True, exist_ok=True)
    return Owner(fleet=fleet, node=node, data_directory=str(data))


def take(tmp_path: Path, who: Owner, kind: str = "uids", count: int = 3) -> Claim:
    return claim(kind, count, owner=who, directory=tmp_path / "claims")


def test_each_owner_and_kind_has_numbers_of_its_own(tmp_path: Path) -> None:
    taken = [
        take(tmp_path, owner(tmp_path, "a")),
        take(tmp_path, owner(tmp_path, "b")),
        take(tmp_path, owner(tmp_path, "a", "x")),
    ]
    other = take(tmp_path, owner(tmp_path, "b"), kind="veth")
    assert [one.number for one in taken] == [0, 1, 2]
    assert other.number == 0
    with pytest.raises(HostError, match="all 3 are taken"):
        take(tmp_path, owner(tmp_path, "d"))
    taken[1].release()
    again = take(tmp_path, owner(tmp_path, "d"))
    assert again.number == 1
    for one in (taken[0], taken[2], again, other):
        one.release()


def test_owner_finds_its_number_again_after_its_end(tmp_path: Path) -> None:
    first, second = take(tmp_path, owner(tmp_path, "a")), take(tmp_path, owner(tmp_path, "b"))
    second.close()
    third = take(tmp_path, owner(tmp_path, "c"))
    again = take(tmp_path, owner(tmp_path, "b"))
    assert (third.number, again.number) == (2, 1)
    for one in (first, third, again):
        one.release()


def test_two_agents_of_one_node_are_refused(tmp_path: Path) -> None:
    first = take(tmp_path, owner(tmp_path, "a"))
    with pytest.raises(HostError, match="another agent of this node runs"):
        take(tmp_path, owner(tmp_path, "a"))
    first.release()


@pytest.mark.parametrize("proof", ["data", "boot"])
def test_number_of_an_owner_that_is_gone_is_reaped(tmp_path: Path, proof: str) -> None:
    who = owner(tmp_path, "a")
    take(tmp_path, who).close()
    later = take(tmp_path, owner(tmp_path, "b"))
    assert later.number == 1  # away is not gone
    later.release()
    if proof == "data":
        Path(who.data_directory).rmdir()
    else:
        path = tmp_path / "claims" / "uids-0.json"
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "boot_id": "another"}))
    reaped = take(tmp_path, owner(tmp_path, "b"))
    assert reaped.number == 0
    reaped.release()


def test_a_living_owner_keeps_its_number_without_its_directory(tmp_path: Path) -> None:
    who = owner(tmp_path, "a")
    first = take(tmp_path, who)
    Path(who.data_directory).rmdir()
    second = take(tmp_path, owner(tmp_path, "b"))
    assert second.number == 1
    first.release()
    second.release()


def test_uid_ranges_are_disjoint_and_fit() -> None:
    assert uid_first(0, 0) > 1 << 20
    assert uid_first(0, UID_RANGES - 1) + UID_RANGE == uid_first(1, 0)
    assert uid_first(UID_BLOCKS - 1, UID_RANGES - 1) + UID_RANGE < 1 << 32
