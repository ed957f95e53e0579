"""What operators do with guests and their snapshots on this node: each call a conversation, as a program's is.

Owns the verbs. What they say goes to stderr, what they give to stdout; an export is a tar on stdout, an import one on
stdin. Tasks: one for each call while it runs, which the call's end cancels; threads: one for each tar.
"""

import asyncio
import fcntl
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.drivers.microvm import ROOT
from agent.drivers.process import sandbox_id
from agent.drivers.vm import AGENT, QMP
from agent.guest_files import Download, GuestFile, Upload
from agent.guest_states import GuestStates
from agent.held import Held, sandbox_directory
from agent.metrics import Inside
from agent.operation import Operation
from agent.qmp.guest_agent import GuestAgents
from agent.qmp.inside import inside
from agent.sandbox.descriptors import readable, writable
from agent.sandbox.runtime import SandboxRuntime
from agent.snapshot_files import read_snapshot, write_snapshot
from agent.snapshots import Manifest
from agent.store import Store
from agent.vms import Vms, guest_directory
from outrider.errors import HostError, OutriderError, RefusedError
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import Isolation, Task, is_guest
from outrider.v1.fleet_pb2 import VmCommand, VmVerb

T = TypeVar("T")

_PUT_BACK_S = 150.0
_READ_BYTES = 256 * 1024
_PIPE_BYTES = 1024 * 1024


class VmOperations:
    def __init__(
        self,
        *,
        store: Store,
        runtime: SandboxRuntime,
        held: Callable[[], tuple[Held, ...]],
        vms: Vms,
        states: GuestStates,
        agents: GuestAgents,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self._held = held
        self._vms = vms
        self._states = states
        self._agents = agents

    async def start(self, alloc: AllocId, command: VmCommand) -> Operation:  # noqa: PLR0911 - one for each verb
        """Raises RefusedError where there is no such verb, or no such guest."""
        name = command.snapshot
        match command.verb:
            case VmVerb.VM_VERB_SNAPSHOT:
                return Said(self._keep(alloc, name))
            case VmVerb.VM_VERB_RESTORE:
                return Said(self._put_back(alloc, name))
            case VmVerb.VM_VERB_LIST:
                return Said(self._list())
            case VmVerb.VM_VERB_DELETE:
                return Said(self._delete(name))
            case VmVerb.VM_VERB_EXPORT:
                snapshots = self._states.snapshots
                manifest = snapshots.manifest(name)
                return Export(lambda pipe: write_snapshot(snapshots, manifest, pipe))
            case VmVerb.VM_VERB_IMPORT:
                return Import(lambda pipe: read_snapshot(self._states.snapshots, name, pipe), self._states.changed)
            case VmVerb.VM_VERB_READ:
                return Download(await self._open(alloc, command.path, "r"))
            case VmVerb.VM_VERB_WRITE:
                return Upload(await self._open(alloc, command.path, "w"))
            case verb:
                raise RefusedError("unsupported", f"no operation {verb} on a vm: the caller is of a newer version")

    async def inside(self) -> tuple[Inside, ...]:
        """What this node's guests say of themselves, all asked at once."""
        found = [(held.assignment, task) for held in self._held() if (task := _vm_task(held.assignment)) is not None]
        found = [
            (assignment, task) for assignment, task in found if not self._vms.is_busy(self._directory(assignment, task))
        ]
        usages = await asyncio.gather(
            *(inside(place / QMP, place / AGENT, self._agents) for place in (self._directory(*each) for each in found))
        )
        return tuple(
            Inside(job=one.job, group=one.group.name, alloc=one.alloc, task=task.name, usage=usage)
            for (one, task), usage in zip(found, usages, strict=True)
        )

    def _directory(self, assignment: Assignment, task: Task) -> Path:
        return guest_directory(self._sandbox(assignment.alloc, task))

    async def _keep(self, alloc: AllocId, snapshot: str) -> str:
        """The guest that runs as a snapshot of this node; it runs on."""
        held, task = self._own_guest(alloc)
        sandbox = self._sandbox(alloc, task)
        return _line(await self._vms.keep(snapshot, held.assignment, task, sandbox))

    async def _put_back(self, alloc: AllocId, snapshot: str) -> str:
        """The guest goes on from a snapshot; what it did since is lost."""
        held, task = self._own_guest(alloc)
        sandbox = self._sandbox(alloc, task)
        with self._vms.alone_with(guest_directory(sandbox)):
            await self._vms.plan_return(snapshot, task, sandbox)
            done = held.put_back[task.name] = asyncio.get_running_loop().create_future()
            try:
                await self._runtime.signal(sandbox_id(alloc, task.name), signal.SIGKILL)
                async with asyncio.timeout(_PUT_BACK_S):
                    failure = await done
            except TimeoutError as error:
                step = f"{task.name} did not go on from {snapshot} within {_PUT_BACK_S:g} s"
                raise HostError(alloc, step=step) from error
            finally:
                held.put_back.pop(task.name, None)
        if failure:
            raise RefusedError("not-restored", failure)
        return ""

    async def _open(self, alloc: AllocId, path: str, mode: str) -> GuestFile:
        held, task = self._guest(alloc)
        line = guest_directory(self._sandbox(held.assignment.alloc, task)) / AGENT
        inside = f"{ROOT}/{path.lstrip('/')}" if task.isolation is Isolation.VM else path
        file = GuestFile(self._agents, line, inside)
        await file.open(mode)
        return file

    async def _list(self) -> str:
        manifests = await asyncio.to_thread(lambda: tuple(self._states.snapshots.all()))
        return "".join(map(_line, manifests))

    async def _delete(self, snapshot: str) -> str:
        await asyncio.to_thread(self._states.remove, snapshot)
        return ""

    def _own_guest(self, alloc: AllocId) -> tuple[Held, Task]:
        held, task = self._guest(alloc)
        if task.isolation is Isolation.VM:
            message = f"{task.name} is a process with a kernel of its own: only the state of a `driver: vm` is kept"
            raise RefusedError("unsupported", message)
        return held, task

    def _guest(self, alloc: AllocId) -> tuple[Held, Task]:
        found = (held for held in self._held() if held.assignment.alloc == alloc)
        held = next(found, None)
        task = _vm_task(held.assignment) if held is not None else None
        if held is None or (task is not None and (task.name not in held.watchers or held.watchers[task.name].done())):
            raise RefusedError("not-running", f"{alloc} does not run; `outrider alloc status {alloc}` says why")
        if task is None:
            raise RefusedError("unsupported", f"{alloc} is no vm: a process has no state to keep")
        return held, task

    def _sandbox(self, alloc: AllocId, task: Task) -> Path:
        return sandbox_directory(self._store.allocation_directory(alloc), TaskName(task.name))


class Said(Operation):
    """One answer. It is worked out to its end, whether or not somebody waits for it."""

    def __init__(self, work: Awaitable[str]) -> None:
        self._work = asyncio.ensure_future(work)
        self._said = False

    async def read(self) -> tuple[str, bytes] | None:
        text = await asyncio.shield(self._work)
        if self._said or not text:
            return None
        self._said = True
        return "stdout", text.encode()

    async def __aexit__(self, *exc_info: object) -> None:
        with suppress(OutriderError):  # told, or nobody is there to hear it
            await self._work


class Export(Operation):
    """What a thread writes into a pipe."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self._pipe, end = _pipe()
        os.set_blocking(self._pipe, False)
        self._work = asyncio.ensure_future(asyncio.to_thread(_closing, work, end))

    async def read(self) -> tuple[str, bytes] | None:
        while True:
            try:
                data = os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                await readable(self._pipe)
                continue
            if data:
                return "stdout", data
            await self._work
            return None

    async def __aexit__(self, *exc_info: object) -> None:
        os.close(self._pipe)  # a thread that still writes gets EPIPE
        with suppress(OutriderError):  # told, or nobody is there to hear it
            await self._work


class Import(Operation):
    """What a thread reads from a pipe, and what it makes of it."""

    def __init__(self, work: Callable[[int], Manifest], changed: Callable[[], None]) -> None:
        end, self._pipe = _pipe()
        os.set_blocking(self._pipe, False)
        self._closed = False
        self._told = False
        self._changed = changed
        self._work: asyncio.Future[Manifest] = asyncio.ensure_future(asyncio.to_thread(_closing, work, end))

    async def write(self, data: bytes) -> None:
        while data and not self._closed:
            try:
                data = data[os.write(self._pipe, data) :]
            except BlockingIOError:
                await writable(self._pipe)
            except BrokenPipeError:
                return  # it has seen enough: `read` says why

    def close_stdin(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._pipe)

    async def read(self) -> tuple[str, bytes] | None:
        manifest = await asyncio.shield(self._work)
        if self._told:
            return None
        self._told = True
        self._changed()
        return "stdout", _line(manifest).encode()

    async def __aexit__(self, *exc_info: object) -> None:
        self.close_stdin()  # a thread that still reads meets the end, too early
        with suppress(OutriderError):  # told, or nobody is there to hear it
            await self._work


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    with suppress(PermissionError):  # more than /proc/sys/fs/pipe-max-size: then a small one
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return ends


def _closing(work: Callable[[int], T], descriptor: int) -> T:
    try:
        return work(descriptor)
    finally:
        os.close(descriptor)


def _vm_task(assignment: Assignment) -> Task | None:
    return next((task for task in assignment.group.tasks if is_guest(task)), None)


def _line(manifest: Manifest) -> str:
    return msgspec.json.encode(manifest).decode() + "\n"
