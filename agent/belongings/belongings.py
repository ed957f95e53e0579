"""A task's belongings: ready before it starts, renewed when they change, gone when it has ended.

Owns RUN/belongings and what follows from a change. Tasks: `run`, which renders anew what speaks of the mesh, and one
for each allocation that is being renewed; a change that cannot be had is asked for again until it can, or until the
allocation is over.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from agent.belongings import memory, templates
from agent.belongings.artifacts import ARTIFACTS, Artifacts, KeptArtifact
from agent.belongings.devices import Devices
from agent.belongings.facts import Rendered
from agent.belongings.memory import BELONGINGS, TaskMemory
from agent.belongings.mounted import Mounted
from agent.belongings.secrets import Ask, Secrets, SecretsInMemory
from agent.belongings.sticky import StickyDisks
from agent.belongings.volumes import Disk, Volumes
from agent.core.events import BelongingsTold, RestartWanted
from agent.sandbox.spec import Device, Mount, StartError
from outrider.errors import HostError
from outrider.ids import AllocId, NodeId, TaskName
from outrider.log import Log
from outrider.model.allocation import Assignment
from outrider.model.belongings import OnChange, SecretUse, Template
from outrider.model.job import Isolation, Task, Value, is_guest
from outrider.model.mesh import MeshView

SECRETS, TEMPLATES = "/secrets", "/templates"  # inside
_PARTS = ("secrets", "templates")
_RETRY_S, _RETRY_MAX_S = 1.0, 30.0
_MESH_S = 1.0  # changes of the mesh within it are rendered as one

Signal = Callable[[AllocId, TaskName, int], Awaitable[None]]  # raises HostError where nothing runs
Replace = Callable[[AllocId, TaskName, str, bytes], Awaitable[None]]  # "secrets/NAME", what it holds now; HostError


class BroughtToGuest(Value, frozen=True, kw_only=True):
    """What a guest gets of it, which sees no directory of the node's."""

    disks: tuple[Disk, ...] = ()
    env: Mapping[str, str] = {}
    secrets: Mapping[str, str] = {}  # as `Brought` has them
    files: Mapping[str, bytes] = {}  # "secrets/NAME" and "templates/NAME"
    artifacts: tuple[KeptArtifact, ...] = ()


class Brought(Value, frozen=True, kw_only=True):
    """What a task's sandbox gets of it."""

    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = {}
    secrets: Mapping[str, str] = {}  # "secret.NAME" -> its text: those that the task's `env` speaks of
    devices: tuple[Device, ...] = ()


class Belongings:
    def __init__(
        self,
        *,
        node: NodeId,
        run_directory: Path,
        ask: Ask,
        signal: Signal,
        replace: Replace,
        tell: Callable[[RestartWanted | BelongingsTold], Awaitable[None]],
        volumes: Volumes,
        artifacts: Artifacts,
        devices: Devices,
        mounted: Mounted,
        sticky: StickyDisks,
        tasks: asyncio.TaskGroup,
        rng: random.Random,
        log: Log,
    ) -> None:
        self._node = node
        self._directory = run_directory / BELONGINGS
        self._secrets = SecretsInMemory(ask)
        self._signal = signal
        self._replace_in_guest = replace
        self._to_core = tell
        self._volumes = volumes
        self._artifacts = artifacts
        self._devices = devices
        self._mounted = mounted
        self._sticky = sticky
        self._tasks = tasks
        self._rng = rng
        self._log = log
        self._view = MeshView()
        self._mesh_changed = asyncio.Event()
        self._running: dict[AllocId, Assignment] = {}  # with anything that may have to be renewed
        self._newest: dict[AllocId, Assignment] = {}  # of those being renewed
        self._telling: dict[tuple[AllocId, TaskName], asyncio.Task[None]] = {}  # after their splay

    async def prepare(self, assignment: Assignment, task: Task, *, uid_first: int, user: int, group: int) -> Brought:
        """Before each start of a process. `user`: inside, as which it runs. Raises StartError and HostError."""
        devices = self._devices.give(assignment.alloc, task)
        mounts = await self._volumes.mount(assignment, task, uid_first=uid_first, user=user, group=group)
        sticky = self._sticky.give(assignment, task, uid_first=uid_first, user=user)
        given = await self._give(assignment, task, uid_first + user)
        fetched = await self._show_artifacts(assignment, task, uid_first)
        return Brought(
            mounts=(*mounts, *sticky, *given.mounts, *fetched), env=given.env, secrets=given.secrets, devices=devices
        )

    async def prepare_guest(self, assignment: Assignment, task: Task, *, owner: int) -> BroughtToGuest:
        """Before each start of a vm, whose emulator runs as the host's `owner`. Raises StartError and HostError.

        From here on the directory `memory.guest_memory` is there for what the guest is shown.
        """
        disks = await self._volumes.disks(assignment, task, owner=owner)
        given = await self._give(assignment, task, owner)
        return BroughtToGuest(
            disks=disks,
            env=given.env,
            secrets=given.secrets,
            files=self._memory(assignment.alloc, task.name).files(*_PARTS),
            artifacts=tuple(map(self._artifacts.kept, task.artifacts)),
        )

    def adopted(self, assignment: Assignment) -> None:
        """An earlier agent prepared its tasks, and they run."""
        if any(task.templates for task in assignment.group.tasks):
            self._running[assignment.alloc] = assignment
            self._mesh_changed.set()

    def set_view(self, view: MeshView) -> None:
        self._view = view
        self._mesh_changed.set()

    async def run(self) -> None:
        """Until cancelled: what templates say of the mesh is kept up to date."""
        while True:
            await self._mesh_changed.wait()
            self._mesh_changed.clear()
            for assignment in tuple(self._running.values()):
                if templates.services_named(assignment):
                    self._tasks.create_task(self.renew(assignment), name=f"{assignment.alloc}-belongings")
            await asyncio.sleep(_MESH_S)

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
        telling = self._telling.pop((alloc, task), None)
        if telling is not None:
            telling.cancel()
        self._memory(alloc, task).clear()

    async def release(self, alloc: AllocId) -> None:
        """Nothing runs of it. Raises HostError."""
        self._newest.pop(alloc, None)
        self._running.pop(alloc, None)
        self._secrets.forget(alloc)
        self._devices.release(alloc)
        self._sticky.release(alloc)
        await asyncio.to_thread(memory.remove, self._directory / alloc)
        await self._volumes.release(alloc)

    async def _show_artifacts(self, assignment: Assignment, task: Task, uid_first: int) -> tuple[Mount, ...]:
        found = []
        for number, artifact in enumerate(task.artifacts):
            source, name = self._artifacts.path(artifact), f"artifact{number}"
            shown = await self._mounted.show(source, assignment.alloc, task.name, name, uid_first=uid_first)
            found.append(Mount(source=shown, target=f"{ARTIFACTS}/{artifact.path}"))
        return tuple(found)

    async def _give(self, assignment: Assignment, task: Task, owner: int) -> Brought:
        """Secrets and templates."""
        kept = self._memory(assignment.alloc, task.name)
        if not (task.secrets or task.templates):
            if is_guest(task):
                kept.make(owner, guest=True)
            return Brought()
        values = await self._secrets.of(assignment)
        facts = templates.facts(assignment, task, self._node, values, self._view)
        rendered = await templates.render(task, facts) if task.templates else Rendered()
        for path, text in rendered.errors.items():
            raise StartError(f"template {path}: {text}")
        kept.make(owner, guest=is_guest(task))
        mounts = []
        for use in task.secrets:
            if use.file:
                kept.write("secrets", use.file, values[use.name].content)
        for path, text in rendered.files.items():
            kept.write("templates", path, text.encode())
        if any(use.file for use in task.secrets):
            mounts.append(Mount(source=str(kept.part("secrets")), target=SECRETS))
        if task.templates:
            mounts.append(Mount(source=str(kept.part("templates")), target=TEMPLATES))
            self._running[assignment.alloc] = assignment
        kept.note({use.name: values[use.name].version for use in task.secrets})
        env = {use.env: _text(values[use.name].content, use) for use in task.secrets if use.env}
        texts = {
            f"secret.{use.name}": _text(values[use.name].content, use)
            for use in task.secrets
            if any(f"${{secret.{use.name}}}" in value for value in task.env.values())
        }
        return Brought(mounts=tuple(mounts), env=env, secrets=texts)

    async def _renew(self, assignment: Assignment) -> None:
        if assignment.alloc in self._running:
            self._running[assignment.alloc] = assignment
        values = await self._secrets.of(assignment)
        for task in assignment.group.tasks:
            if self._memory(assignment.alloc, task.name).given() is not None:  # it runs; else its start has the newest
                await self._renew_secrets(assignment.alloc, task, values)
                await self._renew_templates(assignment, task, values)

    async def _renew_secrets(self, alloc: AllocId, task: Task, values: Secrets) -> None:
        kept = self._memory(alloc, task.name)
        given = kept.given()
        if given is None:
            return
        changed = [use for use in task.secrets if given.secrets.get(use.name) != values[use.name].version]
        for use in changed:
            if use.file:
                await self._replace(alloc, task, use, f"secrets/{use.file}", values[use.name].content)
        if kept.given() is None:
            return  # it has ended meanwhile
        kept.note({use.name: values[use.name].version for use in task.secrets})
        if changed:
            names = ", ".join(sorted(use.name for use in changed))
            self._log.info("secrets renewed", alloc=alloc, task=task.name, secrets=names)
            await self._tell(alloc, task.name, changed, f"secret {names} changed")

    async def _renew_templates(self, assignment: Assignment, task: Task, values: Secrets) -> None:
        """One that cannot be rendered keeps what it said before, and the task's status says so."""
        if not task.templates:
            return
        alloc = assignment.alloc
        rendered = await templates.render(task, templates.facts(assignment, task, self._node, values, self._view))
        kept = self._memory(alloc, task.name)
        if kept.given() is None:
            return  # it has ended meanwhile
        wrong = "; ".join(f"template {path} is as it was: {text}" for path, text in sorted(rendered.errors.items()))
        await self._to_core(BelongingsTold(alloc=alloc, task=task.name, message=wrong))
        changed: list[Template] = []
        try:
            for each in task.templates:
                if each.path in rendered.files:
                    content = rendered.files[each.path].encode()
                    if await self._replace(alloc, task, each, f"templates/{each.path}", content):
                        changed.append(each)
        finally:  # what is replaced by now is never found to have changed again
            if changed:
                names = ", ".join(each.path for each in changed)
                self._log.info("templates rendered", alloc=alloc, task=task.name, templates=names)
                self._tell_after(assignment, task, changed, f"template {names} changed")

    async def _replace(self, alloc: AllocId, task: Task, what: SecretUse | Template, path: str, content: bytes) -> bool:
        """A file of a task that runs. Whether it changed. In a guest that starts again anyway it is left as it was."""
        kept = self._memory(alloc, task.name)
        part, _, name = path.partition("/")
        if kept.given() is None or kept.holds(part, name, content):
            return False
        if task.isolation is Isolation.VM and what.on_change in (OnChange.SIGNAL, OnChange.NONE):
            await self._replace_in_guest(alloc, task.name, path, content)
            if kept.given() is None:
                return False  # it has ended meanwhile
        return kept.write(part, name, content)

    def _tell_after(self, assignment: Assignment, task: Task, changed: list[Template], reason: str) -> None:
        """Copies see a change at the same moment: each waits for its turn, as the group's `update` has it."""
        key = (assignment.alloc, task.name)
        waiting = self._telling.get(key)
        if waiting is not None and not waiting.done():
            return  # it will be told, and finds the newest
        update = assignment.group.update
        splay_s = max(template.splay_s for template in changed)
        turn = assignment.index // update.max_parallel
        delay_s = turn * (splay_s + update.min_healthy_s) + self._rng.uniform(0.0, splay_s)
        self._telling[key] = self._tasks.create_task(
            self._told_later(delay_s, assignment.alloc, task.name, changed, reason), name=f"{assignment.alloc}-told"
        )

    async def _told_later(
        self, delay_s: float, alloc: AllocId, task: TaskName, changed: list[Template], reason: str
    ) -> None:
        await asyncio.sleep(delay_s)
        self._telling.pop((alloc, task), None)
        await self._tell(alloc, task, changed, reason)

    async def _tell(
        self, alloc: AllocId, task: TaskName, changed: list[SecretUse] | list[Template], reason: str
    ) -> None:
        """A restart says it all; else each signal once."""
        if any(use.on_change is OnChange.RESTART for use in changed):
            await self._to_core(RestartWanted(alloc=alloc, task=task, reason=reason))
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
        raise StartError(
            f"secret {use.name} is no text: give it to the task as a file, not in its environment"
        ) from error
    if "\0" in text:
        raise StartError(f"secret {use.name} has a NUL in it: give it to the task as a file, not in its environment")
    return text.removesuffix("\n")
