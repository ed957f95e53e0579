"""Guests that move between two real agents while they run, and whatever breaks off meanwhile. Real QEMU throughout."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from examples.vm import guest as example
from outrider.ids import AllocId, NodeId
from outrider.model.allocation import AllocStatus, Assignment, Desired, Move, MoveReport, MoveStage
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.machines import BOOT_S, GUEST, emulators, image, logs, machine, ran
from tests.integration.network_lab import Lab, node
from tests.integration.processes import until

__all__ = ["node"]
pytestmark = [pytest.mark.host, pytest.mark.timeout(400)]

THERE = AllocId("00000000a2")


@pytest.fixture(scope="module")
def built() -> Path:
    return example.build()


@pytest.fixture
async def pair(node: Lab) -> AsyncIterator[tuple[AgentFleet, AgentFleet]]:  # noqa: ARG001 - where this thread lives
    """Two nodes of one fleet, each with a scripted controller of its own."""
    async with agent_fleet() as source, agent_fleet(ca=source.ca) as target:
        yield source, target


def leaving(wish: Assignment, target: AgentFleet, *, go: bool = False) -> Assignment:
    address = target.controller.hellos[-1].node.peer_address
    return msgspec.structs.replace(
        wish, move_to=Move(alloc=THERE, node=NodeId(target.run.name), address=address, go=go)
    )


def coming(wish: Assignment, source: AgentFleet) -> Assignment:
    came = Move(alloc=GUEST, node=NodeId(source.run.name), address="")
    return msgspec.structs.replace(wish, alloc=THERE, move_from=came)


def stage(fleet: AgentFleet) -> MoveStage | None:
    report = fleet.controller.reports.get(GUEST)
    return report.move.stage if report is not None and report.move is not None else None


async def booted(fleet: AgentFleet, wish: Assignment) -> None:
    await fleet.start()
    fleet.controller.mesh()
    fleet.controller.assign(wish, full=True)
    async with asyncio.timeout(BOOT_S):
        while fleet.controller.status(GUEST) is not AllocStatus.RUNNING or (await ran(fleet, "true"))[1:] != (0, ""):  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def test_a_guest_moves_with_its_memory_and_its_disk(pair: tuple[AgentFleet, AgentFleet], built: Path) -> None:
    source, target = pair
    wish = machine(image(built, built / "disk.qcow2"), GUEST, attempts=3)
    await asyncio.gather(booted(source, wish), target.start())
    target.controller.mesh()
    note = "echo moved > /disk; sync; mount -t tmpfs t /tmp; echo moved > /tmp/memory"
    assert await ran(source, "sh", "-c", note) == (b"", 0, "")

    target.controller.assign(coming(wish, source), full=True)
    source.controller.assign(leaving(wish, target))
    await until(lambda: stage(source) in (MoveStage.READY, MoveStage.FAILED), "copied", timeout_s=BOOT_S)
    assert source.controller.reports[GUEST].move == MoveReport(to=THERE, stage=MoveStage.READY)
    source.controller.assign(leaving(wish, target, go=True))
    await until(lambda: stage(source) in (MoveStage.DONE, MoveStage.FAILED), "moved", timeout_s=BOOT_S)
    move = source.controller.reports[GUEST].move
    assert move is not None
    assert move.stage is MoveStage.DONE, move.message
    assert move.downtime_ms < 5000
    await until(lambda: target.controller.status(THERE) is AllocStatus.RUNNING, "runs there")
    assert (await ran(target, "sh", "-c", "cat /disk /tmp/memory", alloc=THERE))[0] == b"moved\nmoved\n"
    assert "guest serves" not in await logs(target, THERE), "it did not boot"

    source.controller.assign(msgspec.structs.replace(wish, desired=Desired.STOP))
    await until(lambda: source.controller.status(GUEST) is AllocStatus.COMPLETE, "gone from here", timeout_s=30)
    assert not emulators(source)
    assert not list((source.data / "allocations" / GUEST).glob("*.vm"))
    (emulator,) = emulators(target)
    target.kill(signal.SIGKILL)
    await target.start()
    target.controller.assign(coming(wish, source), full=True)
    await until(lambda: target.controller.status(THERE) is AllocStatus.RUNNING, "adopted")
    assert emulators(target) == [emulator]
    os.kill(emulator, signal.SIGKILL)
    await until(lambda: target.controller.reports[THERE].tasks[0].restarts == 1, "seen")
    async with asyncio.timeout(BOOT_S):
        while "guest serves" not in await logs(target, THERE):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert (await ran(target, "cat", "/disk", alloc=THERE))[0] == b"moved\n", "its disk is here"


@pytest.mark.parametrize(
    "victim",
    [
        "target emulator",
        *(pytest.param(each, marks=pytest.mark.deep) for each in ("target agent", "source agent", "source emulator")),
    ],
)
async def test_where_a_move_breaks_off_the_guest_stays_where_it_was(
    pair: tuple[AgentFleet, AgentFleet], built: Path, victim: str
) -> None:
    source, target = pair
    wish = machine(image(built, built / "disk.qcow2"), GUEST, attempts=3)
    await asyncio.gather(booted(source, wish), target.start())
    target.controller.mesh()
    (emulator,) = emulators(source)
    target.controller.assign(coming(wish, source), full=True)
    source.controller.assign(leaving(wish, target))
    await until(lambda: stage(source) in (MoveStage.READY, MoveStage.FAILED), "copied", timeout_s=BOOT_S)
    assert source.controller.reports[GUEST].move == MoveReport(to=THERE, stage=MoveStage.READY)

    match victim:
        case "target emulator":
            os.kill(emulators(target)[0], signal.SIGKILL)
        case "target agent":
            target.kill(signal.SIGKILL)
        case "source agent":
            source.kill(signal.SIGKILL)
            await source.start()
            source.controller.assign(wish, full=True)
        case "source emulator":
            os.kill(emulator, signal.SIGKILL)
    if victim.startswith("target"):
        source.controller.assign(leaving(wish, target, go=True))
        await until(lambda: stage(source) is MoveStage.FAILED, "told", timeout_s=BOOT_S)
        report = source.controller.reports[GUEST].move
        assert report is not None
        assert "the guest runs on here" in report.message
    if victim == "target agent":
        await target.start()
        target.controller.assign(coming(wish, source), full=True)
    if victim == "source emulator":
        await until(lambda: source.controller.reports[GUEST].tasks[0].restarts == 1, "seen")
    else:
        assert emulators(source) == [emulator]
        async with asyncio.timeout(20):
            while (await ran(source, "echo", "awake"))[0] != b"awake\n":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    await until(lambda: target.controller.status(THERE) is AllocStatus.FAILED, "did not come", timeout_s=120)
    assert not emulators(target)
