"""Rows move when forgotten ones are squeezed out; serials find them all the same."""

import msgspec
import numpy as np
import pytest

from controller.core import table as columns
from controller.core import views
from controller.core.state import State
from controller.core.table import AllocTable
from controller.core.volatile import Timers
from outrider.ids import JobName
from outrider.model.allocation import AllocStatus
from tests.scenarios.world import World, group, job, node


def test_rows_are_found_by_serial_before_and_after_a_squeeze() -> None:
    table = AllocTable()
    table.add(100, 0, 0, np.full(10_000, -1, np.int32), 1.0)
    assert table.row(100) == 0
    assert table.row(99) is None
    assert table.row(10_100) is None
    table.forget(np.arange(9_000))
    assert table.size == 1_000
    assert table.row(100) is None
    assert table.row(9_100) == 0
    table.add(10_200, 1, 5, np.zeros(2, np.int32), 2.0)
    found = table.rows(np.array([9_101, 10_201]))
    assert table.index[found].tolist() == [9_001, 6]
    assert table.row(10_150) is None, "a gap between serials"


def test_a_forgotten_row_is_not_found_even_before_the_squeeze() -> None:
    table = AllocTable()
    table.add(0, 0, 0, np.zeros(3, np.int32), 1.0)
    table.forget(np.array([1]))
    assert table.row(1) is None
    assert table.row(2) == 2
    assert table.status[1] == columns.FORGOTTEN


def test_a_large_job_that_was_stopped_leaves_a_few_rows_and_the_rest_of_the_fleet_alone() -> None:
    world = World()
    world.submit(job("large", group(count=6_000)))
    world.submit(job("shop", group(count=3)))
    world.stop("large")
    assert world.state.table.size < 6_000
    world.join(node("n1"))
    shop = views.allocations(world.state, job=JobName("shop"))
    assert [(one.index, one.status) for one in shop] == [(at, AllocStatus.RUNNING) for at in range(3)]
    assert len(views.allocations(world.state, job=JobName("large"), terminal=True)) == 5
    replayed = State.empty()
    for record in world.journal:
        replayed.apply(record)
    pack = msgspec.msgpack.encode
    assert pack(list(replayed.snapshot())) == pack(list(world.state.snapshot()))


def test_a_timer_moves_is_cancelled_and_fires_once() -> None:
    timers = Timers()
    timers.set(("job", "a"), 5.0)
    timers.set(("job", "b"), 3.0)
    timers.set(("job", "a"), 1.0)
    timers.set_earlier(("job", "b"), 4.0)
    assert timers.next_s == 1.0
    assert timers.pop_due(0.5) is None
    assert timers.pop_due(10.0) == ("job", "a")
    assert timers.next_s == 3.0
    timers.cancel(("job", "b"))
    assert timers.next_s is None
    assert timers.pop_due(10.0) is None


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_a_snapshot_of_any_size_restores(copies: int) -> None:
    world = World()
    world.join(node("n1"))
    if copies:
        world.submit(job("shop", group(count=copies)))
    restored = State.empty()
    for record in world.state.snapshot():
        restored.apply(record)
    assert [one.id for one in views.allocations(restored)] == [one.id for one in views.allocations(world.state)]
    assert restored.next_serial == copies
