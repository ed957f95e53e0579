"""A guest's life on its node, as the executor carries it out: started, taken over, stopped, and moved to another node.

Owns the order of these steps; the emulator is a sandbox, its files and conversations are `vms`'. Tasks: one for each
guest that has not booted yet, and one for each that is on its way elsewhere, in the agent's TaskGroup.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from agent.core.commands import StopTask
from agent.drivers.process import Place, sandbox_id
from agent.guest_states import GuestPlace
from agent.held import sandbox_directory
from agent.microvms import Microvms
from agent.migration import Departure, Migration, Offer, left_for, stays
from agent.pull.image import UnpackedImage
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import SandboxStatus, StartError
from agent.store import Store
from agent.vms import Vms, booted, press_power_button, wake
from outrider.errors import HostError, OutriderError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.allocation import Assignment, Move
from outrider.model.job import Driver, Isolation, Task

_POWER_BUTTON_S = 3.0


class Guests:
    def __init__(
        self,
        *,
        store: Store,
        runtime: SandboxRuntime,
        vms: Vms,
        microvms: Microvms,
        migration: Migration,
        tasks: asyncio.TaskGroup,
        log: Log,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self._vms = vms
        self._microvms = microvms
        self._migration = migration
        self._tasks = tasks
        self._log = log
        self._departures: dict[AllocId, Departure] = {}

    def forget(self, alloc: AllocId) -> None:
        self._microvms.forget(alloc)

    def place(self, alloc: AllocId, task: Task) -> GuestPlace:
        sandbox = sandbox_directory(self._store.allocation_directory(alloc), task.name)
        return self._vms.place(alloc, task, sandbox)

    async def start(
        self, assignment: Assignment, task: Task, place: Place, image: UnpackedImage | None
    ) -> SandboxStatus:
        """It boots, or goes on from where it was kept, or comes from another node.

        `image`: of a process with a kernel of its own, where that was fetched. Raises InputError and StartError where
        the job is at fault, or it did not come; HostError where this host is.
        """
        stays(Path(place.directory))
        if task.isolation is Isolation.VM:
            return await self._runtime.start(await self._microvms.prepare(assignment, task, place, image))
        if assignment.move_from is not None and not self._vms.was_taken_up(Path(place.directory)):
            return await self._receive(assignment, task, place, assignment.move_from)
        spec, snapshot = await self._vms.prepare(assignment, task, place)
        status = await self._runtime.start(spec)
        if snapshot:
            try:
                await self._vms.take_up(snapshot, self.place(assignment.alloc, task))
            except StartError:
                await self._runtime.delete(spec.id)
                raise
        return status

    async def take_over(self, alloc: AllocId, task: Task) -> None:
        """An earlier agent started it: it may be paused in the middle of something, or still wait for its state."""
        place = self.place(alloc, task)
        if self._vms.waits(place.sandbox):
            self._log.warning("guest without a state ended", alloc=alloc)
            with contextlib.suppress(HostError):  # it has ended meanwhile
                await self._runtime.signal(sandbox_id(alloc, task.name), signal.SIGKILL)
        elif left_for(place.sandbox) is None:
            await wake(place.directory)

    async def end_unless_booted(self, alloc: AllocId, task: Task, packets: int) -> str:
        """Why the guest was ended; "" where it booted. `packets`: what guests before it sent."""
        sandbox, deadline_s = sandbox_id(alloc, task.name), task.image.boot_deadline_s
        for status in await self._runtime.list():
            if status.id == sandbox and status.running:
                if await booted(status.pid, packets=packets, until_s=status.started_at_s + deadline_s):
                    return ""
                self._log.warning("guest does not boot", sandbox=sandbox)
                with contextlib.suppress(HostError):  # it has ended meanwhile
                    await self._runtime.signal(sandbox, signal.SIGKILL)
                return f"the guest sent no packet within {deadline_s:g} s of its start, its boot_deadline"
        return ""

    async def power_down(self, command: StopTask, watcher: asyncio.Task[None]) -> None:
        """Returns once the guest has ended, its time is over, or there is nothing to end any more."""
        self.cancel_move(command.alloc)
        place = self.place(command.alloc, command.task)
        until_s = time.monotonic() + command.task.kill_timeout_s
        while not watcher.done() and time.monotonic() < until_s and left_for(place.sandbox) is None:
            # Again and again: a guest that still boots does not hear the first.
            try:
                await press_power_button(place.directory)
            except HostError as error:
                self._log.info("power button", alloc=command.alloc, reason=str(error))
            await asyncio.wait({watcher}, timeout=min(_POWER_BUTTON_S, max(0.0, until_s - time.monotonic())))

    def move(self, assignment: Assignment) -> None:
        """What its assignment says of a move: begin, let go, or give up what is under way."""
        alloc, move = assignment.alloc, assignment.move_to
        departure = self._departures.get(alloc)
        if departure is not None and (move is None or departure.to != move.alloc):
            self.cancel_move(alloc)
            departure = None
        if move is None:
            task = next(task for task in assignment.group.tasks if task.driver is Driver.VM)
            place = self.place(alloc, task)
            if left_for(place.sandbox) is not None:  # it was given away, and does not run there any more
                stays(place.sandbox)
                self._tasks.create_task(wake(place.directory), name=f"{alloc}-wake")
            return
        if departure is None:
            departure = self._departures[alloc] = Departure(move)
            departure.task = self._tasks.create_task(self._depart(assignment, departure, move), name=f"{alloc}-move")
        if move.go:
            departure.go.set()

    def cancel_move(self, alloc: AllocId) -> None:
        """The guest stays, unless it has left."""
        departure = self._departures.pop(alloc, None)
        if departure is not None and departure.task is not None:
            departure.task.cancel()

    async def _depart(self, assignment: Assignment, departure: Departure, move: Move) -> None:
        """Once for each move that is wanted: it is told how it ended, and not tried again."""
        alloc = assignment.alloc
        task = next(task for task in assignment.group.tasks if task.driver is Driver.VM)
        place = self.place(alloc, task)
        if left_for(place.sandbox) == move.alloc:
            await self._migration.settle_departure(alloc, move, place, "this node's agent ended meanwhile")
            return

        async def offer(identity: str, version: str) -> tuple[Offer, Mapping[str, Path]]:
            return await self._vms.offer(task, place, identity, version)

        try:
            with self._vms.alone_with(place.directory):
                await self._migration.depart(alloc, departure, move, place, offer)
        except OutriderError as error:  # its state is being kept
            await self._migration.settle_departure(alloc, move, place, str(error))

    async def _receive(self, assignment: Assignment, task: Task, place: Place, move: Move) -> SandboxStatus:
        where = self.place(assignment.alloc, task)
        try:
            async with self._migration.arrival(assignment.alloc, move) as arrival:
                offer = await self._migration.offer(arrival)
                lacking = await asyncio.to_thread(self._vms.lacking, offer, task)
                async for image, blocks in self._migration.want(arrival, lacking):
                    await self._vms.keep_image(image, blocks)
                spec = await self._vms.prepare_arrival(assignment, task, place, offer)
                if offer.seed:
                    self._vms.keep_seed(place, await self._migration.seed(arrival))
                status = await self._runtime.start(spec)
                try:
                    taken_up = self._vms.settled(where.sandbox)
                    await self._migration.settle(arrival, where, disk="disk" in offer.images, taken_up=taken_up)
                except BaseException:
                    await self._runtime.delete(spec.id)
                    raise
                return status
        except OutriderError as error:
            raise StartError(str(error)) from error
