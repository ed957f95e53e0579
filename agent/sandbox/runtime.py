"""Starts, watches, signals and removes sandboxes: crun under conmon.

Owns everything of a sandbox but its network namespace and the sources of its mounts: bundle, cgroup, container,
monitor, logs' bounds. Keeps no state in memory that the run directory does not have: a restarted agent carries on with
what runs. Starts no task of its own; a call for one sandbox must not overlap with another `create`, `begin` or `delete`
of it.
"""

import hashlib
import os
import shutil
import signal
import time
from asyncio import timeout, to_thread
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from agent.sandbox import conmon, executable, execution, idmap, mounts, oci, process, rootfs, seccomp
from agent.sandbox.cgroup import Cgroups
from agent.sandbox.execution import ExecProcess
from agent.sandbox.records import Records
from agent.sandbox.rotation import Rotation, conmon_bytes, set_aside
from agent.sandbox.spec import (
    DirectoryRoot,
    Exit,
    HostRoot,
    ImageRoot,
    SandboxRecord,
    SandboxSpec,
    SandboxStatus,
    StartError,
    Usage,
)
from outrider.errors import HostError
from outrider.log import Log
from outrider.model.job import Value

_CRUN_S_MAX = 10.0
_MONITOR_S_MAX = 2.0
_READY_S_MAX = 1.0
_CREATE_S_MAX = 30.0  # a host under load; a start takes some 15 ms
_KILLED = 128 + signal.SIGKILL


class Created(Value, frozen=True, kw_only=True):
    """A sandbox that waits for `begin`. Its record on disk says that its start was not completed."""

    record: SandboxRecord
    command: str
    maps_owners: bool  # of an image's files


class SandboxRuntime:
    """`cgroup`: parent of all sandboxes' cgroups, e.g. "outrider/FLEET/NODE"."""

    def __init__(self, *, run_directory: Path, cgroup: str, log: Log) -> None:
        self._run = run_directory
        self._parent = cgroup.strip("/")
        self._log = log
        # Environments have secrets in them.
        mounts.keep_in_memory(run_directory)
        self._records = Records(run_directory)
        self._configs = run_directory / "configs"
        self._configs.mkdir(exist_ok=True)
        self._cgroups = Cgroups()
        self._rotation = Rotation()
        for record in self._records.all():
            if record.pid and Path(record.directory).is_dir():
                self._rotation.add(record.id, conmon.Directory(record.directory))
        # Absolute: conmon changes its working directory.
        # Named by its content: another version's profile is compiled anew.
        digest = hashlib.sha256(msgspec.json.encode(seccomp.profile())).hexdigest()
        self._compiled = run_directory / f"seccomp-{digest[:16]}.bpf"
        self._crun = ("crun", f"--root={run_directory.absolute() / 'crun'}", "--cgroup-manager=cgroupfs")

    async def start(self, spec: SandboxSpec) -> SandboxStatus:
        """Run a sandbox: `create` and `begin`."""
        return await self.begin(await self.create(spec))

    async def create(self, spec: SandboxSpec) -> Created:
        """Make a sandbox whole, its command not yet running. What is left of an earlier one of the same id is removed
        first, its logs apart.

        Raises StartError where the job or its image is at fault, HostError where this host is. A call that was
        cancelled leaves what `delete` removes, and so does an agent that ends before it calls `begin`.
        """
        await self.delete(spec.id)
        directory = conmon.Directory(spec.directory)
        record = SandboxRecord(
            id=spec.id,
            directory=spec.directory,
            user=spec.user,
            group=spec.group,
            env=spec.env,
            cwd=spec.cwd,
        )
        self._records.write(record)
        async with self._whole_or_not_at_all(spec.id):
            self._prepare(spec, directory)
            return await self._create(spec, directory, record)

    async def begin(self, created: Created) -> SandboxStatus:
        """Have a created sandbox run its command. Raises as `create` does."""
        record = created.record
        started_at_s = time.time()
        async with self._whole_or_not_at_all(record.id):
            done = await process.run([*self._crun, "start", record.id], timeout_s=_CRUN_S_MAX)
            if done.code != 0:
                raise StartError(f"{created.command}: {done.output.strip()}")
        record = msgspec.structs.replace(record, started_at_s=started_at_s)
        self._records.write(record)
        if created.maps_owners:
            idmap.make_ready()  # nobody waits here any more
        return _status(record, running=True)

    @asynccontextmanager
    async def _whole_or_not_at_all(self, sandbox: str) -> AsyncIterator[None]:
        try:
            yield
        except (StartError, HostError) as error:
            await self.delete(sandbox)
            self._log.warning("sandbox_not_started", sandbox=sandbox, reason=error)
            raise

    def _prepare(self, spec: SandboxSpec, directory: conmon.Directory) -> None:
        directory.exits.mkdir(parents=True, exist_ok=True)
        (directory.exits / spec.id).unlink(missing_ok=True)
        set_aside(directory, spec.log_bytes_max)
        rootfs.remove(directory.bundle)
        rootfs.prepare(spec, directory.bundle)
        config = oci.config(
            spec,
            cgroup=f"{self._parent}/{spec.id}",
            init=process.program("catatonit"),
            seccomp_filter=self._seccomp_filter(),
            bundle=str(directory.bundle.absolute()),
        )
        written = self._config(spec.id)
        written.write_bytes(msgspec.json.encode(config))
        (directory.bundle / "config.json").symlink_to(written)

    async def _create(self, spec: SandboxSpec, directory: conmon.Directory, record: SandboxRecord) -> Created:
        starting = await conmon.create(spec.id, directory, crun=self._crun, log_bytes=conmon_bytes(spec.log_bytes_max))
        ticks = process.started_ticks_of(starting.pid)
        record = msgspec.structs.replace(record, conmon_pid=starting.pid, conmon_started_ticks=ticks)
        self._records.write(record)
        pid = await starting.created(timeout_s=_CREATE_S_MAX)
        self._rotation.add(spec.id, directory)
        self._keep_seccomp_filter(spec.id)
        if not executable.find(pid, spec.argv[0], spec.env.get("PATH", ""), spec.cwd):
            raise StartError(_not_found(spec))
        if spec.limits.io_weight and not self._cgroups.set_io_weight(
            f"{self._parent}/{spec.id}", spec.limits.io_weight
        ):
            raise StartError("io_weight: this node's kernel has no I/O weights; leave it out, or use another node")
        self._cgroups.limit_hugepages(f"{self._parent}/{spec.id}", spec.limits.hugepages)
        if spec.limits.nice:
            os.setpriority(os.PRIO_PROCESS, pid, spec.limits.nice)  # what it starts has the same
        record = msgspec.structs.replace(record, pid=pid, started_ticks=process.started_ticks_of(pid))
        return Created(record=record, command=spec.argv[0], maps_owners=isinstance(spec.root, ImageRoot))

    async def wait(self, sandbox: str) -> Exit:
        """Wait until the sandbox has ended, and how. Also for one that an earlier agent started."""
        record = self._known(sandbox)
        directory = conmon.Directory(record.directory)
        await process.ended(record.conmon_pid, record.conmon_started_ticks)
        oom_kills = self._cgroups.oom_kills(f"{self._parent}/{record.container}")
        ended = conmon.exit_code(record.container, directory)
        if ended is None:
            # Somebody killed the monitor: nobody reads its output nor its end any more, so it ends here.
            process.send_signal(record.pid, record.started_ticks, signal.SIGKILL)
            await process.ended(record.pid, record.started_ticks)
            self._log.warning("monitor_killed", sandbox=sandbox)
            ended = _KILLED, time.time()
        code, finished_at_s = ended
        return Exit(
            code=code,
            signal=code - 128 if 128 < code < 128 + signal.NSIG else None,
            oom_killed=oom_kills > 0 and code != 0,
            finished_at_s=finished_at_s,
        )

    async def signal(self, sandbox: str, number: int) -> None:
        """Send a signal to the workload; SIGKILL ends all of the sandbox. One that has ended is left in peace."""
        record = self._known(sandbox)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            # The kernel drops what a namespace's first process does not expect, and it may only just have been started.
            with suppress(TimeoutError):
                async with timeout(_READY_S_MAX):
                    await process.expecting(record.pid, record.started_ticks, number)
        process.send_signal(record.pid, record.started_ticks, number)

    async def end(self, sandbox: str, *, within_s: float) -> None:
        """SIGTERM, and by force what runs after `within_s`; then `delete`. Nothing there is fine."""
        if any(status.id == sandbox and status.running for status in await self.list()):
            await self.signal(sandbox, signal.SIGTERM)
            try:
                async with timeout(within_s):
                    await self.wait(sandbox)
            except TimeoutError:
                self._log.info("sandbox lingers", sandbox=sandbox)
        await self.delete(sandbox)

    async def delete(self, sandbox: str) -> None:
        """Remove all of a sandbox but its logs and its exit status, killing what runs. Nothing there is fine."""
        record = self._records.read(sandbox)
        if record is None:
            return
        self._rotation.remove(sandbox)
        directory = conmon.Directory(record.directory)
        if not record.pid:  # a start that was cut short: first nobody may carry on with it
            await self._end_monitor(record, directory)
        state = self._run / "crun" / record.container
        if state.exists():
            done = await process.run([*self._crun, "delete", "--force", record.container], timeout_s=_CRUN_S_MAX)
            if done.code != 0:
                self._log.warning("crun_delete", sandbox=sandbox, output=done.output.strip())
        # Everything in it dies here, if crun did not see to it: the monitor then has its end to write down.
        await to_thread(self._cgroups.remove, f"{self._parent}/{record.container}")
        if record.pid:
            await self._end_monitor(record, directory)
        shutil.rmtree(state, ignore_errors=True)
        rootfs.remove(directory.bundle)
        self._config(record.container).unlink(missing_ok=True)
        _remove_link(record)
        self._records.remove(sandbox)

    def rename(self, sandbox: str, to: str, directory: str) -> None:
        """From now on a running sandbox is `to`, and its own directory is at `directory`. Not while it is waited for.

        Raises HostError, and it has its first name then. An agent that is killed meanwhile leaves what `delete` of
        either name removes.
        """
        record = self._known(sandbox)
        renamed = msgspec.structs.replace(
            record, id=to, directory=directory, first_id=record.container, first_directory=record.directory
        )
        try:
            Path(record.directory).rename(directory)
            Path(record.directory).symlink_to(directory)  # conmon and crun go on to look there
        except OSError as error:
            raise HostError(sandbox, step=f"move its directory to {directory}: {error.strerror}") from error
        self._rotation.remove(sandbox)
        self._records.write(renamed)
        self._records.remove(sandbox)
        self._rotation.add(to, conmon.Directory(directory))

    async def _end_monitor(self, record: SandboxRecord, directory: conmon.Directory) -> None:
        """Let it write the exit status of what was killed; one that lingers, or never got so far, is killed too."""
        if record.pid:
            with suppress(TimeoutError):
                async with timeout(_MONITOR_S_MAX):
                    await process.ended(record.conmon_pid, record.conmon_started_ticks)
                return
        if record.conmon_pid:
            process.send_signal(record.conmon_pid, record.conmon_started_ticks, signal.SIGKILL)
            await process.ended(record.conmon_pid, record.conmon_started_ticks)
            return
        for pid in conmon.find(directory):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await process.ended(pid)

    async def exec(
        self,
        sandbox: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> ExecProcess:
        """Start a program in a running sandbox, as the workload's own user and within all its limits.

        Raises StartError where the sandbox has no such program, HostError where it does not run.
        """
        record = self._known(sandbox)
        if not process.is_running(record.pid, record.started_ticks):
            raise HostError(sandbox, step="it has ended: nothing can be started in it")
        if not executable.find(record.pid, argv[0], record.env.get("PATH", ""), record.cwd):
            raise StartError(f"command {argv[0]!r} is not an executable file in {sandbox}")
        terminal = {"TERM": "xterm-256color"} if tty else {}
        values = oci.process(
            argv, {**record.env, **terminal, **(env or {})}, record.cwd, record.user, record.group, tty=tty
        )
        try:
            if tty:
                return await execution.start_with_terminal(
                    self._crun, record.container, values, directory=self._run, rows=rows, columns=columns
                )
            return await execution.start(self._crun, record.container, values)
        except OSError as error:
            raise HostError(sandbox, step=f"exec {argv[0]}: {error.strerror}") from error

    async def list(self) -> tuple[SandboxStatus, ...]:
        """All sandboxes of this node that were started: those that run, and those that ended and were not deleted."""
        return tuple(
            _status(record, running=process.is_running(record.pid, record.started_ticks))
            for record in self._records.all()
            if record.pid
        )

    def usage(self, sandbox: str) -> Usage:
        """What it used so far. Zeros where it is gone."""
        record = self._records.read(sandbox)
        return self._cgroups.usage(f"{self._parent}/{record.container if record is not None else sandbox}")

    async def reap(self, known: Collection[str]) -> tuple[str, ...]:
        """Remove every sandbox of this node that is not `known` or was never fully started; the ids of those removed.

        For an agent's beginning: it finds what a killed one left, at whatever step.
        """
        records = {record.id: record for record in self._records.all()}
        gone = [name for name, record in records.items() if name not in known or not record.pid]
        for sandbox in gone:
            await self.delete(sandbox)
        # Without a record there is nothing but a group, if the run directory was wiped.
        there = {record.container for record in records.values()}
        for name in sorted(self._cgroups.children(self._parent) - there):
            await to_thread(self._cgroups.remove, f"{self._parent}/{name}")
            gone.append(name)
        if gone:
            self._log.info("reaped", sandboxes=" ".join(gone))
        return tuple(gone)

    async def remove_all(self) -> None:
        """End and remove everything of this node, its control groups too: the node leaves its fleet."""
        await self.reap(())
        await to_thread(self._cgroups.remove_with_empty_parents, self._parent)
        mounts.unmount(self._run)

    async def rotate_logs(self) -> None:
        """Keep all logs below their bounds, for ever: run it as one named task of the agent."""
        await self._rotation.run()

    def _config(self, sandbox: str) -> Path:
        """Not in the bundle, which may be on a disk."""
        return (self._configs / f"{sandbox}.json").absolute()

    def _known(self, sandbox: str) -> SandboxRecord:
        record = self._records.read(sandbox)
        if record is None or not record.pid:
            raise HostError(sandbox, step="no such sandbox on this node", hint="it was deleted, or never started")
        return record

    def _seccomp_filter(self) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._compiled.read_bytes()
        return None

    def _keep_seccomp_filter(self, sandbox: str) -> None:
        """Keep what crun compiled for the first sandbox: the others start in half the time."""
        if not self._compiled.exists():
            temporary = self._compiled.with_suffix(".new")
            shutil.copyfile(self._run / "crun" / sandbox / "seccomp.bpf", temporary)
            temporary.replace(self._compiled)


def _status(record: SandboxRecord, *, running: bool) -> SandboxStatus:
    return SandboxStatus(
        id=record.id,
        pid=record.pid,
        started_at_s=record.started_at_s,
        directory=record.directory,
        running=running,
    )


def _remove_link(record: SandboxRecord) -> None:
    if record.first_directory:
        Path(record.first_directory).unlink(missing_ok=True)


def _not_found(spec: SandboxSpec) -> str:
    match spec.root:
        case HostRoot():
            where = "the host image (the node's own /usr)"
        case DirectoryRoot(path=path):
            where = f"the image dir:{path}"
    return f"command {spec.argv[0]!r} is not an executable file in {where}"
