"""An allocation: one copy of a group on one node. What the controller wants of it, and what the agent reports."""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from outrider.ids import AllocId, GroupName, JobName, NodeId, PortName, SecretName, ServiceName, TaskName
from outrider.model.belongings import Volume
from outrider.model.job import Group, Value


class Generation(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Compared as a pair: a leader's term or a restore begins a new epoch (DESIGN, decision 1)."""

    epoch: int = 0
    counter: int = 0


class Desired(StrEnum):
    RUN = "run"
    STOP = "stop"


class AllocStatus(StrEnum):
    PENDING = "pending"  # wanted, not placed or not yet taken up by the agent
    STARTING = "starting"  # the agent prepares it: namespace, sidecar, image
    RUNNING = "running"
    STOPPING = "stopping"  # draining, or waiting for the workload to exit
    COMPLETE = "complete"  # ended as it should: batch work done, or stopped on request
    FAILED = "failed"  # ended, and the restart policy is exhausted
    LOST = "lost"  # its node is down


TERMINAL = frozenset({AllocStatus.COMPLETE, AllocStatus.FAILED, AllocStatus.LOST})


class TaskStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    BACKOFF = "backoff"  # exited, waiting to be restarted
    EXITED = "exited"
    FAILED = "failed"


class TaskReport(Value, frozen=True, kw_only=True):
    name: TaskName
    status: TaskStatus = TaskStatus.PENDING
    restarts: int = 0
    exit_code: int | None = None
    signal: int | None = None
    oom_killed: bool = False
    started_at_s: float | None = None  # wall clock of the node
    finished_at_s: float | None = None
    message: str = ""  # why it is as it is, in words a user understands


class CheckReport(Value, frozen=True, kw_only=True):
    service: ServiceName
    passing: bool = False
    output: str = ""


class MoveStage(StrEnum):
    COPYING = "copying"
    READY = "ready"  # little is left to copy: its endpoints may be switched
    DONE = "done"  # the guest runs on the other node
    FAILED = "failed"  # it runs on here


class MoveReport(Value, frozen=True, kw_only=True):
    """How a guest's move to another node stands, as the node that it leaves tells of it."""

    to: AllocId
    stage: MoveStage
    message: str = ""
    downtime_ms: float = 0.0  # between the guest's last moment here and its first there
    connections_cut: int = 0  # to its services, that were open at that moment


class Move(Value, frozen=True, kw_only=True):
    """The other end of a guest's move: an allocation on another node."""

    alloc: AllocId
    node: NodeId
    address: str  # of the other node's agent, for the one that is left
    go: bool = False  # nobody calls the old one any more: the guest may leave


class AllocReport(Value, frozen=True, kw_only=True):
    """What an agent says of one allocation. Level-triggered: the newest report is the whole truth."""

    alloc: AllocId
    status: AllocStatus
    tasks: tuple[TaskReport, ...] = ()
    checks: tuple[CheckReport, ...] = ()  # one for each service; one without a check passes while it runs
    message: str = ""
    local_address: str = ""  # of the allocation's own veth: where sidecars of the same node dial it
    log_tail: str = ""  # the last lines of the failed task, for `job run`
    pulling: bool = False  # an image is on its way to the node: no deadline of the rollout runs meanwhile
    move: MoveReport | None = None


class CopyRole(StrEnum):
    """What a copy is to the others of its index."""

    ORDINARY = "ordinary"
    CANARY = "canary"  # of a version that is not promoted yet, beside the one it may replace
    SUCCESSOR = "successor"  # of one whose node is drained, or silent


class AllocAction(StrEnum):
    """What an operator does with one allocation."""

    RESTART = "restart"  # its tasks, where it is
    STOP = "stop"  # another takes its place


class AllocFigures(Value, frozen=True, kw_only=True):
    """What a copy of a group that the fleet scales has to do, over the time since the figures before."""

    alloc: AllocId
    load: float  # in the unit of the group's metric: requests a second, requests under way, percent of its reservation


class Assignment(Value, frozen=True, kw_only=True):
    """All that an agent needs to run one allocation."""

    alloc: AllocId
    job: JobName
    job_version: int
    group: Group
    index: int  # which of the group's copies: web[0], web[1] ...
    arguments: Mapping[str, str] = {}  # what `${param.NAME}` is
    batch: bool = False  # ends when its work ends; a clean exit is not restarted
    desired: Desired = Desired.RUN
    mesh_ports: Mapping[ServiceName, int] = {}  # the host port of each service's sidecar listener
    volumes: tuple[Volume, ...] = ()  # that its tasks name
    secrets: Mapping[SecretName, int] = {}  # the version of each that its tasks name, to be delivered now
    restarts: int = 0  # how often an operator asked for its tasks to be started anew
    dynamic_ports: Mapping[PortName, int] = {}  # the host port of each `dynamic` port
    move_to: Move | None = None  # this guest goes on there
    move_from: Move | None = None  # this one goes on from there, instead of booting


class Allocation(Value, frozen=True, kw_only=True):
    """An allocation as the controller tells of it."""

    id: AllocId
    job: JobName
    job_version: int
    group: GroupName
    index: int
    node: NodeId | None
    desired: Desired
    status: AllocStatus
    healthy: bool = False
    report: AllocReport | None = None
    mesh_ports: Mapping[ServiceName, int] = {}
    ports: Mapping[PortName, int] = {}  # as published in the clear on the host
    created_at_s: float = 0.0
    reason: str = ""  # why it is pending, or why it was stopped
    role: CopyRole = CopyRole.ORDINARY
