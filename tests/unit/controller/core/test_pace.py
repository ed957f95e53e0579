"""How often agents beat, and how long silence is no sign: in proportion to each other, slower in a large fleet."""

import pytest

from controller.core import pace
from controller.core.policy import Policy
from outrider.model.node import NodeStatus
from tests.scenarios.world import World, node


def grown(size: int, **more: float) -> World:
    world = World(Policy(fastest_nodes_max=5, **more))
    world.join(*(node(f"n{number}") for number in range(size)))
    world.wait(2.0)
    return world


def test_a_small_fleet_beats_fastest() -> None:
    world = grown(5)
    assert pace.heartbeat_interval_s(world.state) == world.policy.heartbeat_interval_s
    assert pace.silence_s(world.state) == world.policy.suspect_after_s


def test_a_large_fleet_beats_slower_and_is_given_longer() -> None:
    world = grown(50)
    interval_s = pace.heartbeat_interval_s(world.state)
    assert interval_s == pytest.approx(0.3 * 10**0.7)
    assert pace.silence_s(world.state) == pytest.approx(interval_s * 0.8 / 0.3)


def test_at_five_thousand_nodes_silence_is_seen_within_four_seconds() -> None:
    policy = Policy()
    interval_s = policy.heartbeat_interval_s * (5000 / policy.fastest_nodes_max) ** 0.7
    assert interval_s * policy.suspect_after_s / policy.heartbeat_interval_s <= 4.01


def test_a_fleet_that_shrinks_does_not_suspect_those_who_still_beat_slowly() -> None:
    world = grown(50, brake_share=1.0)
    before_s = pace.silence_s(world.state)
    for number in range(10, 50):
        world.leave(f"n{number}")
    world.wait(world.policy.disconnect_grace_s - 1.0)
    assert pace.silence_s(world.state) == before_s, "they may come back at any moment"
    world.wait(20.0)
    assert pace.silence_s(world.state) < before_s
    here = [world.state.live.links[world.state.nodes.reference[node(f"n{n}").id]] for n in range(10)]
    assert all(link.status is NodeStatus.READY for link in here)


def test_those_who_return_first_to_a_new_controller_leave_it_room_to_welcome_the_others() -> None:
    world = grown(50)
    before_s = pace.heartbeat_interval_s(world.state)
    world.begin()
    world.join(*(node(f"n{number}") for number in range(40)))
    assert pace.heartbeat_interval_s(world.state) == pytest.approx(3 * before_s)
    assert pace.silence_s(world.state) == pytest.approx(3 * before_s * 0.8 / 0.3)
    world.join(*(node(f"n{number}") for number in range(40, 50)))
    world.wait(30.0)
    assert pace.heartbeat_interval_s(world.state) == before_s
    assert pace.silence_s(world.state) < 3 * before_s * 0.8 / 0.3, "and less with each look"


def test_a_small_fleet_that_returns_beats_fastest() -> None:
    world = grown(5)
    world.begin()
    world.join(node("n0"))
    assert pace.heartbeat_interval_s(world.state) == world.policy.heartbeat_interval_s
