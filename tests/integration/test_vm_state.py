"""The state of guests: kept, put back, cloned, carried to another fleet, and what is refused. Real QEMU throughout."""

import asyncio
import io
import os
import signal
import tarfile
from pathlib import Path

import msgspec
import pytest
from qemu.qmp import QMPClient

from agent.qmp import connect
from agent.snapshots import Manifest
from outrider.ids import AllocId
from outrider.model.allocation import AllocStatus, Assignment
from outrider.v1 import fleet_pb2
from outrider.v1.fleet_pb2 import VmVerb
from tests.integration.agent_fleet import AgentFleet, fleet
from tests.integration.machines import (
    API,
    BOOT_S,
    GUEST,
    VISITOR,
    built,
    calls,
    emulators,
    image,
    logs,
    machine,
    mesh,
    neighbours,
    ran,
    serving,
)
from tests.integration.network_lab import node
from tests.integration.processes import until

__all__ = ["built", "fleet", "node"]
pytestmark = pytest.mark.host

CLONES = AllocId("00000000e1"), AllocId("00000000e2")


async def operated(
    fleet: AgentFleet,
    verb: VmVerb.ValueType,
    snapshot: str = "",
    *,
    alloc: str = "",
    path: str = "",
    given: bytes | None = None,
) -> tuple[bytes, str]:
    """What the agent gave, and what it objected to."""
    command = fleet_pb2.VmCommand(verb=verb, snapshot=snapshot, path=path)
    tunnel = fleet.controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=alloc, vm=command))
    if given is not None:
        for at in range(0, len(given), 1 << 20):
            fleet.controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin=given[at : at + (1 << 20)]))
        fleet.controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin_closed=True))
    output, end = await fleet.controller.tunnelled(tunnel, timeout_s=240)
    return output, end.error


def clone(wish: Assignment, alloc: AllocId, snapshot: str) -> Assignment:
    (task,) = wish.group.tasks
    task = msgspec.structs.replace(task, image=msgspec.structs.replace(task.image, start_from=snapshot))
    ports = {name: port + int(alloc[-1]) * 10 for name, port in wish.mesh_ports.items()}
    group = msgspec.structs.replace(wish.group, tasks=(task,))
    return msgspec.structs.replace(wish, alloc=alloc, group=group, mesh_ports=ports)


async def test_a_guest_is_kept_put_back_cloned_and_carried_to_another_node(fleet: AgentFleet, built: Path) -> None:
    controller = fleet.controller
    await fleet.start()
    mesh(fleet)
    wish = (serving(built), *neighbours())
    controller.assign(*wish, full=True)
    await until(lambda: all(map(controller.passing, (GUEST, API, VISITOR))), "all healthy", timeout_s=BOOT_S)
    mesh(fleet)
    await until(lambda: controller.mesh_applied == 2, "the mesh is known")
    note = "echo kept > /memory; sync; mount -t tmpfs t /tmp; echo kept > /tmp/note"
    assert await ran(fleet, "sh", "-c", note) == (b"", 0, "")

    said, error = await operated(fleet, VmVerb.VM_VERB_SNAPSHOT, "warm", alloc=GUEST)
    assert error == ""
    manifest = msgspec.json.decode(said, type=Manifest)
    assert manifest.name == "warm"
    assert set(manifest.files) == {"memory", "disk", "seed.iso"}
    await until(lambda: controller.fingerprint_snapshots == ("warm",), "the scheduler hears of it")
    assert await calls(fleet, "http://guest.mesh/") == "hello from a guest\n"
    assert "there is a snapshot 'warm'" in (await operated(fleet, VmVerb.VM_VERB_SNAPSHOT, "warm", alloc=GUEST))[1]
    assert "is no vm" in (await operated(fleet, VmVerb.VM_VERB_SNAPSHOT, "other", alloc=API))[1]
    assert "no snapshot 'absent'" in (await operated(fleet, VmVerb.VM_VERB_RESTORE, "absent", alloc=GUEST))[1]

    large = os.urandom(300_000)
    assert await operated(fleet, VmVerb.VM_VERB_WRITE, alloc=GUEST, path="/large", given=large) == (b"", "")
    assert await operated(fleet, VmVerb.VM_VERB_READ, alloc=GUEST, path="/large") == (large, "")
    assert "the guest says" in (await operated(fleet, VmVerb.VM_VERB_READ, alloc=GUEST, path="/nowhere"))[1]
    await ran(fleet, "sh", "-c", "echo lost > /memory; rm /tmp/note")
    assert (await operated(fleet, VmVerb.VM_VERB_RESTORE, "warm", alloc=GUEST))[1] == ""
    await until(lambda: controller.passing(GUEST), "serves again")
    assert (await ran(fleet, "sh", "-c", "cat /memory /tmp/note"))[0] == b"kept\nkept\n", "its disk and its memory"
    assert controller.reports[GUEST].tasks[0].restarts == 0, "no failure"
    assert (await logs(fleet, GUEST)).count("guest serves") == 1, "it did not boot again"

    controller.assign(*(clone(wish[0], alloc, "warm") for alloc in CLONES))
    await until(lambda: all(map(controller.passing, CLONES)), "both clones", timeout_s=BOOT_S)
    for alloc in CLONES:
        assert "guest serves" not in await logs(fleet, alloc), "it did not boot at all"
    ids = {await generation_id(fleet, alloc) for alloc in (GUEST, *CLONES)}
    assert len(ids) == 3, "each can tell that it is another"

    exported, error = await operated(fleet, VmVerb.VM_VERB_EXPORT, "warm")
    assert error == ""
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        kept = tar.getnames()
    assert kept[:2] == ["manifest.sha256", "manifest.json"]
    assert len(kept) == 2 + 3 + 3
    assert (await operated(fleet, VmVerb.VM_VERB_DELETE, "warm"))[1] == ""
    assert (await operated(fleet, VmVerb.VM_VERB_LIST))[0] == b""
    await refuses_what_was_tampered_with(fleet, exported)
    said, error = await operated(fleet, VmVerb.VM_VERB_IMPORT, "carried", given=exported)
    assert error == ""
    assert msgspec.json.decode(said, type=Manifest).name == "carried"
    third = clone(wish[0], AllocId("00000000e3"), "carried")
    other = msgspec.structs.replace(clone(wish[0], AllocId("00000000e4"), "carried"))
    (task,) = other.group.tasks
    resources = msgspec.structs.replace(task.resources, memory_bytes=2 * task.resources.memory_bytes)
    group = msgspec.structs.replace(other.group, tasks=(msgspec.structs.replace(task, resources=resources),))
    controller.assign(third, msgspec.structs.replace(other, group=group))
    await until(lambda: controller.passing(third.alloc), "goes on from what was carried", timeout_s=BOOT_S)
    await until(lambda: controller.status(other.alloc) is AllocStatus.FAILED, "refused")
    assert "snapshot carried does not fit: memory" in controller.reports[other.alloc].message
    assert not list((fleet.data / "snapshots").glob(".*")), "nothing half made is left"


async def generation_id(fleet: AgentFleet, alloc: AllocId) -> str:
    """What the guest's kernel may read of its identity (vmgenid)."""
    client = QMPClient()
    await client.connect(connect(fleet.data / "allocations" / alloc / "machine.vm" / "qmp"))
    try:
        answer = await client.execute("query-vm-generation-id")
    finally:
        await client.disconnect()
    assert isinstance(answer, dict)
    return str(answer["guid"])


async def until_said(fleet: AgentFleet, alloc: AllocId, text: str) -> None:
    async with asyncio.timeout(BOOT_S):
        while text not in await logs(fleet, alloc):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)


async def refuses_what_was_tampered_with(fleet: AgentFleet, exported: bytes) -> None:
    flipped = bytearray(exported)
    flipped[2 << 20] ^= 1  # of its memory
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        members = list(tar)
    text = bytearray(exported)
    at = members[1].offset_data + exported[members[1].offset_data :].index(b'"memory_bytes"') + 17
    text[at : at + 1] = b"9"
    led = io.BytesIO()
    with tarfile.open(fileobj=led, mode="w") as tar:
        escape = tarfile.TarInfo("../../../etc/passwd")
        tar.addfile(escape)
    bad = {
        "is not what its manifest says": bytes(flipped),
        "manifest.json is not what was exported": bytes(text[: 2 << 20]),
        "no whole export": exported[: 4 << 20],
        "expected manifest.sha256, and found": led.getvalue(),
        "empty file": b"",
    }
    for expected, given in bad.items():
        said, error = await operated(fleet, VmVerb.VM_VERB_IMPORT, "bad", given=given)
        assert expected in error, (expected, error, said)
    assert (await operated(fleet, VmVerb.VM_VERB_LIST))[0] == b""


async def test_what_is_killed_while_a_guest_is_kept_leaves_nothing_half_done(fleet: AgentFleet, built: Path) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    wish = machine(image(built, built / "disk.qcow2"), GUEST, attempts=3)
    controller.assign(wish, full=True)
    await until_said(fleet, GUEST, "guest serves")
    (emulator,) = emulators(fleet)

    # The agent, as soon as the guest is paused: the next one lets it run on.
    command = fleet_pb2.VmCommand(verb=VmVerb.VM_VERB_SNAPSHOT, snapshot="half")
    controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=GUEST, vm=command))
    await until(lambda: bool(list((fleet.data / "snapshots").glob(".new-*/memory"))), "it began")
    fleet.kill(signal.SIGKILL)
    await fleet.start()
    controller.assign(wish, full=True)
    await until(lambda: not list((fleet.data / "snapshots").glob(".new-*")), "swept")
    assert emulators(fleet) == [emulator], "the guest noticed nothing"
    async with asyncio.timeout(20):
        while (await ran(fleet, "echo", "awake"))[0] != b"awake\n":  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)

    # The emulator: the snapshot is refused, the guest starts again.
    command = fleet_pb2.VmCommand(verb=VmVerb.VM_VERB_SNAPSHOT, snapshot="half")
    tunnel = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=GUEST, vm=command))
    await until(lambda: bool(list((fleet.data / "snapshots").glob(".new-*/memory"))), "it began")
    os.kill(emulator, signal.SIGKILL)
    _, end = await controller.tunnelled(tunnel, timeout_s=30)
    if end.error:  # else it was quicker than we are
        assert (await operated(fleet, VmVerb.VM_VERB_LIST))[0] == b""
    assert not list((fleet.data / "snapshots").glob(".new-*"))
    await until(lambda: controller.reports[GUEST].tasks[0].restarts == 1, "seen")
    await until(lambda: bool(emulators(fleet)), "started again", timeout_s=BOOT_S)
