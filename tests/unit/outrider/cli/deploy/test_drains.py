"""What is asked of the fleet before a node's host is removed."""

import asyncio
from collections.abc import Mapping

import pytest

from outrider.cli.deploy.fleet import Seen, empty
from outrider.errors import RefusedError


class Fleet:
    """Two looks after its drain began a node is empty, if it ever is."""

    def __init__(self, statuses: dict[str, str], *, empties: bool = True) -> None:
        self.statuses, self.empties = statuses, empties
        self.asked: list[tuple[str, str, float | None]] = []
        self._looks = 0

    async def answers(self) -> None: ...

    async def join_token(self, node: str) -> str:
        raise AssertionError(f"nothing joins: {node}")

    async def authorities(self) -> frozenset[str]:
        return frozenset()

    async def node(self, node: str) -> Seen:
        self._looks += 1
        draining = self._looks < 2 or not self.empties
        there = frozenset({"a1"} if draining else ())
        return Seen(status=self.statuses[node], version="", reason="", allocations=there, draining=draining)

    async def nodes(self) -> Mapping[str, str]:
        return self.statuses

    async def close(self, node: str) -> None:
        self.asked.append(("close", node, None))

    async def drain(self, node: str, deadline_s: float | None) -> None:
        self.asked.append(("drain", node, deadline_s))

    async def revoke(self, node: str) -> None:
        self.asked.append(("revoke", node, None))


def emptied(fleet: Fleet, *leaving: str, deadline_s: float | None = 60.0) -> list[str]:
    told: list[str] = []
    work = empty(fleet, leaving[0], leaving=frozenset(leaving), deadline_s=deadline_s, tell=told.append)
    asyncio.run(work)
    return told


def test_work_leaves_with_care_while_another_node_can_take_it() -> None:
    fleet = Fleet({"h1": "ready", "h2": "ready"})
    assert emptied(fleet, "h1") == ["drain"]
    assert fleet.asked == [("drain", "h1", 60.0)]


def test_the_last_nodes_of_a_fleet_are_not_waited_for() -> None:
    fleet = Fleet({"h1": "ready", "h2": "ready", "h3": "gone"})
    assert emptied(fleet, "h1", "h2") == ["drain at once: no other node is left"]
    assert fleet.asked == [("drain", "h1", 0.0)]


def test_a_node_that_is_away_is_drained_and_not_waited_for() -> None:
    fleet = Fleet({"h1": "suspect", "h2": "ready"}, empties=False)
    assert emptied(fleet, "h1") == ["drain at once: it is suspect"]
    assert fleet.asked == [("drain", "h1", 0.0)]


def test_a_host_that_never_joined_has_nothing_to_drain() -> None:
    fleet = Fleet({"h2": "ready"})
    assert emptied(fleet, "h1") == []
    assert fleet.asked == []


def test_a_node_that_does_not_empty_is_told_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.cli.deploy.fleet.DRAIN_SLACK_S", 0.0)
    with pytest.raises(RefusedError, match=r"node h1 is not empty .* a1; see `outrider node status h1`"):
        emptied(Fleet({"h1": "ready", "h2": "ready"}, empties=False), "h1", deadline_s=0.6)
