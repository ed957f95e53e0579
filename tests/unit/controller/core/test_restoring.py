"""After a snapshot was restored: epochs go on, no id is given twice, and what nobody knows is kept, not killed."""

from controller.core.commands import SendAssignments
from controller.core.restoring import restored
from outrider.ids import AllocId
from outrider.model.allocation import Generation
from tests.scenarios.world import World, group, job, node


def moved_on() -> tuple[World, frozenset[AllocId]]:
    """A fleet that took a snapshot with one job, and then started another, which the snapshot does not know."""
    world = World()
    world.join(node("n1"))
    world.submit(job("old", group()))
    saved = tuple(world.state.snapshot())
    known = frozenset(world.agents[node("n1").id].running)
    world.submit(job("new", group()))
    strangers = frozenset(world.agents[node("n1").id].running) - known
    assert len(strangers) == 1
    now = world.state
    world.journal = list(restored(saved, world.policy, epoch=now.epoch, next_serial=now.next_serial))
    world.begin()
    world.commands.clear()
    return world, strangers


def test_generations_go_on_beyond_what_any_agent_has_heard() -> None:
    world, _ = moved_on()
    before = world.agents[node("n1").id].acknowledged
    world.join(node("n1"))
    assert world.agents[node("n1").id].acknowledged > before
    assert world.state.epoch > before.epoch


def test_what_runs_and_is_not_known_is_kept() -> None:
    world, strangers = moved_on()
    world.join(node("n1"))
    assert strangers == world.state.live.unclaimed.keys()
    sent = [command for command in world.commands if isinstance(command, SendAssignments)]
    assert sent
    for command in sent:
        assert not command.full, "a full set would end what it does not name"
        assert not strangers & ({one.alloc for one in command.assignments} | set(command.removed))
    assert strangers <= world.agents[node("n1").id].running.keys()


def test_no_id_is_given_twice() -> None:
    world, strangers = moved_on()
    world.join(node("n1"))
    world.submit(job("third", group(count=3)))
    running = world.agents[node("n1").id].running
    assert len(running) == 5
    assert not strangers & {alloc for alloc, one in running.items() if one.job == "third"}


def test_it_holds_after_another_restart() -> None:
    world, strangers = moved_on()
    world.join(node("n1"))
    world.journal = list(world.state.snapshot())  # compacted meanwhile
    world.begin()
    world.join(node("n1"))
    assert strangers == world.state.live.unclaimed.keys()


def test_a_node_without_strangers_is_still_told_the_whole() -> None:
    world, _ = moved_on()
    world.join(node("n2"))
    sent = [one for one in world.commands if isinstance(one, SendAssignments) and one.node == "n2"]
    assert sent[0].full
    assert sent[0].generation > Generation()
