"""The fleet's scaling settles, stays within bounds and does not flap, whatever the load does."""

import itertools
import math
from collections.abc import Callable

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import scaling
from outrider.ids import JobName
from outrider.model.job import ScalingMetric, ScalingPolicy
from tests.scenarios.world import World, group, job, node

COOLDOWN_S = 12.0
policies = st.builds(
    ScalingPolicy,
    count_min=st.integers(1, 3),
    count_max=st.integers(3, 12),
    metric=st.just(ScalingMetric.CPU),
    target=st.floats(1.0, 100.0),
    cooldown_s=st.just(COOLDOWN_S),
)


def history(
    policy: ScalingPolicy, seconds: int, load: Callable[[float], float]
) -> tuple[World, list[tuple[float, int]]]:
    """When the count changed, and to what, under a load over time that the copies share."""
    world = World()
    world.join(node("n1", cpu_millis=100_000))
    world.submit(job("web", msgspec.structs.replace(group(count=policy.count_min), scaling=policy)))
    begin_s = world.now_s
    counts = [(0.0, policy.count_min)]
    for _ in range(seconds):
        world.loads["web"] = load(world.now_s - begin_s)
        world.wait(1.0)
        count = world.state.jobs[JobName("web")].job.groups[0].count
        if count != counts[-1][1]:
            counts.append((world.now_s - begin_s, count))
    return world, counts


@settings(max_examples=40, deadline=None)
@given(policies, st.floats(0.0, 1500.0))
def test_a_constant_load_gets_the_copies_that_it_needs_and_then_nothing_changes(
    policy: ScalingPolicy, load: float
) -> None:
    _, counts = history(policy, 60, lambda _: load)
    count = counts[-1][1]
    assert policy.count_min <= count <= policy.count_max
    assert load / count <= policy.target * (1 + scaling.TOLERANCE) * 1.001 or count == policy.count_max
    assert load / count >= policy.target * (1 - scaling.TOLERANCE) * 0.999 or count in {
        policy.count_min,
        math.ceil(load / policy.target),
    }
    assert len({later > earlier for (_, earlier), (_, later) in itertools.pairwise(counts)}) <= 1, counts
    assert counts[-1][0] < 45, "it settles"


@settings(max_examples=20, deadline=None)
@given(policies, st.floats(10.0, 1000.0), st.lists(st.floats(-0.08, 0.08), min_size=20, max_size=20))
def test_noise_within_the_tolerance_makes_no_copies_come_and_go(
    policy: ScalingPolicy, load: float, noise: list[float]
) -> None:
    _, counts = history(policy, 80, lambda at_s: load * (1 + noise[int(at_s) % len(noise)]))
    turns = [later > earlier for (_, earlier), (_, later) in itertools.pairwise(counts)]
    assert sum(first != second for first, second in itertools.pairwise(turns)) <= 1, counts


@settings(max_examples=20, deadline=None)
@given(policies, st.lists(st.floats(0.0, 2000.0), min_size=4, max_size=8))
def test_whatever_the_load_changes_keep_their_distance_and_bounds(policy: ScalingPolicy, loads: list[float]) -> None:
    world, counts = history(policy, 80, lambda at_s: loads[int(at_s / 13) % len(loads)])
    assert all(policy.count_min <= count <= policy.count_max for _, count in counts)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(counts)]
    assert all(gap >= COOLDOWN_S - 1.5 for gap in gaps), counts
    told = [event.message for event in world.events if event.kind == "job.scaled"]
    assert len(told) == len(counts) - 1, "each change with its reason"
    assert all("each, wanted" in message for message in told)


@given(policies, st.integers(1, 12), st.floats(0.0, 1e6))
def test_a_wish_is_within_bounds_and_enough(policy: ScalingPolicy, count: int, mean: float) -> None:
    wanted = scaling.wish(policy, count, mean)
    assert policy.count_min <= wanted <= policy.count_max
    assert wanted == policy.count_max or mean * count / wanted <= policy.target * (1 + scaling.TOLERANCE) * 1.001
