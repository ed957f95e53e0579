"""Carries out the core's commands, each as a task of its own, and tells the core what became of them.

Owns what runs on the host for the allocations, and nothing of what should. Tasks: one for each command under way and
one for each sandbox that is watched, in the agent's TaskGroup; commands on disk go through one writer, in order.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import assert_never

import msgspec

from agent.belongings.belongings import Belongings
from agent.belongings.memory import guest_memory
from agent.checks import CheckRunner
from agent.core import commands as c
from agent.core.events import (
    AllocEvent,
    CheckRan,
    Cleaned,
    NetworkReady,
    SidecarDrained,
    SidecarStopped,
    StepFailed,
    TaskExit,
    TaskExited,
    TaskStarted,
    TaskStartFailed,
)
from agent.drivers import task_directory
from agent.drivers.process import Place, identity, sandbox_id, sandbox_spec
from agent.envoys import Envoys
from agent.guests import Guests
from agent.held import SIDECAR, Ahead, Held, sandbox_directory, split, task_exit
from agent.leaves import Leaves
from agent.names import Names
from agent.network.namespaces import AllocationNetwork, AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address, shared_address
from agent.pull.keeper import Keeper
from agent.sandbox.runtime import Created, SandboxRuntime
from agent.sandbox.spec import INNER_USER, SandboxSpec, SandboxStatus, StartError
from agent.spares import Spare
from agent.store import Store
from agent.uids import Uids, fits_reserved
from agent.vms import guest_directory, packets_sent, remove_guest
from outrider.errors import HostError, InputError, RefusedError
from outrider.ids import AllocId, NodeId, ServiceName, TaskName
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.job import Task, has_guest, inner_ports, is_guest, published_ports
from outrider.model.mesh import LOOPBACK, PUBLIC_PORT, shares_sidecar, wants_own_sidecar, workload_address

_KILLED_S = 10.0  # after SIGKILL: the kernel may have to write out much
_EXEC_OUTPUT_BYTES_MAX = 4096


class Executor:
    """`tell` waits while the core's queue is full; `write` puts a command for the disk in order; both never fail."""

    def __init__(
        self,
        *,
        node: NodeId,
        run_directory: Path,
        block: int,
        store: Store,
        uids: Uids,
        runtime: SandboxRuntime,
        networks: AllocationNetworks,
        names: Names,
        leaves: Leaves,
        envoys: Envoys,
        guests: Guests,
        images: Keeper,
        belongings: Belongings,
        tell: Callable[[AllocEvent], Awaitable[None]],
        write: Callable[[c.Save | c.Acknowledge | c.Forget], None],
        report: Callable[[c.Report], None],
        tasks: asyncio.TaskGroup,
        log: Log,
    ) -> None:
        self._node = node
        self._run_directory = run_directory
        self._tasks_directory = run_directory / "tasks"
        self._resolv_conf = run_directory / "resolv.conf"
        self._block = block
        self._store = store
        self._uids = uids
        self._runtime = runtime
        self._networks = networks
        self._names = names
        self._leaves = leaves
        self._envoys = envoys
        self._guests = guests
        self._images = images
        self._belongings = belongings
        self._checks = CheckRunner(open_socket=networks.open_socket)
        self._tell = tell
        self._write = write
        self._report = report
        self._tasks = tasks
        self._log = log
        self._held: dict[AllocId, Held] = {}
        self._found: dict[AllocId, AllocationNetwork] = {}  # not taken over yet
        self._last_address: str | None = None

    def execute(self, command: c.Command) -> None:
        """Begins it and returns."""
        match command:
            case c.Save() | c.Acknowledge() | c.Forget():
                self._write(command)
            case c.Report():
                self._report(command)
            case c.Note():
                self._log.info(command.event, alloc=command.alloc, message=command.message)
            case c.PullImages():
                self._images.begin(self._hold(command.assignment).assignment)
            case c.MoveGuest():
                self._guests.move(command.assignment)
            case c.CreateTask():
                held = self._hold(command.assignment)
                making = self._tasks.create_task(
                    self._create_ahead(held, command.task), name=f"{command.assignment.alloc}.{command.task.name}-ahead"
                )
                held.ahead[command.task.name] = Ahead(assignment=command.assignment, making=making)
            case c.StartTask():
                alloc = self._hold(command.assignment).assignment.alloc
                self._watch(alloc, command.task.name, self._run_task(command))
            case c.AdoptTask():
                alloc = self._hold(command.assignment).assignment.alloc
                self._belongings.adopted(command.assignment)
                self._watch(alloc, command.task, self._watch_task(alloc, command.task))
            case c.StartSidecar():
                held = self._hold(command.assignment)
                allocation = self._store.allocation_directory(command.assignment.alloc)
                self._watch(command.assignment.alloc, SIDECAR, self._envoys.run(held, allocation))
            case c.AdoptSidecar():
                self._watch(command.assignment.alloc, SIDECAR, self._envoys.adopt(self._hold(command.assignment)))
            case _:
                self._begin(command)

    def found(self, networks: Mapping[AllocId, AllocationNetwork]) -> None:
        """Before the core is told: what an earlier agent made is held once the core takes it over."""
        self._found = dict(networks)

    def held(self) -> tuple[Held, ...]:
        return tuple(self._held.values())

    def _begin(
        self,
        command: c.CreateNetwork
        | c.RenewBelongings
        | c.RunCheck
        | c.DrainSidecar
        | c.StopTask
        | c.StopSidecar
        | c.Clean,
    ) -> None:
        work: Coroutine[None, None, None]
        match command:
            case c.CreateNetwork():
                alloc, work = command.assignment.alloc, self._create_network(command.assignment)
            case c.RenewBelongings():
                alloc, work = (
                    command.assignment.alloc,
                    self._belongings.renew(self._hold(command.assignment).assignment),
                )
            case c.RunCheck():
                alloc, work = command.alloc, self._run_check(command)
            case c.DrainSidecar():
                alloc, work = command.alloc, self._drain_sidecar(command.alloc)
            case c.StopTask():
                alloc, work = command.alloc, self._stop_task(command)
            case c.StopSidecar():
                alloc, work = command.alloc, self._stop_sidecar(command.alloc)
            case c.Clean():
                alloc, work = command.alloc, self._clean(command.alloc)
            case _:
                assert_never(command)
        self._tasks.create_task(work, name=f"{alloc}-{type(command).__name__}")

    def _hold(self, assignment: Assignment) -> Held:
        alloc = assignment.alloc
        held = self._held.get(alloc)
        if held is None:
            names = tuple(task.name for task in assignment.group.tasks)
            network = self._found.pop(alloc, None)
            spare = self._take_spare(assignment, names) if network is None else None
            directory, reserved = self._store.allocation_directory(alloc), spare.uid_first if spare else None
            uids = self._uids.give(alloc, names, directory, reserved=reserved)
            held = self._held[alloc] = Held(assignment=assignment, uids=uids, watchers={})
            held.reserved = spare.name if spare else None
            if network is not None:
                held.namespace, held.local_address = network.namespace, network.local_address
                self._leaves.acquire(alloc, _services(assignment), self._tasks)
                self._names.adopt(alloc, assignment.group)
        held.assignment = assignment
        return held

    def _take_spare(self, assignment: Assignment, tasks: tuple[TaskName, ...]) -> Spare | None:
        alloc = assignment.alloc
        if not wants_own_sidecar(assignment.group) or self._uids.known(alloc) or not fits_reserved(tasks):
            return None
        return self._envoys.take_spare(alloc, self._store.allocation_directory(alloc))

    def _watch(self, alloc: AllocId, task: TaskName, work: Coroutine[None, None, None]) -> None:
        held = self._held[alloc]
        held.watchers[task] = self._tasks.create_task(work, name=f"{alloc}.{task}")

    async def _unwatch(self, alloc: AllocId, task: TaskName) -> None:
        """Its coroutine ends here; the sandbox does not."""
        held = self._held.get(alloc)
        watcher = held.watchers.pop(task, None) if held else None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait({watcher})

    async def _create_network(self, assignment: Assignment) -> None:
        alloc = assignment.alloc
        try:
            held = self._hold(assignment)
            self._leaves.acquire(alloc, _services(assignment), self._tasks)
            network = await self._networks.create(self._network_spec(held), reserved=held.reserved)
            held.reserved = None
        except HostError as error:
            await self._tell(StepFailed(alloc=alloc, message=f"no network: {error}"))
            return
        held.namespace, held.local_address = network.namespace, network.local_address
        # Names are there long before the first task is: Envoy takes its time.
        attaching = self._names.attach(alloc, assignment.group)
        self._tasks.create_task(attaching, name=f"{alloc}-names")
        await self._tell(NetworkReady(alloc=alloc, local_address=network.local_address))

    def _network_spec(self, held: Held) -> NetworkSpec:
        assignment = held.assignment
        taken = {other.local_address for other in self._held.values()}
        taken |= {network.local_address for network in self._found.values()}
        address = next_address(self._block, taken, self._last_address)
        if address is None:
            raise HostError("addresses", step="all 1,021 addresses of this node's block are in use")
        self._last_address = held.local_address = address
        ports = inner_ports(assignment.group.network)
        services = assignment.group.services
        shared = shares_sidecar(assignment.group)
        return NetworkSpec(
            alloc=assignment.alloc,
            local_address=address,
            host_side_address=(shared_address if shared else gateway_address)(self._block),
            mesh_ports=tuple(
                (assignment.mesh_ports[service.name], PUBLIC_PORT + index)
                for index, service in enumerate(services)
                if service.name in assignment.mesh_ports
            ),
            static_ports=tuple(
                (number, ports[name])
                for name, number in published_ports(assignment.group.network, assignment.dynamic_ports).items()
            ),
            egress=assignment.group.network.egress,
            bandwidth_bytes=assignment.group.network.bandwidth_bytes,
            sidecar_uid=(self._uids.shared_sidecar if shared else held.uids.sidecar) + INNER_USER,
            workload_uids=held.uids.workload,
            dns_uid=self._uids.responder + INNER_USER,
            guest_uid=held.uids.workload[0] + INNER_USER if has_guest(assignment.group) else None,
            shared=shared,
            service_ports=tuple(ports[service.port] for service in services if service.port is not None),
        )

    async def _run_task(self, command: c.StartTask) -> None:
        alloc, task = command.assignment.alloc, command.task
        held = self._hold(command.assignment)
        try:
            status = await self._start(held, task)
        except (InputError, StartError, RefusedError) as error:
            message = f"{task.name} cannot start: {error}"
            _settle(held, task.name, message)
            await self._tell(TaskStartFailed(alloc=alloc, task=task.name, message=message, retry=False))
            return
        except HostError as error:
            message = f"{task.name} did not start: {error}"
            _settle(held, task.name, message)
            await self._tell(TaskStartFailed(alloc=alloc, task=task.name, message=message))
            return
        _settle(held, task.name, "")
        packets = packets_sent(status.pid) if is_guest(task) else 0
        await self._tell(TaskStarted(alloc=alloc, task=task.name, started_at_s=status.started_at_s))
        await self._watch_task(alloc, task.name, packets=packets)

    async def _create_ahead(self, held: Held, task: Task) -> Created | None:
        try:
            return await self._runtime.create(await self._sandbox(held, task))
        except (InputError, StartError, RefusedError, HostError):
            return None  # whoever starts it tries again, and tells

    async def _start(self, held: Held, task: Task) -> SandboxStatus:
        ahead = held.ahead.pop(task.name, None)
        if ahead is not None:
            created = await ahead.making
            if created is not None and ahead.assignment == held.assignment:
                return await self._runtime.begin(created)
        if is_guest(task):
            return await self._start_guest(held, task)
        return await self._runtime.start(await self._sandbox(held, task))

    async def _start_guest(self, held: Held, task: Task) -> SandboxStatus:
        assignment = held.assignment
        place = self._place(held, task, guest_directory(self._sandbox_directory(assignment.alloc, task.name)))
        owner = place.uid_first + INNER_USER
        brought = await self._belongings.prepare_guest(assignment, task, owner=owner)
        memory = str(guest_memory(self._run_directory, assignment.alloc, task.name))
        place = msgspec.structs.replace(place, memory=memory, **msgspec.structs.asdict(brought))
        image = self._images.unpacked(assignment.alloc, task.image)
        return await self._guests.start(assignment, task, place, image)

    async def _sandbox(self, held: Held, task: Task) -> SandboxSpec:
        """Its sandbox; all that it needs is made before."""
        assignment = held.assignment
        directory = self._tasks_directory / assignment.alloc / task.name
        image = self._images.unpacked(assignment.alloc, task.image)
        user, group = identity(task, image)
        place = self._place(held, task, directory, resolv_conf=str(self._resolv_conf))
        brought = await self._belongings.prepare(assignment, task, uid_first=place.uid_first, user=user, group=group)
        place = msgspec.structs.replace(
            place,
            mounts=(*place.mounts, *brought.mounts),
            env=brought.env,
            secrets=brought.secrets,
            devices=brought.devices,
        )
        spec = sandbox_spec(assignment, task, place, image)
        task_directory.prepare(
            directory, files=task.files, size_bytes=task.resources.disk_bytes, owner=place.uid_first + spec.user
        )
        return spec

    def _place(self, held: Held, task: Task, directory: Path, *, resolv_conf: str = "") -> Place:
        return Place(
            node=self._node,
            uid_first=held.uids.task(task.name),
            network_namespace=held.namespace,
            directory=str(self._sandbox_directory(held.assignment.alloc, task.name)),
            task_directory=str(directory),
            resolv_conf=resolv_conf,
        )

    async def _watch_task(self, alloc: AllocId, task: TaskName, *, packets: int | None = None) -> None:
        """`packets`: what guests before this one sent; None where an earlier agent started it."""
        (spec,) = (each for each in self._held[alloc].assignment.group.tasks if each.name == task)
        booting = None
        if is_guest(spec):
            if packets is None:
                await self._guests.take_over(alloc, spec)
            work = self._guests.end_unless_booted(alloc, spec, packets or 0)
            booting = self._tasks.create_task(work, name=f"{alloc}.{task}-boot")
        try:
            exit_ = await task_exit(self._runtime, sandbox_id(alloc, task), self._sandbox_directory(alloc, task))
        except HostError as error:
            self._log.warning("exit unseen", alloc=alloc, task=task, reason=str(error))
            exit_ = TaskExit(finished_at_s=time.time())
        finally:
            if booting is not None:
                booting.cancel()
        self._belongings.ended(alloc, task)
        if booting is not None and booting.done() and not booting.cancelled() and booting.result():
            exit_ = msgspec.structs.replace(exit_, reason=booting.result())
        if task in self._held[alloc].put_back:
            exit_ = msgspec.structs.replace(exit_, again=True, reason="ended to go on from a snapshot")
        await self._tell(TaskExited(alloc=alloc, task=task, exit=exit_))

    def _sandbox_directory(self, alloc: AllocId, task: TaskName) -> Path:
        return sandbox_directory(self._store.allocation_directory(alloc), task)

    async def _stop_task(self, command: c.StopTask) -> None:
        task, sandbox = command.task, sandbox_id(command.alloc, command.task.name)
        watcher = self._held[command.alloc].watchers.get(task.name)
        if watcher is None:
            return
        with contextlib.suppress(HostError):  # it has ended meanwhile: its watcher tells
            if is_guest(task):
                await self._guests.power_down(command, watcher)
            else:
                await self._runtime.signal(sandbox, signal.Signals[task.kill_signal])
                await _ended(watcher, task.kill_timeout_s)
            if watcher.done():
                return
            await self._runtime.signal(sandbox, signal.SIGKILL)
            if not await _ended(watcher, _KILLED_S):
                self._log.error("task survives SIGKILL", alloc=command.alloc, task=task.name)

    async def _drain_sidecar(self, alloc: AllocId) -> None:
        await self._envoys.drain(alloc)
        await self._tell(SidecarDrained(alloc=alloc))

    async def _stop_sidecar(self, alloc: AllocId) -> None:
        await self._unwatch(alloc, SIDECAR)
        try:
            await self._envoys.stop(alloc)
        except HostError as error:
            self._log.warning("sidecar not stopped", alloc=alloc, reason=str(error))  # cleaning tries again
        await self._tell(SidecarStopped(alloc=alloc))

    async def _drop_ahead(self, held: Held | None) -> None:
        while held is not None and held.ahead:
            task, ahead = held.ahead.popitem()
            ahead.making.cancel()
            await asyncio.wait({ahead.making})
            await self._runtime.delete(sandbox_id(held.assignment.alloc, task))

    async def _clean(self, alloc: AllocId) -> None:
        held = self._held.get(alloc)
        try:
            for task in tuple(held.watchers) if held else ():
                await self._unwatch(alloc, task)
            await self._drop_ahead(held)
            for status in await self._runtime.list():
                if (owner := split(status.id)) is not None and owner[0] == alloc:
                    await self._runtime.delete(status.id)
            await self._images.release(alloc)
            await self._belongings.release(alloc)
            await self._envoys.forget(alloc)
            await self._names.detach(alloc)
            await self._networks.delete(alloc)
            if held is not None and held.reserved is not None:
                await self._networks.delete(held.reserved)
            await asyncio.to_thread(task_directory.remove, self._tasks_directory / alloc)
            for directory in self._store.allocation_directory(alloc).glob("*.vm"):
                await asyncio.to_thread(remove_guest, directory)
            await asyncio.to_thread(self._guests.forget, alloc)
        except HostError as error:
            await self._tell(StepFailed(alloc=alloc, message=f"cleaning failed: {error}"))
            return
        self._leaves.release(alloc)
        self._uids.take_back(alloc, self._store.allocation_directory(alloc))
        self._held.pop(alloc, None)
        self._found.pop(alloc, None)
        await self._tell(Cleaned(alloc=alloc))

    async def _run_check(self, command: c.RunCheck) -> None:
        async def exec_command(argv: tuple[str, ...]) -> tuple[int, str]:
            return await self._exec(sandbox_id(command.alloc, command.task), argv)

        held = self._held.get(command.alloc)
        address = workload_address(held.assignment.group) if held is not None else LOOPBACK
        outcome = await self._checks.run(command.check, command.alloc, command.port, exec_command, address=address)
        await self._tell(
            CheckRan(alloc=command.alloc, service=command.service, passing=outcome.passing, output=outcome.output)
        )

    async def _exec(self, sandbox: str, argv: tuple[str, ...]) -> tuple[int, str]:
        async with await self._runtime.exec(sandbox, argv) as process:  # killed where the check's time is over
            process.close_stdin()
            output = b""
            while (piece := await process.read()) is not None:
                output = (output + piece[1])[-_EXEC_OUTPUT_BYTES_MAX:]
            return await process.wait(), output.decode(errors="replace").strip()


def _settle(held: Held, task: TaskName, failure: str) -> None:
    """Whoever had the task ended to go on from a snapshot hears what became of it."""
    waiting = held.put_back.get(task)
    if waiting is not None and not waiting.done():
        waiting.set_result(failure)


async def _ended(watcher: asyncio.Task[None], timeout_s: float) -> bool:
    done, _ = await asyncio.wait({watcher}, timeout=timeout_s)
    return bool(done)


def _services(assignment: Assignment) -> tuple[ServiceName, ...]:
    return tuple(service.name for service in assignment.group.services)
