"""What operators may read and run on this node: logs, ended tasks' too, and programs beside a running task."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from agent.belongings.volumes import Volumes
from agent.console import Console, open_console
from agent.drivers.microvm import INSIDE
from agent.drivers.process import sandbox_id
from agent.drivers.vm import AGENT, CONSOLE
from agent.guest_terminal import GuestTerminal, open_terminal
from agent.held import SIDECAR, Held, sandbox_directory
from agent.operation import Operation
from agent.qmp.guest_agent import GuestAgents, GuestProgram
from agent.sandbox import logs
from agent.sandbox.execution import ExecProcess
from agent.sandbox.runtime import SandboxRuntime
from agent.store import Store
from agent.vm_operations import VmOperations
from agent.vms import guest_directory
from outrider.errors import RefusedError
from outrider.ids import AllocId, TaskName
from outrider.model.belongings import Volume
from outrider.model.job import Isolation, TaskRole, has_guest
from outrider.v1.fleet_pb2 import VmCommand


class Sources:
    """`operations`: on guests and their snapshots. `shared_log`: where that of an allocation on a shared sidecar
    is, and what its lines have in it."""

    def __init__(
        self,
        *,
        store: Store,
        runtime: SandboxRuntime,
        held: Callable[[], tuple[Held, ...]],
        operations: VmOperations,
        agents: GuestAgents,
        volumes: Volumes,
        shared_log: Callable[[AllocId], tuple[Path, bytes] | None],
    ) -> None:
        self._volumes = volumes
        self._shared_log = shared_log
        self._operations = operations
        self._store = store
        self._runtime = runtime
        self._held = held
        self._agents = agents
        self._consoles: set[Path] = set()  # those that somebody sits at
        self._terminals: set[Path] = set()  # of guests, likewise

    async def exec(
        self, alloc: AllocId, task: TaskName, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> ExecProcess | GuestProgram | GuestTerminal:
        """Raises RefusedError where there is nothing to run it in, HostError where the host objects."""
        task = self._task(alloc, task)
        if task == SIDECAR:
            raise RefusedError("denied", "nothing can be run in a sidecar: its namespace and its key are its own")
        if not await self._runs(sandbox_id(alloc, task)):
            raise RefusedError(
                "not-running", f"{task} of {alloc} does not run; `outrider alloc status {alloc}` says why"
            )
        if self._is_guest(alloc):
            if not tty:
                return await self._guest_exec(alloc, task, command)
            return await self._guest_terminal(alloc, task, command, rows, columns)
        return await self._runtime.exec(sandbox_id(alloc, task), command, tty=tty, rows=rows, columns=columns)

    async def _guest_exec(self, alloc: AllocId, task: TaskName, command: tuple[str, ...]) -> GuestProgram:
        if not command:
            raise RefusedError("invalid", "no command")
        wrap = (INSIDE,) if self._is_process(alloc) else ()
        return await self._agents.start(self._guest_agent(alloc, task), (*wrap, *command))

    async def _guest_terminal(
        self, alloc: AllocId, task: TaskName, command: tuple[str, ...], rows: int, columns: int
    ) -> GuestTerminal:
        if not self._is_process(alloc):
            message = f"{task} is a vm, where the QEMU guest agent runs programs, and it has no terminals"
            raise RefusedError("unsupported", f"{message}: say --no-tty, or sit down at `outrider vm console {alloc}`")
        if not command:
            raise RefusedError("invalid", "no command")
        agent = self._guest_agent(alloc, task)
        return await open_terminal(self._agents, agent, self._terminals, command, rows, columns)

    def _guest_agent(self, alloc: AllocId, task: TaskName) -> Path:
        return guest_directory(sandbox_directory(self._store.allocation_directory(alloc), task)) / AGENT

    async def console(self, alloc: AllocId, task: TaskName) -> Console:
        """Raises RefusedError where it is no vm that runs, or somebody sits there already."""
        task = self._task(alloc, task)
        if task == SIDECAR or not self._is_guest(alloc):
            raise RefusedError("unsupported", f"{task} of {alloc} is a process: it has no console; use exec or logs")
        sandbox = sandbox_directory(self._store.allocation_directory(alloc), task)
        if not await self._runs(sandbox_id(alloc, task)):
            raise RefusedError("not-running", f"{task} of {alloc} does not run")
        return open_console(guest_directory(sandbox) / CONSOLE, self._consoles)

    async def vm(self, alloc: AllocId, command: VmCommand) -> Operation:
        """Raises RefusedError where there is nothing to do it with."""
        return await self._operations.start(alloc, command)

    async def volume(self, operation: str, volume: Volume, snapshot: str) -> int:
        """Raises RefusedError and HostError."""
        match operation:
            case "create":
                return await self._volumes.create(volume)
            case "delete":
                return await self._volumes.delete(volume)
            case "snapshot":
                return await self._volumes.snapshot(volume, snapshot)
            case "restore":
                return await self._volumes.restore(volume, snapshot)
            case "delete_snapshot":
                return await self._volumes.delete_snapshot(volume, snapshot)
            case _:
                raise RefusedError("unsupported", f"{operation}: this agent is older than its controller")

    async def logs(
        self, alloc: AllocId, task: TaskName, *, streams: frozenset[str], tail_lines: int, follow: bool
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Pieces as (stream, bytes); followed over restarts of the task, until the allocation has ended."""
        task = self._task(alloc, task)
        lives = bool(self._store.tasks(alloc)) or self._holds(alloc)
        kept = self._store.allocation_directory(alloc) if lives else self._store.ended.directory(alloc)
        shared = self._shared_log(alloc) if task == SIDECAR else None
        directory, mark = shared or (sandbox_directory(kept, task), b"")

        def following() -> bool:
            return follow and self._holds(alloc)

        async for piece in logs.read(
            str(directory),
            lines=None if tail_lines < 0 else tail_lines,
            stream=next(iter(streams)) if len(streams) == 1 else None,
            mark=mark,
            following=following,
        ):
            yield piece.stream, piece.data

    def _task(self, alloc: AllocId, task: TaskName) -> TaskName:
        """The one that is meant. Raises RefusedError where it cannot be known."""
        tasks = self._store.tasks(alloc) or self._store.ended.tasks(alloc)
        known = [task.name for task in tasks]
        if task == SIDECAR and self._holds(alloc):
            return task  # of a gateway too, which has no tasks
        if not known:
            raise RefusedError("not-found", f"allocation {alloc} is not on this node, or was forgotten")
        if task in known or task == SIDECAR:
            return task
        mains = [one.name for one in tasks if one.role is TaskRole.MAIN]
        if not task and len(mains) == 1:
            return mains[0]
        what = f"no task {task!r}" if task else "several tasks"
        raise RefusedError("ambiguous", f"allocation {alloc} has {what}; say which: {', '.join(known)} or {SIDECAR}")

    def _holds(self, alloc: AllocId) -> bool:
        return any(held.assignment.alloc == alloc for held in self._held())

    def _is_process(self, alloc: AllocId) -> bool:
        """In a guest of ours, which keeps its image apart."""
        tasks = (
            task for held in self._held() if held.assignment.alloc == alloc for task in held.assignment.group.tasks
        )
        return any(task.isolation is Isolation.VM for task in tasks)

    def _is_guest(self, alloc: AllocId) -> bool:
        return any(held.assignment.alloc == alloc and has_guest(held.assignment.group) for held in self._held())

    async def _runs(self, sandbox: str) -> bool:
        return any(status.id == sandbox and status.running for status in await self._runtime.list())
