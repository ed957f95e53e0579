"""Guests that move: one copy, two allocations, and at every moment one of them is the one that is called."""

import msgspec
import pytest

from controller.core import mesh_intent
from controller.core.commands import Reply
from controller.core.events import AllocMoveRequested, NodeSteerRequested
from controller.core.kinds import Kind
from controller.core.state import State
from outrider.ids import AllocId, JobName, NodeId
from outrider.model.allocation import AllocReport, AllocStatus, Assignment, MoveReport, MoveStage
from outrider.model.job import MIB, Driver, GuestFile, Image, ImageKind, Job, Resources
from outrider.model.node import Node
from tests.scenarios.world import World, group, job, node, service

RUNTIMES = {"crun": "1.8.1", "conmon": "2.1.6", "qemu-system-x86_64": "7.2.22"}


def vm_node(name: str, **found: object) -> Node:
    made = node(name, runtimes={**RUNTIMES, **found})
    return msgspec.structs.replace(made, peer_address=f"{made.address}:4000")


def vms(count: int = 1) -> Job:
    plain = group(count=count, services=[service("web")], memory_mib=128)
    kernel = GuestFile(reference="/srv/vmlinux", sha256="a" * 64)
    image = Image(kind=ImageKind.DISK, kernel=kernel)
    (task,) = plain.tasks
    task = msgspec.structs.replace(task, driver=Driver.VM, image=image, command=())
    return job("shop", msgspec.structs.replace(plain, tasks=(task,)))


class Fleet(World):
    """Whose targets hold their guests back until the test says that they came."""

    def __init__(self) -> None:
        super().__init__()
        self.join(vm_node("n1"), vm_node("n2"))
        self.submit(vms())
        (self.old,) = self.agents[self.place()].running
        self.source = self.agents[self.place()]
        self.target = next(agent for agent in self.agents.values() if agent is not self.source)
        self.target.obedient = False

    def place(self) -> NodeId:
        return next(name for name, agent in self.agents.items() if agent.running)

    def move(self, to: str | None = None) -> Reply:
        node_id = NodeId(to) if to else None
        return self.ask(
            lambda request: AllocMoveRequested(request=request, job=JobName("shop"), alloc=self.old, node=node_id)
        )

    def tell(self, stage: MoveStage, to: str, message: str = "") -> None:
        report = self.source.report(self.old)
        move = MoveReport(to=AllocId(to), stage=stage, message=message)
        self.report(self.source, msgspec.structs.replace(report, move=move))

    def wanted(self) -> Assignment:
        return self.source.running[self.old]

    def called(self) -> list[AllocId]:
        """The allocations that callers are sent to."""
        found = (mesh_intent.registration(self.state, name) for name in self.agents)
        return [each.alloc for one in found for each in one.services if each.passing]


def test_a_guest_is_called_where_it_was_until_little_is_left_and_then_where_it_goes() -> None:
    fleet = Fleet()
    reply = fleet.move()
    assert reply.code == ""
    new = AllocId(reply.message)
    assert fleet.wanted().move_to is not None
    assert fleet.wanted().move_to.alloc == new  # type: ignore[union-attr]
    assert not fleet.wanted().move_to.go  # type: ignore[union-attr]
    came = fleet.target.running[new].move_from
    assert came is not None
    assert came.alloc == fleet.old
    assert fleet.called() == [fleet.old]

    fleet.tell(MoveStage.READY, new)
    assert fleet.called() == [new], "whoever calls waits there"
    assert fleet.wanted().move_to.go  # type: ignore[union-attr]

    fleet.target.obedient = True
    fleet.tell(MoveStage.DONE, new)
    fleet.report(fleet.target, fleet.target.report(new))
    assert list(fleet.target.running) == [new]
    assert not fleet.source.running, "what was left behind goes"
    assert fleet.called() == [new]
    assert [event.kind for event in fleet.events if event.kind == Kind.ALLOC_MOVED] == [Kind.ALLOC_MOVED]
    assert not fleet.state.moves
    fleet.wait(60)
    assert list(fleet.target.running) == [new], "nothing else was made of it"


@pytest.mark.parametrize("how", ["the source says no", "the target fails", "the target's node goes down"])
def test_where_it_does_not_come_the_guest_is_called_where_it_was(how: str) -> None:
    fleet = Fleet()
    new = AllocId(fleet.move().message)
    fleet.tell(MoveStage.READY, new)
    assert fleet.called() == [new]
    match how:
        case "the source says no":
            fleet.tell(MoveStage.FAILED, new, "the guest runs on here: no")
        case "the target fails":
            fleet.report(fleet.target, AllocReport(alloc=new, status=AllocStatus.FAILED, message="no guest came"))
        case _:
            fleet.leave(fleet.target.node.id)
            fleet.wait(fleet.policy.disconnect_grace_s + 5)
    assert fleet.called() == [fleet.old]
    assert fleet.wanted().move_to is None
    assert not fleet.state.moves
    assert not fleet.state.live.leaving
    assert len(fleet.source.running) == 1
    fleet.wait(60)
    assert list(fleet.source.running) == [fleet.old], "it is not replaced"


def test_a_new_controller_carries_on_with_a_move() -> None:
    fleet = Fleet()
    new = AllocId(fleet.move().message)
    fleet.begin()
    assert list(fleet.state.moves.values()) == [fleet.state.serial(fleet.old)]
    snapshot = State.empty(fleet.policy)
    for record in fleet.state.snapshot():
        snapshot.apply(record)
    assert snapshot.moves == fleet.state.moves
    fleet.join(*(agent.node for agent in fleet.agents.values()))
    fleet.tell(MoveStage.READY, new)
    assert fleet.called() == [new]
    fleet.stop("shop")
    assert not fleet.source.running
    assert not fleet.target.running
    assert not fleet.state.moves


def test_a_new_version_ends_a_move_under_way() -> None:
    fleet = Fleet()
    fleet.move()
    fleet.target.obedient = True
    changed = vms()
    (only,) = changed.groups
    (task,) = only.tasks
    changed = job(
        "shop",
        msgspec.structs.replace(
            only, tasks=(msgspec.structs.replace(task, resources=Resources(memory_bytes=256 * MIB)),)
        ),
    )
    fleet.submit(changed)
    fleet.wait(30)
    running = [one.job_version for agent in fleet.agents.values() for one in agent.running.values()]
    assert running == [2]
    assert not fleet.state.moves


def test_what_cannot_move_says_why() -> None:
    fleet = Fleet()
    assert "no node 'n9'" in fleet.move("n9").message
    assert f"it runs on {fleet.source.node.id} already" in fleet.move(fleet.source.node.id).message
    fleet.move()
    assert "it moves already" in fleet.move().message
    plain = World()
    plain.join(vm_node("n1"), vm_node("n2"))
    plain.submit(job("shop", group()))
    (alloc,) = (alloc for agent in plain.agents.values() for alloc in agent.running)
    reply = plain.ask(lambda request: AllocMoveRequested(request=request, job=JobName("shop"), alloc=alloc))
    assert "it is a process" in reply.message


def test_between_nodes_that_differ_it_stops_and_starts_with_the_reason() -> None:
    world = World()
    world.join(vm_node("n1"))
    world.submit(vms())
    (old,) = world.agents[NodeId("n1")].running
    world.join(vm_node("n2", **{"qemu-system-x86_64": "9.0.1"}))

    def move(to: str | None) -> Reply:
        where = NodeId(to) if to else None
        return world.ask(
            lambda request: AllocMoveRequested(request=request, job=JobName("shop"), alloc=old, node=where)
        )

    assert move(None).code == "not-movable", "nobody asked for a stop"
    reply = move("n2")
    assert reply.code == ""
    assert reply.warnings == ("it stops here and starts there, with a new disk: QEMU 7.2 on n1, 9.0 on n2",)
    assert list(world.agents[NodeId("n2")].running) == [reply.message]
    assert not world.agents[NodeId("n1")].running


def test_what_was_left_behind_goes_also_where_the_guest_is_called_well_some_time_after_it_came() -> None:
    fleet = Fleet()
    fleet.wait(30)  # the rollout is over
    new = AllocId(fleet.move().message)
    fleet.tell(MoveStage.READY, new)
    fleet.tell(MoveStage.DONE, new)
    fleet.wait(3)
    fleet.report(fleet.target, fleet.target.report(new))
    assert not fleet.source.running
    assert fleet.called() == [new]


def test_a_drained_node_s_guest_moves_while_it_runs_and_starts_anew_where_that_fails() -> None:
    fleet = Fleet()
    fleet.target.obedient = False
    name = fleet.source.node.id
    fleet.call(NodeSteerRequested, node=name, eligible=False, drain=True)
    (new,) = fleet.target.running
    assert fleet.target.running[new].move_from is not None
    fleet.target.obedient = True
    fleet.tell(MoveStage.FAILED, new, "the guest runs on here: no")
    fleet.wait(30)
    (anew,) = fleet.target.running
    assert anew != new
    assert fleet.target.running[anew].move_from is None
    assert not fleet.source.running
    told = [event.message for event in fleet.events if event.kind == Kind.ALLOC_STAYED]
    assert told[-1] == "a new one starts elsewhere instead: the guest runs on here: no"
