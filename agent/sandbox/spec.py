"""What a sandbox is: frozen values only. Owns their shapes and rules; never touches the host."""

from collections.abc import Mapping

import msgspec

from outrider.errors import OutriderError
from outrider.model.job import MIB, Value

UID_RANGE = 65_536  # host uids (and gids) of one sandbox: `uid_first` is root inside
INNER_USER = 1000


class StartError(OutriderError):
    """A sandbox did not start. The message is a sentence for the job's author."""


class Mount(Value, frozen=True, kw_only=True):
    """A bind mount of a host path. A directory or a file; the target is made where the root lacks it."""

    source: str
    target: str
    read_only: bool = True


class Tmpfs(Value, frozen=True, kw_only=True):
    target: str
    size_bytes: int
    mode: int = 0o1777


class Device(Value, frozen=True, kw_only=True):
    """A character device below the sandbox's /dev: a node of its own, that its user alone may open."""

    name: str  # "net/tun"
    major: int
    minor: int


class HostRoot(Value, frozen=True, kw_only=True, tag="host"):
    """A picked root (DESIGN, decision 11): /usr and a listed part of /etc, nothing else of the host."""


class DirectoryRoot(Value, frozen=True, kw_only=True, tag="directory"):
    """An unpacked image at `path`, shown read-only; it is never written to."""

    path: str


class ImageRoot(Value, frozen=True, kw_only=True, tag="image"):
    """An unpacked image at `path` whose files have the owners that the image gave them, to be shown as this sandbox's.

    What the sandbox writes goes into memory, at most `writable_bytes`, and is gone with it.
    """

    path: str
    writable_bytes: int


Root = HostRoot | DirectoryRoot | ImageRoot


class Limits(Value, frozen=True, kw_only=True):
    cpu_millis: int  # the weight under contention
    memory_bytes: int
    pids_max: int
    cpu_max_millis: int | None = None  # a quota
    shm_bytes: int = 64 * MIB
    io_weight: int = 0  # 1 to 1000; 0: the kernel's default
    nice: int = 0
    ulimits: Mapping[str, int] = {}  # "nofile" -> how many
    hugepages: Mapping[int, int] = {}  # size of a page -> bytes of such; others have none


class SandboxSpec(Value, frozen=True, kw_only=True):
    """All that it takes to start one sandbox."""

    id: str  # "ALLOC.TASK", "ALLOC.sidecar", "node.dns": also the name of its cgroup
    argv: tuple[str, ...]
    root: Root
    network_namespace: str  # path; made by the agent in the host's user namespace
    uid_first: int  # first host uid and gid of this sandbox's range
    limits: Limits
    directory: str  # owned by this sandbox alone: bundle, exit status, logs
    env: Mapping[str, str] = {}
    cwd: str = "/"
    mounts: tuple[Mount, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    devices: tuple[Device, ...] = ()
    user: int = INNER_USER  # inside; never 0
    group: int = INNER_USER
    hostname: str = "sandbox"
    capabilities: tuple[str, ...] = ()  # "NET_BIND_SERVICE"; within its user namespace
    log_bytes_max: int = 10 * MIB  # both log files together


class SandboxStatus(Value, frozen=True, kw_only=True):
    id: str
    pid: int  # of the workload's first process, as the host counts
    started_at_s: float  # wall clock
    directory: str = ""
    running: bool = True  # False: it has ended, `wait` tells how at once


class Exit(Value, frozen=True, kw_only=True):
    """How a sandbox ended. A death by signal is `code` 128 + signal, as shells have it."""

    code: int
    finished_at_s: float
    signal: int | None = None
    oom_killed: bool = False


class Usage(Value, frozen=True, kw_only=True):
    cpu_s: float
    memory_bytes: int
    oom_kills: int


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent keeps of a sandbox below its run directory; written before anything is started."""

    id: str
    directory: str
    user: int
    env: Mapping[str, str]
    cwd: str
    group: int = INNER_USER

    pid: int = 0  # 0: its start was never completed
    started_ticks: int = 0
    conmon_pid: int = 0
    conmon_started_ticks: int = 0  # with the pid: tells it from a later process of the same number
    started_at_s: float = 0.0
    first_id: str = ""  # before it was renamed; "": it was not
    first_directory: str = ""  # a link to `directory` now

    @property
    def container(self) -> str:
        """What crun, conmon and its control group call it."""
        return self.first_id or self.id
