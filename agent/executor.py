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
from agent.drivers.process import Place, sandbox_id, sandbox_spec
from agent.envoys import Envoys
from agent.held import SIDECAR, Held, sandbox_directory, split, task_exit
from agent.leaves import Leaves
from agent.names import Names
from agent.network.namespaces import AllocationNetwork, AllocationNetworks
from agent.network.plan import NetworkSpec, gateway_address, next_address
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, StartError
from agent.store import Store
from agent.uids import Uids
from outrider.errors import HostError, InputError
from outrider.ids import AllocId, NodeId, ServiceName, TaskName
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.job import inner_ports
from outrider.model.mesh import PUBLIC_PORT

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
        tell: Callable[[AllocEvent], Awaitable[None]],
        write: Callable[[c.Save | c.Acknowledge | c.Forget], None],
        report: Callable[[c.Report], None],
        tasks: asyncio.TaskGroup,
        log: Log,
    ) -> None:
        self._node = node
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
            case c.StartTask():
                self._watch(command.assignment.alloc, command.task.name, self._run_task(command))
            case c.AdoptTask():
                alloc = self._hold(command.assignment).assignment.alloc
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
        command: c.CreateNetwork | c.RunCheck | c.DrainSidecar | c.StopTask | c.StopSidecar | c.Clean,
    ) -> None:
        work: Coroutine[None, None, None]
        match command:
            case c.CreateNetwork():
                alloc, work = command.assignment.alloc, self._create_network(command.assignment)
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
            uids = self._uids.give(alloc, names, self._store.allocation_directory(alloc))
            held = self._held[alloc] = Held(assignment=assignment, uids=uids, watchers={})
            network = self._found.pop(alloc, None)
            if network is not None:
                held.namespace, held.local_address = network.namespace, network.local_address
                self._leaves.acquire(alloc, _services(assignment), self._tasks)
                self._names.adopt(alloc, _upstreams(assignment))
        held.assignment = assignment
        return held

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
            network = await self._networks.create(self._network_spec(held))
        except HostError as error:
            await self._tell(StepFailed(alloc=alloc, message=f"no network: {error}"))
            return
        held.namespace, held.local_address = network.namespace, network.local_address
        # Names are there long before the first task is: Envoy takes its time.
        self._tasks.create_task(self._names.attach(alloc, _upstreams(assignment)), name=f"{alloc}-names")
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
        return NetworkSpec(
            alloc=assignment.alloc,
            local_address=address,
            host_side_address=gateway_address(self._block),
            mesh_ports=tuple(
                (assignment.mesh_ports[service.name], PUBLIC_PORT + index)
                for index, service in enumerate(services)
                if service.name in assignment.mesh_ports
            ),
            static_ports=tuple(
                (port.static, ports[port.name]) for port in assignment.group.network.ports if port.static is not None
            ),
            egress=assignment.group.network.egress,
            sidecar_uid=held.uids.sidecar + INNER_USER,
            workload_uids=held.uids.workload,
            dns_uid=self._uids.responder + INNER_USER,
        )

    async def _run_task(self, command: c.StartTask) -> None:
        alloc, task = command.assignment.alloc, command.task
        held = self._hold(command.assignment)
        try:
            directory = self._tasks_directory / alloc / task.name
            uid_first = held.uids.task(task.name)
            place = Place(
                node=self._node,
                uid_first=uid_first,
                network_namespace=held.namespace,
                directory=str(sandbox_directory(self._store.allocation_directory(alloc), task.name)),
                task_directory=str(directory),
                resolv_conf=str(self._resolv_conf),
            )
            spec = sandbox_spec(command.assignment, task, place)
            task_directory.prepare(
                directory, files=task.files, size_bytes=task.resources.disk_bytes, uid_first=uid_first
            )
            status = await self._runtime.start(spec)
        except (InputError, StartError) as error:
            message = f"{task.name} cannot start: {error}"
            await self._tell(TaskStartFailed(alloc=alloc, task=task.name, message=message, retry=False))
            return
        except HostError as error:
            message = f"{task.name} did not start: {error}"
            await self._tell(TaskStartFailed(alloc=alloc, task=task.name, message=message))
            return
        await self._tell(TaskStarted(alloc=alloc, task=task.name, started_at_s=status.started_at_s))
        await self._watch_task(alloc, task.name)

    async def _watch_task(self, alloc: AllocId, task: TaskName) -> None:
        directory = sandbox_directory(self._store.allocation_directory(alloc), task)
        try:
            exit_ = await task_exit(self._runtime, sandbox_id(alloc, task), directory)
        except HostError as error:
            self._log.warning("exit unseen", alloc=alloc, task=task, reason=str(error))
            exit_ = TaskExit(finished_at_s=time.time())
        await self._tell(TaskExited(alloc=alloc, task=task, exit=exit_))

    async def _stop_task(self, command: c.StopTask) -> None:
        task, sandbox = command.task, sandbox_id(command.alloc, command.task.name)
        watcher = self._held[command.alloc].watchers.get(task.name)
        if watcher is None:
            return
        with contextlib.suppress(HostError):  # it has ended meanwhile: its watcher tells
            await self._runtime.signal(sandbox, signal.Signals[task.kill_signal])
            if await _ended(watcher, task.kill_timeout_s):
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

    async def _clean(self, alloc: AllocId) -> None:
        held = self._held.get(alloc)
        try:
            for task in tuple(held.watchers) if held else ():
                await self._unwatch(alloc, task)
            for status in await self._runtime.list():
                if (owner := split(status.id)) is not None and owner[0] == alloc:
                    await self._runtime.delete(status.id)
            await self._envoys.forget(alloc)
            await self._names.detach(alloc)
            await self._networks.delete(alloc)
            await asyncio.to_thread(task_directory.remove, self._tasks_directory / alloc)
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

        outcome = await self._checks.run(command.check, command.alloc, command.port, exec_command)
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


async def _ended(watcher: asyncio.Task[None], timeout_s: float) -> bool:
    done, _ = await asyncio.wait({watcher}, timeout=timeout_s)
    return bool(done)


def _services(assignment: Assignment) -> tuple[ServiceName, ...]:
    return tuple(service.name for service in assignment.group.services)


def _upstreams(assignment: Assignment) -> frozenset[ServiceName]:
    return frozenset(upstream.service for service in assignment.group.services for upstream in service.upstreams)
