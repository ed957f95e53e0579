"""Events are numbered, kept, told in order; a listener that does not keep up is ended, never silently skipped."""

import contextlib

import pytest

from controller import event_log
from controller.event_log import EventLog
from outrider.errors import RefusedError
from outrider.model.fleet import FleetEvent


def _event(number: int) -> FleetEvent:
    return FleetEvent(kind="node.ready", node=f"n{number}")


async def test_a_listener_gets_what_is_kept_and_then_what_comes_in_order() -> None:
    log = EventLog()
    log.publish(_event(1))
    async with contextlib.aclosing(log.follow(0)) as events:
        first = await anext(events)
        log.publish(_event(2))
        second = await anext(events)
        assert (first.node, second.node, log.listeners) == ("n1", "n2", 1)
        assert second.sequence == first.sequence + 1
    assert log.listeners == 0
    assert log.kept(after=first.sequence) == (second,)


async def test_a_slow_listener_is_ended() -> None:
    log = EventLog()
    log.publish(_event(0))
    async with contextlib.aclosing(log.follow(0)) as events:
        await anext(events)
        for number in range(event_log.LISTENER_EVENTS_MAX + 1):
            log.publish(_event(number))
        with pytest.raises(RefusedError, match="follow again") as caught:
            await anext(events)
    assert caught.value.code == "slow-listener"


async def test_listeners_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "LISTENERS_MAX", 0)
    with pytest.raises(RefusedError, match="end one"):
        await anext(EventLog().follow(0))


def test_sequences_grow_over_a_restart() -> None:
    log = EventLog()
    log.publish(_event(1))
    again = EventLog()
    again.publish(_event(2))
    assert again.kept(0)[0].sequence >= log.kept(0)[0].sequence
