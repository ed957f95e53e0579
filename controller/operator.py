"""OperatorService: people and their tools, on the unix socket or with an operator's certificate.

Parses and checks what comes in, reads the state for what is asked, and hands changes to the engine. Decides nothing.
Tasks: one for each exec call, which reads what the caller types.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from controller.audit import AuditLog, job_changes
from controller.callers import Callers
from controller.core import views
from controller.core.commands import Reply
from controller.core.events import (
    AllocMoveRequested,
    JobDispatchRequested,
    JobRevertRequested,
    JobScaleRequested,
    JobStopRequested,
    JobSubmitted,
)
from controller.core.preview import preview, twin_of
from controller.core.why import explanation
from controller.parts import Parts
from controller.people import done
from controller.permissions import allocation_namespace
from controller.rpc import Context, duplex, stream, unary, within, write
from controller.steering import Steering, find_allocation
from controller.tunnels import Tunnel
from outrider import __version__, codec
from outrider.errors import InputError, OutriderError, RefusedError
from outrider.ids import GroupName, JobName, NodeId, ServiceName, is_name
from outrider.log import LEVELS, Log, set_level
from outrider.model.access import EVERYWHERE, Capability
from outrider.model.allocation import Allocation
from outrider.model.fleet import FleetEvent, JobStatus
from outrider.model.job import Job
from outrider.model.mesh import Action, Intention, spiffe_id
from outrider.model.patterns import fault as regex_fault
from outrider.v1 import allocation_pb2, fleet_pb2, mesh_pb2, operator_pb2
from outrider.validate import problems

MESH_TIMEOUT_S = 10.0
LEADERSHIP_TIMEOUT_S = 3.0
START_TIMEOUT_S = 10.0
EVENT_WRITE_TIMEOUT_S = 10.0
STATUS_WRITE_TIMEOUT_S = 60.0
DATA_WRITE_TIMEOUT_S = 600.0  # a person may pause a terminal
STATUS_INTERVAL_S = 0.05  # changes within it are told as one
PROBLEMS_SHOWN_MAX = 10
DESCRIPTION_CHARS_MAX = 256
PERMISSIONS_MAX = 64
PARAMETER_CHARS_MAX = 4096
PAYLOAD_BYTES_MAX = 64 * 1024


class OperatorService(Steering):
    def __init__(self, parts: Parts, *, consul: str, callers: Callers, audit: AuditLog) -> None:
        """`consul`: the real one's address, or "embedded"."""
        super().__init__(parts, callers=callers, audit=audit, log=Log("operator"))
        self._consul = consul
        self._cluster = parts.cluster
        self._events = parts.events
        self._mesh = parts.mesh
        self._sessions = parts.sessions
        self._tunnels = parts.tunnels
        self._refusals = parts.refusals
        self._planning = asyncio.Semaphore(1)  # one at a time: each copies the state

    @unary
    async def GetFleet(self, request: operator_pb2.GetFleetRequest, context: Context) -> operator_pb2.GetFleetResponse:
        summary = views.fleet_summary(self._engine.state)
        return operator_pb2.GetFleetResponse(
            cluster=self._cluster,
            version=__version__,
            generation=codec.to_wire(summary.generation, allocation_pb2.Generation),
            nodes_ready=summary.nodes_ready,
            nodes=summary.nodes,
            jobs=summary.jobs,
            consul=self._consul,
            trust_domain=self._mesh.roots().trust_domain,
        )

    @unary
    async def SubmitJob(
        self, request: operator_pb2.SubmitJobRequest, context: Context
    ) -> operator_pb2.SubmitJobResponse:
        job = _submission(request)
        entry = self.state.jobs.get(job.name)
        before = entry.job if entry is not None and not entry.stopped else None
        reply = done(await self._engine.request(lambda request: JobSubmitted(request=request, job=job)))
        if reply.changed:
            self.call.changes = (f"version {reply.version}", *job_changes(before, job))
        return _submitted(reply)

    @unary
    async def PlanJob(self, request: operator_pb2.SubmitJobRequest, context: Context) -> operator_pb2.JobPlan:
        job = _submission(request)
        twin, policy = twin_of(self.state), self.state.policy
        async with self._planning:
            plan = await asyncio.to_thread(preview, twin, policy, job)
        return codec.to_wire(plan, operator_pb2.JobPlan)

    @unary
    async def StopJob(self, request: operator_pb2.StopJobRequest, context: Context) -> operator_pb2.StopJobResponse:
        job = JobName(request.job)
        reply = done(await self._engine.request(lambda request: JobStopRequested(request=request, job=job)))
        return operator_pb2.StopJobResponse(version=reply.version)

    @unary
    async def DispatchJob(
        self, request: operator_pb2.DispatchJobRequest, context: Context
    ) -> operator_pb2.DispatchJobResponse:
        payload = request.payload if request.HasField("payload") else None
        for name, value in request.parameters.items():
            if len(value) > PARAMETER_CHARS_MAX or "\0" in value:
                raise InputError(f"parameter {name[:80]}: holds a NUL, or more than {PARAMETER_CHARS_MAX} characters")
        if payload is not None and len(payload) > PAYLOAD_BYTES_MAX:
            raise InputError(f"payload: {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}")
        job, parameters = JobName(request.job), dict(request.parameters)
        reply = await self._engine.request(
            lambda request: JobDispatchRequested(request=request, job=job, parameters=parameters, payload=payload)
        )
        launched = done(reply).job or ""
        self.call.changes = (f"launched {launched}",)
        return operator_pb2.DispatchJobResponse(job=launched)

    @unary
    async def ScaleJob(self, request: operator_pb2.ScaleJobRequest, context: Context) -> operator_pb2.SubmitJobResponse:
        job, group, count = JobName(request.job), GroupName(request.group) or None, request.count
        reply = await self._engine.request(
            lambda request: JobScaleRequested(request=request, job=job, group=group, count=count)
        )
        self.call.changes = (f"{group or 'its group'}: count {count}",)
        return _submitted(done(reply))

    @unary
    async def MoveAllocation(
        self, request: operator_pb2.MoveAllocationRequest, context: Context
    ) -> operator_pb2.MoveAllocationResponse:
        allocation, _ = self._placed(request.alloc)
        node = NodeId(request.node) if request.node else None
        reply = await self._engine.request(
            lambda request: AllocMoveRequested(request=request, job=allocation.job, alloc=allocation.id, node=node)
        )
        moved = done(reply)
        self.call.changes = (f"{allocation.id} moves to {node or 'another node'} as {moved.message}",)
        return operator_pb2.MoveAllocationResponse(alloc=moved.message, warnings=moved.warnings)

    @unary
    async def RevertJob(
        self, request: operator_pb2.RevertJobRequest, context: Context
    ) -> operator_pb2.SubmitJobResponse:
        job, version = JobName(request.job), request.version
        reply = await self._engine.request(
            lambda request: JobRevertRequested(request=request, job=job, version=version)
        )
        self.call.changes = (f"version {reply.version}",)
        return _submitted(done(reply))

    @unary
    async def GetJobHistory(
        self, request: operator_pb2.GetJobRequest, context: Context
    ) -> operator_pb2.GetJobHistoryResponse:
        versions = views.job_history(self._engine.state, JobName(request.job))
        if versions is None:
            raise RefusedError("not-found", f"no job {request.job[:80]!r}; `outrider job ls` lists them")
        return operator_pb2.GetJobHistoryResponse(
            versions=[codec.to_wire(version, operator_pb2.VersionStatus) for version in versions]
        )

    @unary
    async def ListJobs(self, request: operator_pb2.ListJobsRequest, context: Context) -> operator_pb2.ListJobsResponse:
        jobs = [job for job in views.job_summaries(self._engine.state) if self.sees(job.namespace)]
        return operator_pb2.ListJobsResponse(jobs=[codec.to_wire(job, operator_pb2.JobSummary) for job in jobs])

    @unary
    async def GetJob(self, request: operator_pb2.GetJobRequest, context: Context) -> operator_pb2.JobStatus:
        return codec.to_wire(self._job(request.job), operator_pb2.JobStatus)

    @stream(write_timeout_s=STATUS_WRITE_TIMEOUT_S)
    async def WatchJob(
        self, request: operator_pb2.GetJobRequest, context: Context
    ) -> AsyncGenerator[operator_pb2.JobStatus, None]:
        told: JobStatus | None = None
        while True:
            changed = self._engine.next_change()  # before the state is read: what comes meanwhile wakes us too
            status = self._job(request.job)
            if status != told:
                told = status
                yield codec.to_wire(status, operator_pb2.JobStatus)
            await asyncio.sleep(STATUS_INTERVAL_S)  # after telling, not before: a change in quiet times is told at once
            await changed.wait()

    @unary
    async def ListNodes(
        self, request: operator_pb2.ListNodesRequest, context: Context
    ) -> operator_pb2.ListNodesResponse:
        nodes = views.node_states(self._engine.state)
        return operator_pb2.ListNodesResponse(nodes=[codec.to_wire(node, operator_pb2.NodeState) for node in nodes])

    @unary
    async def GetNode(self, request: operator_pb2.GetNodeRequest, context: Context) -> operator_pb2.GetNodeResponse:
        node = views.node_state(self._engine.state, NodeId(request.node))
        if node is None:
            raise RefusedError("not-found", f"no node {request.node[:80]!r}; `outrider node ls` lists them")
        placed = [each for each in views.allocations(self.state, node=node.node.id) if self.sees_job(each.job)]
        return operator_pb2.GetNodeResponse(
            node=codec.to_wire(node, operator_pb2.NodeState),
            allocations=[codec.to_wire(each, allocation_pb2.Allocation) for each in placed],
        )

    @unary
    async def ListAllocations(
        self, request: operator_pb2.ListAllocationsRequest, context: Context
    ) -> operator_pb2.ListAllocationsResponse:
        found = views.allocations(
            self._engine.state,
            job=JobName(request.job) if request.job else None,
            node=NodeId(request.node) if request.node else None,
            terminal=request.terminal,
        )
        return operator_pb2.ListAllocationsResponse(
            allocations=[codec.to_wire(each, allocation_pb2.Allocation) for each in found if self.sees_job(each.job)]
        )

    @unary
    async def GetAllocation(
        self, request: operator_pb2.GetAllocationRequest, context: Context
    ) -> allocation_pb2.Allocation:
        return codec.to_wire(find_allocation(self._engine.state, request.alloc), allocation_pb2.Allocation)

    @unary
    async def ExplainAllocation(
        self, request: operator_pb2.GetAllocationRequest, context: Context
    ) -> operator_pb2.Explanation:
        found = explanation(self.state, find_allocation(self.state, request.alloc).id)
        assert found is not None, "it was just found"
        return codec.to_wire(found, operator_pb2.Explanation)

    @stream(write_timeout_s=DATA_WRITE_TIMEOUT_S)
    async def Logs(
        self, request: fleet_pb2.LogsRequest, context: Context
    ) -> AsyncGenerator[fleet_pb2.TunnelFrame, None]:
        allocation, node = self._placed(request.alloc)
        request.alloc = allocation.id
        with self._tunnels.open(node) as tunnel:
            self._sessions.open_tunnel(node, fleet_pb2.OpenTunnel(tunnel=tunnel.id, logs=request))
            async for frame in tunnel.frames():
                yield frame

    @duplex
    async def Exec(self, request_iterator: AsyncIterator[operator_pb2.ExecFrame], context: Context) -> None:
        start = await _start(request_iterator)
        if start.HasField("vm") and start.node:
            self.require(Capability.EXEC, EVERYWHERE, f"on node {start.node[:80]!r}")
            node = self._node(start.node)
        else:
            namespace = allocation_namespace(self.state, start.alloc)
            self.require(Capability.EXEC, namespace, f"in allocation {start.alloc[:80]!r}")
            allocation, node = self._placed(start.alloc)
            start.alloc = allocation.id
        self.begun("Exec")
        with self._tunnels.open(node) as tunnel:
            self._sessions.open_tunnel(node, fleet_pb2.OpenTunnel(tunnel=tunnel.id, exec=start))
            async with asyncio.TaskGroup() as group:
                typing = group.create_task(_read_exec(tunnel, request_iterator), name=f"exec-{tunnel.id}-read")
                failure = await _write_frames(tunnel, context)
                typing.cancel()
        if failure is not None:
            raise failure

    @stream(write_timeout_s=EVENT_WRITE_TIMEOUT_S)
    async def WatchEvents(
        self, request: operator_pb2.WatchEventsRequest, context: Context
    ) -> AsyncGenerator[operator_pb2.FleetEvent, None]:
        if not request.follow:
            for event in filter(self._sees_event, self._events.kept(request.after)):
                yield codec.to_wire(event, operator_pb2.FleetEvent)
            return
        async with contextlib.aclosing(self._events.follow(request.after)) as events:
            async for event in events:
                if self._sees_event(event):
                    yield codec.to_wire(event, operator_pb2.FleetEvent)

    @unary
    async def ListIntentions(
        self, request: operator_pb2.ListIntentionsRequest, context: Context
    ) -> operator_pb2.ListIntentionsResponse:
        async with within(MESH_TIMEOUT_S, "the catalog"):
            intentions = await self._mesh.intentions()
        return operator_pb2.ListIntentionsResponse(
            intentions=[codec.to_wire(each, mesh_pb2.Intention) for each in intentions]
        )

    @unary
    async def CreateIntention(
        self, request: operator_pb2.CreateIntentionRequest, context: Context
    ) -> mesh_pb2.Intention:
        wanted = codec.from_wire(request.intention, Intention)
        _check_ends(wanted.source, wanted.destination, wildcard=True)
        if len(wanted.description) > DESCRIPTION_CHARS_MAX:
            raise InputError(f"description: more than {DESCRIPTION_CHARS_MAX} characters")
        if len(wanted.permissions) > PERMISSIONS_MAX:
            raise InputError(f"permissions: more than {PERMISSIONS_MAX}")
        for one in wanted.permissions:
            for regex in (one.match.path_regex, *(text.regex for text in one.match.headers)):
                if regex and (why := regex_fault(regex)):
                    raise InputError(f"permissions: {regex[:80]!r} is no regular expression: {why}")
        async with within(MESH_TIMEOUT_S, "the catalog"):
            made = await self._mesh.create_intention(
                wanted.source, wanted.destination, Action(wanted.action), wanted.description, wanted.permissions
            )
        return codec.to_wire(made, mesh_pb2.Intention)

    @unary
    async def DeleteIntention(
        self, request: operator_pb2.DeleteIntentionRequest, context: Context
    ) -> operator_pb2.DeleteIntentionResponse:
        _check_ends(request.source, request.destination, wildcard=True)
        async with within(MESH_TIMEOUT_S, "the catalog"):
            existed = await self._mesh.delete_intention(request.source, request.destination)
        if not existed:
            raise RefusedError("not-found", f"no intention {request.source} -> {request.destination}")
        return operator_pb2.DeleteIntentionResponse()

    @unary
    async def CheckIntention(
        self, request: operator_pb2.CheckIntentionRequest, context: Context
    ) -> operator_pb2.CheckIntentionResponse:
        _check_ends(request.source, request.destination, wildcard=False)
        source, destination = ServiceName(request.source), ServiceName(request.destination)
        async with within(MESH_TIMEOUT_S, "the catalog"):
            allowed, decided_by = await self._mesh.check(source, destination)
        roots = self._mesh.roots()
        callees = {each.id for each in views.allocations_of_service(self._engine.state, destination)}
        refusals = self._refusals.between(spiffe_id(roots.trust_domain, roots.datacenter, source), callees)
        return operator_pb2.CheckIntentionResponse(
            allowed=allowed,
            decided_by=codec.to_wire(decided_by, mesh_pb2.Intention) if decided_by else None,
            refusals=[codec.to_wire(each, mesh_pb2.ObservedRefusal) for each in refusals],
        )

    @unary
    async def SetLogLevel(
        self, request: operator_pb2.SetLogLevelRequest, context: Context
    ) -> operator_pb2.SetLogLevelResponse:
        if request.level not in LEVELS:
            raise InputError(f"level: {request.level[:20]!r} is none; one of {', '.join(LEVELS)}")
        if request.node:
            self._sessions.set_log_level(NodeId(request.node), request.level)
        else:
            set_level(request.level)
            self.log.warning("log level set", level=request.level, by=self.call.caller.name)
        self.call.changes = (f"level: {request.level}",)
        return operator_pb2.SetLogLevelResponse()

    def _sees_event(self, event: FleetEvent) -> bool:
        """What is about no job is every reader's."""
        return not event.job or self.sees_job(event.job)

    def _job(self, name: str) -> JobStatus:
        status = views.job_status(self._engine.state, JobName(name))
        if status is None:
            raise RefusedError("not-found", f"no job {name[:80]!r}; `outrider job ls` lists them")
        return status

    def _node(self, name: str) -> NodeId:
        node = views.node_state(self._engine.state, NodeId(name))
        if node is None:
            raise RefusedError("not-found", f"no node {name[:80]!r}; `outrider node ls` lists them")
        return node.node.id

    def _placed(self, prefix: str) -> tuple[Allocation, NodeId]:
        allocation = find_allocation(self._engine.state, prefix)
        if allocation.node is None:
            reason = allocation.reason or "it waits for a node"
            raise RefusedError("not-placed", f"allocation {allocation.id} runs nowhere: {reason}")
        return allocation, allocation.node


def _submission(request: operator_pb2.SubmitJobRequest) -> Job:
    """Raises InputError with all that is wrong with it."""
    job = codec.from_wire(request.job, Job)
    found = problems(job)
    if found:
        shown = "; ".join(f"{problem.where}: {problem.message}" for problem in found[:PROBLEMS_SHOWN_MAX])
        raise InputError(f"job {job.name[:80]!r}: {shown}")
    return job


def _submitted(reply: Reply) -> operator_pb2.SubmitJobResponse:
    return operator_pb2.SubmitJobResponse(version=reply.version, changed=reply.changed, warnings=reply.warnings)


def _check_ends(source: str, destination: str, *, wildcard: bool) -> None:
    for end, name in (("source", source), ("destination", destination)):
        if not is_name(name) and not (wildcard and name == "*"):
            raise InputError(f"{end}: {name[:80]!r} is no service's name{' and not *' if wildcard else ''}")


async def _start(requests: AsyncIterator[operator_pb2.ExecFrame]) -> fleet_pb2.ExecRequest:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration) as error:
        raise InputError("exec: the first frame, `start`, did not come") from error
    if not first.HasField("start"):
        raise InputError("exec: the first frame must be `start`")
    return first.start


async def _write_frames(tunnel: Tunnel, context: Context) -> OutriderError | None:
    try:
        async for frame in tunnel.frames():
            await write(context, frame, DATA_WRITE_TIMEOUT_S)
    except OutriderError as error:
        return error
    return None


async def _read_exec(tunnel: Tunnel, requests: AsyncIterator[operator_pb2.ExecFrame]) -> None:
    async for frame in requests:
        match frame.WhichOneof("frame"):
            case "stdin":
                await tunnel.to_agent.put(fleet_pb2.TunnelFrame(stdin=frame.stdin))
            case "stdin_closed":
                await tunnel.to_agent.put(fleet_pb2.TunnelFrame(stdin_closed=True))
            case "resize":
                await tunnel.to_agent.put(fleet_pb2.TunnelFrame(resize=frame.resize))
            case _:
                break  # a second `start`: the caller has nothing more to say that we understand
    await tunnel.to_agent.put(fleet_pb2.TunnelFrame(stdin_closed=True))
