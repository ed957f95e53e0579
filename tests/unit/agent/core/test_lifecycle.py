"""The table of phases, and the diagram made of it."""

import pytest

from agent.core.lifecycle import TRANSITIONS, Phase, check_transition, mermaid


def test_every_phase_can_be_reached_and_leads_to_the_end() -> None:
    reached, grown = {Phase.PREPARING}, True
    while grown:
        followers = {after for before in reached for after in TRANSITIONS[before]}
        grown = not followers <= reached
        reached |= followers
    assert reached == set(Phase)
    assert [phase for phase in Phase if not TRANSITIONS[phase]] == [Phase.ENDED]


def test_tasks_start_only_after_the_sidecar_and_the_sidecar_ends_only_after_the_tasks() -> None:
    assert Phase.TASKS_STARTING not in TRANSITIONS[Phase.BACKOFF]
    before_sidecar_stop = {before for before, followers in TRANSITIONS.items() if Phase.SIDECAR_STOPPING in followers}
    assert Phase.DRAINING not in before_sidecar_stop


def test_a_change_that_is_not_in_the_table_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="running -> preparing"):
        check_transition(Phase.RUNNING, Phase.PREPARING)


def test_the_diagram_has_every_change() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 3 + sum(len(followers) for followers in TRANSITIONS.values())
