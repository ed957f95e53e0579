"""Starts, watches, signals and removes sandboxes: crun under conmon. (Signatures; the body follows.)"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from agent.sandbox.spec import Exit, SandboxSpec, SandboxStatus, Usage
from outrider.log import Log


class ExecProcess:
    """A process started in a running sandbox. With a tty, `read` gives all output as stdout and stderr stays empty."""

    async def read(self) -> tuple[str, bytes] | None:
        """The next output as ("stdout" | "stderr", bytes); None once both have ended."""
        raise NotImplementedError

    async def write(self, data: bytes) -> None: ...
    def close_stdin(self) -> None: ...
    def resize(self, rows: int, columns: int) -> None: ...
    def kill(self) -> None: ...
    async def wait(self) -> int:
        """Its exit code (128 + signal where a signal ended it)."""
        raise NotImplementedError


class SandboxRuntime:
    """`cgroup`: parent of all sandboxes' cgroups, e.g. "outrider/FLEET/NODE"."""

    def __init__(self, *, run_directory: Path, cgroup: str, log: Log) -> None: ...

    async def start(self, spec: SandboxSpec) -> SandboxStatus:
        raise NotImplementedError

    async def wait(self, sandbox: str) -> Exit:
        raise NotImplementedError

    async def signal(self, sandbox: str, number: int) -> None: ...
    async def delete(self, sandbox: str) -> None: ...

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
        raise NotImplementedError

    async def list(self) -> tuple[SandboxStatus, ...]:
        raise NotImplementedError

    def usage(self, sandbox: str) -> Usage:
        raise NotImplementedError

    async def reap(self, known: Collection[str]) -> tuple[str, ...]:
        """Remove every sandbox of this node that is not `known`; the ids of those removed."""
        raise NotImplementedError

    async def rotate_logs(self) -> None:
        """Keep all logs below their bounds, for ever: run it as one named task of the agent."""
