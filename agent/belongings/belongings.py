"""A task's belongings: ready before it starts, renewed when they change, gone when it has ended.

Owns RUN/belongings and what follows from a change. Starts no task of its own; a change that cannot be had is asked for
again until it can, or until the allocation is over.
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from agent.belongings import memory
from agent.belongings.artifacts import ARTIFACTS, Artifacts
from agent.belongings.memory import TaskMemory
from agent.belongings.mounted import Mounted
from agent.belongings.secrets import Ask, SecretsInMemory
from agent.belongings.volumes import Disk, Volumes
from agent.core.events import RestartWanted
from agent.sandbox.spec import Mount, StartError
from outrider.errors import HostError
from outrider.ids import AllocId, TaskName
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.belongings import OnChange, SecretUse
from outrider.model.job import Task, Value

SECRETS = "/secrets"  # inside
_RETRY_S, _RETRY_MAX_S = 1.0, 30.0

Signal = Callable[[AllocId, TaskName, int], Awaitable[None]]  # raises HostError where nothing runs


class Brought(Value, frozen=True, kw_only=True):
    """What a task's sandbox gets of it."""

    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = {}


class Belongings:
    def __init__(
        self,
        *,
        run_directory: Path,
        ask: Ask,
        signal: Signal,
        restart: Callable[[RestartWanted], Awaitable[None]],
        volumes: Volumes,
        artifacts: Artifacts,
        mounted: Mounted,
        log: Log,
    ) -> None:
        self._directory = run_directory / "belongings"
        self._secrets = SecretsInMemory(ask)
        self._signal = signal
        self._restart = restart
        self._volumes = volumes
        self._artifacts = artifacts
        self._mounted = mounted
        self._log = log
        self._newest: dict[AllocId, Assignment] = {}  # of those being renewed

    async def prepare(self, assignment: Assignment, task: Task, *, uid_first: int, user: int, group: int) -> Brought:
        """Before each start of a process. `user`: inside, as which it runs. Raises StartError and HostError."""
        mounts = await self._volumes.mount(assignment, task, uid_first=uid_first, user=user, group=group)
        given = await self._give_secrets(assignment, task, uid_first + user)
        fetched = await self._show_artifacts(assignment, task, uid_first)
        return Brought(mounts=(*mounts, *given.mounts, *fetched), env=given.env)

    async def disks(self, assignment: Assignment, task: Task, *, owner: int) -> tuple[Disk, ...]:
        """Before each start of a vm, whose emulator runs as the host's `owner`."""
        return await self._volumes.disks(assignment, task, owner=owner)

    async def _show_artifacts(self, assignment: Assignment, task: Task, uid_first: int) -> tuple[Mount, ...]:
        found = []
        for number, artifact in enumerate(task.artifacts):
            source, name = self._artifacts.path(artifact), f"artifact{number}"
            shown = await self._mounted.show(source, assignment.alloc, task.name, name, uid_first=uid_first)
            found.append(Mount(source=shown, target=f"{ARTIFACTS}/{artifact.path}"))
        return tuple(found)

    async def _give_secrets(self, assignment: Assignment, task: Task, owner: int) -> Brought:
        if not task.secrets:
            return Brought()
        values = await self._secrets.of(assignment)
        kept = self._memory(assignment.alloc, task.name)
        kept.make(owner)
        mounts = []
        for use in task.secrets:
            if use.file:
                kept.write("secrets", use.file, values[use.name].content)
        if any(use.file for use in task.secrets):
            mounts.append(Mount(source=str(kept.part("secrets")), target=SECRETS))
        kept.note({use.name: values[use.name].version for use in task.secrets})
        env = {use.env: _text(values[use.name].content, use) for use in task.secrets if use.env}
        return Brought(mounts=tuple(mounts), env=env)

    async def renew(self, assignment: Assignment) -> None:
        """It changed while its tasks may run: files are replaced, then the tasks are told as each wants to be."""
        alloc = assignment.alloc
        begun = alloc in self._newest
        self._newest[alloc] = assignment
        if begun:
            return  # who began it takes this one too
        delay_s = _RETRY_S
        while (newest := self._newest.get(alloc)) is not None:
            try:
                await self._renew(newest)
            except (HostError, StartError) as error:
                self._log.warning("belongings not renewed", alloc=alloc, reason=str(error), again_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
            else:
                if self._newest.get(alloc) is newest:
                    del self._newest[alloc]

    def ended(self, alloc: AllocId, task: TaskName) -> None:
        """A run of the task is over: what it was given goes."""
        self._memory(alloc, task).clear()

    async def release(self, alloc: AllocId) -> None:
        """Nothing runs of it. Raises HostError."""
        self._newest.pop(alloc, None)
        self._secrets.forget(alloc)
        await asyncio.to_thread(memory.remove, self._directory / alloc)
        await self._volumes.release(alloc)

    async def _renew(self, assignment: Assignment) -> None:
        values = await self._secrets.of(assignment)
        for task in assignment.group.tasks:
            kept = self._memory(assignment.alloc, task.name)
            given = kept.given()
            if given is None:
                continue  # it does not run: its next start has the newest
            changed = [use for use in task.secrets if given.secrets.get(use.name) != values[use.name].version]
            for use in changed:
                if use.file:
                    kept.write("secrets", use.file, values[use.name].content)
            kept.note({use.name: values[use.name].version for use in task.secrets})
            if changed:
                names = ", ".join(sorted(use.name for use in changed))
                self._log.info("secrets renewed", alloc=assignment.alloc, task=task.name, secrets=names)
                await self._tell(assignment.alloc, task.name, changed, f"secret {names} changed")

    async def _tell(self, alloc: AllocId, task: TaskName, changed: list[SecretUse], reason: str) -> None:
        """A restart says it all; else each signal once."""
        if any(use.on_change is OnChange.RESTART for use in changed):
            await self._restart(RestartWanted(alloc=alloc, task=task, reason=reason))
            return
        for name in sorted({use.signal for use in changed if use.on_change is OnChange.SIGNAL}):
            with contextlib.suppress(HostError):  # it has ended meanwhile
                await self._signal(alloc, task, signal.Signals[name])

    def _memory(self, alloc: AllocId, task: TaskName) -> TaskMemory:
        return TaskMemory(self._directory / alloc / task)


def _text(content: bytes, use: SecretUse) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise StartError(f"secret {use.name} is no text: give it to the task as a file, not as {use.env}") from error
    if "\0" in text:
        raise StartError(f"secret {use.name} has a NUL in it: give it to the task as a file, not as {use.env}")
    return text.removesuffix("\n")
