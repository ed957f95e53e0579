"""Guests that move between two real agents while they run, and whatever breaks off meanwhile. Real QEMU throughout."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from outrider.ids import AllocId, NodeId, SecretName
from outrider.model.allocation import AllocStatus, Assignment, Desired, Move, MoveReport, MoveStage
from outrider.model.belongings import SecretUse
from outrider.model.job import MIB
from tests.integration.agent_fleet import AgentFleet, agent_fleet
from tests.integration.machines import BOOT_S, GUEST, built, emulators, image, logs, machine, ran
from tests.integration.network_lab import Lab, node
from tests.integration.processes import until

__all__ = ["built", "node"]
pytestmark = [pytest.mark.host, pytest.mark.timeout(400)]

THERE = AllocId("00000000a2")


@pytest.fixture
async def pair(node: Lab) -> AsyncIterator[tuple[AgentFleet, AgentFleet]]:  # noqa: ARG001 - where this thread lives
    """Two nodes of one fleet, each with a scripted controller of its own."""
    async with agent_fleet() as source, agent_fleet(ca=source.ca) as target:
        yield source, target


def leaving(wish: Assignment, target: AgentFleet, *, go: bool = False, there: AllocId = THERE) -> Assignment:
    address = target.controller.hellos[-1].node.peer_address
    return msgspec.structs.replace(
        wish, move_to=Move(alloc=there, node=NodeId(target.run.name), address=address, go=go)
    )


def coming(wish: Assignment, source: AgentFleet, there: AllocId = THERE) -> Assignment:
    came = Move(alloc=GUEST, node=NodeId(source.run.name), address="")
    return msgspec.structs.replace(wish, alloc=there, move_from=came)


def stage(fleet: AgentFleet, there: AllocId = THERE) -> MoveStage | None:
    report = fleet.controller.reports.get(GUEST)
    move = report.move if report is not None else None
    return move.stage if move is not None and move.to == there else None


async def booted(fleet: AgentFleet, wish: Assignment) -> None:
    await fleet.start()
    fleet.controller.mesh()
    fleet.controller.assign(wish, full=True)
    async with asyncio.timeout(BOOT_S):
        while fleet.controller.status(GUEST) is not AllocStatus.RUNNING or (await ran(fleet, "true"))[1:] != (0, ""):  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def moved(source: AgentFleet, target: AgentFleet, wish: Assignment, there: AllocId = THERE) -> float:
    """The downtime in ms."""
    target.controller.assign(coming(wish, source, there), full=True)
    source.controller.assign(leaving(wish, target, there=there))
    await until(lambda: stage(source, there) in (MoveStage.READY, MoveStage.FAILED), "copied", timeout_s=BOOT_S)
    assert source.controller.reports[GUEST].move == MoveReport(to=there, stage=MoveStage.READY)
    source.controller.assign(leaving(wish, target, go=True, there=there))
    await until(lambda: stage(source, there) in (MoveStage.DONE, MoveStage.FAILED), "moved", timeout_s=BOOT_S)
    move = source.controller.reports[GUEST].move
    assert move is not None
    assert move.stage is MoveStage.DONE, move.message
    await until(lambda: target.controller.status(there) is AllocStatus.RUNNING, "runs there")
    return move.downtime_ms


def with_secret(wish: Assignment) -> Assignment:
    (task,) = wish.group.tasks
    given = msgspec.structs.replace(task, secrets=(SecretUse(name=SecretName("db"), file="db"),))
    group = msgspec.structs.replace(wish.group, tasks=(given,))
    return msgspec.structs.replace(wish, group=group, secrets={SecretName("db"): 1})


async def test_a_guest_moves_with_its_memory_and_its_disk(pair: tuple[AgentFleet, AgentFleet], built: Path) -> None:
    source, target = pair
    wish = with_secret(machine(image(built, built / "disk.qcow2"), GUEST, attempts=3))
    for fleet in pair:
        fleet.controller.secrets["db"] = (1, b"a-word-that-is-nowhere-else")
    await asyncio.gather(booted(source, wish), target.start())
    target.controller.mesh()
    note = "echo moved > /disk; sync; mount -t tmpfs t /tmp; echo moved > /tmp/memory"
    assert await ran(source, "sh", "-c", note) == (b"", 0, "")

    assert await moved(source, target, wish) > 0
    assert (await ran(target, "sh", "-c", "cat /disk /tmp/memory", alloc=THERE))[0] == b"moved\nmoved\n"
    assert "guest serves" not in await logs(target, THERE), "it did not boot"
    assert (await ran(target, "cat", "/mnt/secrets/db", alloc=THERE))[0] == b"a-word-that-is-nowhere-else"
    assert not target.shell(f"grep -rlF a-word-that-is-nowhere-else {target.data}"), "on no disk there"

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


VICTIMS = ("source agent", "source emulator", "target agent", "target emulator")


@pytest.mark.parametrize(
    "victim",
    [
        "target emulator",
        *(pytest.param(each, marks=pytest.mark.deep) for each in VICTIMS if each != "target emulator"),
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
    await killed(source, target, wish, victim)
    if victim.startswith("target"):
        source.controller.assign(leaving(wish, target, go=True))
    await stays(source, target, wish, victim, emulator)


@pytest.mark.parametrize("copied", ["disk", "memory"])
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.deep
async def test_where_a_copy_breaks_off_the_guest_stays_where_it_was_and_can_move_again(
    pair: tuple[AgentFleet, AgentFleet], built: Path, victim: str, copied: str
) -> None:
    source, target = pair
    wish = machine(image(built, built / "disk.qcow2"), GUEST, attempts=3)
    await asyncio.gather(booted(source, wish), target.start())
    target.controller.mesh()
    (emulator,) = emulators(source)
    write = (
        "head -c 4000000 /dev/urandom > /full; sync; mount -t tmpfs t /tmp; head -c 40000000 /dev/urandom > /tmp/full"
    )
    assert (await ran(source, "sh", "-c", write))[1:] == (0, "")
    target.controller.assign(coming(wish, source), full=True)
    source.controller.assign(leaving(wish, target))
    # Whoever copies to an emulator that stands still does not come to an end.
    await until(lambda: bool(list((target.data / "allocations" / THERE).glob("*.vm/nbd"))), "awaited", timeout_s=BOOT_S)
    (waiting,) = emulators(target)
    before = resident_bytes(waiting)
    if copied == "memory":
        await until(lambda: resident_bytes(waiting) > before + 8 * MIB, "some of it came", timeout_s=BOOT_S)
    os.kill(waiting, signal.SIGSTOP)
    assert stage(source) is MoveStage.COPYING
    await killed(source, target, wish, victim)
    with contextlib.suppress(ProcessLookupError):
        os.kill(waiting, signal.SIGCONT)
    await stays(source, target, wish, victim, emulator)
    assert not list((target.data / "allocations" / THERE).glob("*.vm"))
    if not victim.startswith("source"):
        await moved(source, target, wish, there=AllocId("00000000a3"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def killed(source: AgentFleet, target: AgentFleet, wish: Assignment, victim: str) -> None:
    """And an agent started again."""
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
            os.kill(emulators(source)[0], signal.SIGKILL)


async def stays(source: AgentFleet, target: AgentFleet, wish: Assignment, victim: str, emulator: int) -> None:
    """It runs on here, or starts again where it was killed itself; over there nothing is left."""
    if victim.startswith("target"):
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
