"""A guest on its way from one emulator to another, through descriptors that the agents hand to both.

Disk first: a mirror into the other's disk, kept up to date while the guest runs. Then its memory, again and again,
until little is left. Then it pauses, the rest follows, and it goes on over there. Until the very end it can stay.
https://www.qemu.org/docs/master/interop/live-block-operations.html, docs/devel/migration/main.rst of QEMU.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from agent.qmp import NO_LIMIT, POLL_S, conversation, emulator_version, give, listening, migration, run_state
from outrider.clock import monotonic_s
from outrider.errors import HostError

EXPORT = "disk"
_MIRROR, _TARGET = "move", "moved"
_LEAVES = "pre-switchover"
_DOWNTIME_MS = 300
_CONVERGE_S = 10.0  # then the guest pauses for as long as it takes
_LITTLE_BYTES = 8 << 20  # left to copy: less is copied while it pauses, whatever QEMU thinks of the line
_STEP_S = 600.0
_ANSWER_S = 30.0  # of an emulator on a busy node: to give up here is to give up the move
# QEMU pauses a guest by itself once little is left to copy: there is always this much, of a bitmap of a disk of zeroes
# that nobody uses, until the limit of the pause is more than it takes.
# https://www.qemu.org/docs/master/interop/bitmaps.html; migration/block-dirty-bitmap.c of QEMU counts a byte for each
# `granularity`, and copies it last.
_CAPABILITIES = ("dirty-bitmaps", "pause-before-switchover")
_HELD_BACK = "held"
_HELD_BACK_BYTES, _GRANULARITY = 4 << 30, 512
_HOLDING = {"max-bandwidth": 1 << 18, "downtime-limit": 0}  # what changed is not even looked for
_FINISHING = {"max-bandwidth": NO_LIMIT, "downtime-limit": _DOWNTIME_MS}
_FORCING = {"max-bandwidth": NO_LIMIT, "downtime-limit": 2_000_000}


class Leaving:
    """The emulator that is left. Use `leaving()`."""

    def __init__(self, client: QMPClient, path: Path) -> None:
        self._client = client
        self._path = path
        self._mirrors = False
        self._agreed = False  # the mirror was ended on purpose

    async def identity(self) -> str:
        """The guest's generation id: it stays the same guest."""
        answer = await self._client.execute("query-vm-generation-id")
        return str(answer.get("guid", "")) if isinstance(answer, dict) else ""

    async def version(self) -> str:
        return await emulator_version(self._client)

    async def mirror(self, disk: socket.socket) -> None:
        """Copies what the guest wrote to its disk, and from then on whatever it writes, into the other's."""
        await give(self._client, "disk", disk.fileno())
        server = {"type": "fd", "str": "disk"}
        await self._client.execute(
            "blockdev-add", {"driver": "nbd", "node-name": _TARGET, "server": server, "export": EXPORT}
        )
        await self._client.execute(
            "blockdev-mirror",
            {"job-id": _MIRROR, "device": "disk", "target": _TARGET, "sync": "top", "copy-mode": "write-blocking"},
        )
        self._mirrors = True
        await self._job("ready")

    async def copy(self, memory: socket.socket) -> None:
        """Returns when the memory was copied, but for what changes meanwhile."""
        await _hold_back(self._client, leaves=True)
        await self._client.execute("migrate-set-parameters", {"max-bandwidth": NO_LIMIT, "downtime-limit": 0})
        await give(self._client, "memory", memory.fileno())
        await self._client.execute("migrate", {"uri": "fd:memory"})
        while True:
            passes, left = await self._left()
            if passes and not left:
                await self._client.execute("migrate-set-parameters", _HOLDING)
                return
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Raises HostError where the move broke off, as by the emulator's end."""
        await self._progress()

    async def leave(self) -> float:
        """Pauses the guest and copies the rest; it must not run here any more after this. How long that took, in ms."""
        paused_s = await self._pause()
        if self._mirrors:
            await self._client.execute("block-job-cancel", {"device": _MIRROR})  # which ends it in agreement
            await self._job("")
            await self._client.execute("blockdev-del", {"node-name": _TARGET})
        await self._client.execute("migrate-continue", {"state": _LEAVES})
        while (told := await self._progress())["status"] != "completed":  # noqa: ASYNC110 - QEMU is asked
            await asyncio.sleep(POLL_S)
        downtime_ms = told.get("downtime", 0)
        if paused_s is not None:
            return 1000 * (monotonic_s() - paused_s)
        return float(downtime_ms) if isinstance(downtime_ms, int) else 0.0

    async def _pause(self) -> float | None:
        """Until QEMU waits with the guest paused. Since when, where that was not QEMU's doing."""
        paused_s = None
        if not await self._is_kvm():
            # Emulating, QEMU 7.2 misses writes of a guest that runs soon after it looked for changed pages, and the
            # guest panics over there: it may look only once the guest stands still.
            await self._client.execute("stop")
            paused_s = monotonic_s()
        await self._client.execute("migrate-set-parameters", _FINISHING if paused_s is None else _FORCING)
        until_s, first, forced = monotonic_s() + _CONVERGE_S, await self._left(), paused_s is not None
        while (await self._progress())["status"] != _LEAVES:
            passes, left = await self._left()
            little = passes > first[0] + 1 and left < _LITTLE_BYTES
            if not forced and (little or monotonic_s() > until_s):
                await self._client.execute("migrate-set-parameters", _FORCING)
                forced = True
            await asyncio.sleep(POLL_S)
        return paused_s

    async def _is_kvm(self) -> bool:
        answer = await self._client.execute("query-kvm")
        return isinstance(answer, dict) and answer.get("enabled") is True

    async def stay(self) -> None:
        """The guest runs on here, whatever was begun."""
        await self._client.execute("migrate_cancel")
        while (await migration(self._client))["status"] in ("cancelling", "active", "setup"):  # noqa: ASYNC110 - QEMU is asked
            await asyncio.sleep(POLL_S)
        if self._mirrors and await self._jobs():
            await self._client.execute("block-job-cancel", {"device": _MIRROR, "force": True})
            while await self._jobs():  # noqa: ASYNC110 - QEMU is asked
                await asyncio.sleep(POLL_S)
        if await run_state(self._client) != "running":
            await self._client.execute("cont")
        await _let_go(self._client)

    async def _progress(self) -> dict[str, object]:
        told = await migration(self._client)
        if told["status"] in ("failed", "cancelled", "cancelling"):
            raise HostError(f"emulator at {self._path}", step=f"move: {told.get('error-desc', told['status'])}")
        if self._mirrors and not await self._jobs() and told["status"] != "completed" and not self._agreed:
            raise HostError(f"emulator at {self._path}", step="move: the copy of its disk broke off")
        return told

    async def _left(self) -> tuple[int, int]:
        """How often all of the memory was looked through for what changed, and how many bytes are left of that."""
        ram = (await self._progress()).get("ram")
        if not isinstance(ram, dict):
            return 0, 0
        return ram.get("dirty-sync-count", 0), ram.get("remaining", 0)

    async def _job(self, status: str) -> None:
        """Until the mirror is `status`, or has gone where that is ""."""
        self._agreed = not status
        while jobs := await self._jobs():
            if status and jobs[_MIRROR] == status:
                return
            await asyncio.sleep(POLL_S)
        if status:
            raise HostError(f"emulator at {self._path}", step="move: the copy of its disk broke off")

    async def _jobs(self) -> dict[str, str]:
        answer = await self._client.execute("query-jobs")
        jobs = answer if isinstance(answer, list) else []
        return {str(job["id"]): str(job["status"]) for job in jobs if isinstance(job, dict)}


@asynccontextmanager
async def leaving(path: Path) -> AsyncIterator[Leaving]:
    """One conversation for the whole move. Where it ends by an error or is cancelled, the guest stays."""
    async with conversation(path, _STEP_S) as client:
        guest = Leaving(client, path)
        try:
            yield guest
        except BaseException:
            with suppress(QMPError, HostError, EOFError, OSError):  # the emulator has ended, too
                if (await migration(client))["status"] != "completed":
                    await guest.stay()
            raise


async def open_disk(path: Path, socket_inside: str) -> None:
    """The emulator that waits takes its guest's disk at `socket_inside`. Raises HostError."""
    await listening(path)
    async with conversation(path, _ANSWER_S) as client:
        address = {"type": "unix", "data": {"path": socket_inside}}
        await client.execute("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": EXPORT, "node-name": EXPORT, "name": EXPORT, "writable": True}
        await client.execute("block-export-add", export)


async def arrive(path: Path, memory: socket.socket) -> None:
    """Takes the guest's memory; it is all there, and does not run yet, on return. Raises HostError."""
    async with conversation(path, _STEP_S) as client:
        await _hold_back(client, leaves=False)
        await give(client, "memory", memory.fileno())
        await client.execute("migrate-incoming", {"uri": "fd:memory"})
        while await run_state(client) == "inmigrate":  # noqa: ASYNC110 - an emulator's, whose state is asked for
            await asyncio.sleep(POLL_S)


async def go_on(path: Path, *, disk: bool) -> None:
    """The guest that arrived runs. Raises HostError."""
    async with conversation(path, _ANSWER_S) as client:
        if disk:
            try:
                await client.execute("nbd-server-stop")
            except QMPError as error:
                raise HostError(f"emulator at {path}", step=f"close its disk: {error}") from error
        await client.execute("cont")
    with suppress(HostError):  # it runs: whatever is not tidied here, the next move tidies
        async with conversation(path) as client:
            await _let_go(client)


async def _hold_back(client: QMPClient, *, leaves: bool) -> None:
    """Before the move, of either emulator: only the one that is left has the bitmap, and gives it to the other."""
    await _let_go(client)  # of a move that an earlier agent began
    await _set(client, _CAPABILITIES if leaves else _CAPABILITIES[:1], wanted=True)
    disk = {"driver": "null-co", "node-name": _HELD_BACK, "size": _HELD_BACK_BYTES, "read-zeroes": True}
    await client.execute("blockdev-add", disk)
    if leaves:
        bitmap = {"node": _HELD_BACK, "name": _HELD_BACK, "granularity": _GRANULARITY}
        await client.execute("block-dirty-bitmap-add", bitmap)


async def _let_go(client: QMPClient) -> None:
    """The guest runs, as if it had never moved: also a snapshot is a migration to QEMU."""
    with suppress(QMPError):
        await client.execute("block-dirty-bitmap-remove", {"node": _HELD_BACK, "name": _HELD_BACK})
    for node in (_HELD_BACK, _TARGET):  # the other's disk is still known where a copy of it broke off
        with suppress(QMPError):
            await client.execute("blockdev-del", {"node-name": node})
    with suppress(QMPError):
        await _set(client, _CAPABILITIES, wanted=False)


async def _set(client: QMPClient, names: tuple[str, ...], *, wanted: bool) -> None:
    capabilities = [{"capability": name, "state": wanted} for name in names]
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
