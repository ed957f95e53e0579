"""What the executor holds of each allocation while this agent lives: uids, namespace, and the tasks that watch it."""

import asyncio
import contextlib
from pathlib import Path

import msgspec

from agent.core.events import TaskExit
from agent.drivers.process import sandbox_id
from agent.metrics import Workload
from agent.network.namespaces import AllocationNetworks
from agent.sandbox import logs
from agent.sandbox.runtime import Created, SandboxRuntime
from agent.uids import AllocUids
from agent.vms import bad_end, guest_directory, told_end
from outrider.errors import HostError
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import Assignment
from outrider.model.mesh import shares_sidecar

SIDECAR = TaskName("sidecar")  # no task can be called so where there is one: `outrider alloc logs ALLOC sidecar`
SHARED_SIDECAR = "node.sidecar"  # the sandbox of those that share one
LOG_TAIL_LINES = 20
GUEST_TAIL_LINES = 60  # a kernel's panic says why before some 40 lines of where


class Ahead(msgspec.Struct, kw_only=True):
    """A sandbox that is made before its task may start, of what the task was then."""

    assignment: Assignment
    making: asyncio.Task[Created | None]  # None: that did not work


class Held(msgspec.Struct, kw_only=True):
    assignment: Assignment
    uids: AllocUids
    namespace: str = ""  # path of its network namespace
    local_address: str = ""
    ahead: dict[TaskName, Ahead] = {}
    reserved: AllocId | None = None  # the namespace, not yet furnished, in which its sidecar runs already
    watchers: dict[TaskName, asyncio.Task[None]] = {}  # of each task's run, and of SIDECAR
    put_back: dict[TaskName, asyncio.Future[str]] = {}  # ended to go on from a snapshot: why it does not, or ""


def workloads(all_held: tuple[Held, ...], runtime: SandboxRuntime) -> tuple[Workload, ...]:
    """With the shared sidecar, which is no allocation's."""
    own = tuple(
        Workload(
            job=held.assignment.job,
            group=held.assignment.group.name,
            alloc=held.assignment.alloc,
            task=task,
            usage=runtime.usage(sandbox_id(held.assignment.alloc, task)),
        )
        for held in all_held
        for task in held.watchers
        if task != SIDECAR or not shares_sidecar(held.assignment.group)
    )
    shared = runtime.usage(SHARED_SIDECAR)
    if not shared.memory_bytes:
        return own
    return (*own, Workload(job="", group="", alloc="node", task=SIDECAR, usage=shared))


async def refused(all_held: tuple[Held, ...], networks: AllocationNetworks) -> dict[AllocId, int]:
    """Packets that workloads sent where nothing lets them."""
    found = {}
    for held in all_held:
        with contextlib.suppress(HostError):  # its network is not made yet, or goes just now
            found[held.assignment.alloc] = await networks.refused(held.assignment.alloc)
    return found


def sandbox_directory(allocation: Path, task: TaskName) -> Path:
    """Where a task's sandbox (or the sidecar's) has its bundle and its logs."""
    return allocation / task


async def task_exit(runtime: SandboxRuntime, sandbox: str, directory: Path) -> TaskExit:
    """Waits until the sandbox has ended. Raises HostError where there is none."""
    ended = await runtime.wait(sandbox)
    # A guest that panicked leaves its emulator well.
    reason = bad_end(guest_directory(directory)) if ended.code == 0 else ""
    told, out_of_memory = told_end(guest_directory(directory)) if ended.code == 0 else (0, False)
    code = told or 1 if reason else told or ended.code
    lines = GUEST_TAIL_LINES if guest_directory(directory).is_dir() else LOG_TAIL_LINES
    tail = "" if code == 0 else await asyncio.to_thread(logs.last_lines, str(directory), lines)
    return TaskExit(
        code=code,
        signal=ended.signal,
        oom_killed=ended.oom_killed or out_of_memory,
        finished_at_s=ended.finished_at_s,
        log_tail=tail.replace("\r\n", "\n"),
        reason=reason,
    )


def split(sandbox: str) -> tuple[AllocId, TaskName] | None:
    """The allocation and the task that a sandbox's id names; None for the node's own."""
    alloc, _, task = sandbox.partition(".")
    return None if alloc == "node" or not task else (AllocId(alloc), TaskName(task))
