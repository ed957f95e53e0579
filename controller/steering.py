"""The part of OperatorService by which people steer what runs: rollouts, restarts, single allocations, nodes.

Parses what comes in, and hands it to the engine. Decides nothing.
"""

import math

from controller.core import views
from controller.core.events import (
    AllocSteerRequested,
    JobRestartRequested,
    NodeSteerRequested,
    RolloutSteerRequested,
)
from controller.core.state import State
from controller.people import PeopleEdge, done
from controller.rpc import Context, unary
from outrider import codec
from outrider.errors import InputError, RefusedError
from outrider.ids import JobName, NodeId
from outrider.model.allocation import AllocAction, Allocation
from outrider.model.fleet import RolloutAction
from outrider.v1 import allocation_pb2, operator_pb2, operator_pb2_grpc
from outrider.validate import DURATION_S_MAX


class Steering(PeopleEdge, operator_pb2_grpc.OperatorServiceServicer):
    @unary
    async def SteerRollout(
        self, request: operator_pb2.SteerRolloutRequest, context: Context
    ) -> operator_pb2.SteerRolloutResponse:
        job, action = JobName(request.job), _rollout_action(request.action)
        reply = done(
            await self._engine.request(lambda request: RolloutSteerRequested(request=request, job=job, action=action))
        )
        self.call.changes = (f"{action} version {reply.version}",)
        return operator_pb2.SteerRolloutResponse(version=reply.version)

    @unary
    async def RestartJob(
        self, request: operator_pb2.RestartJobRequest, context: Context
    ) -> operator_pb2.RestartJobResponse:
        job = JobName(request.job)
        reply = done(await self._engine.request(lambda request: JobRestartRequested(request=request, job=job)))
        self.call.changes = (f"version {reply.version}",)
        return operator_pb2.RestartJobResponse(version=reply.version)

    @unary
    async def SteerAllocation(
        self, request: operator_pb2.SteerAllocationRequest, context: Context
    ) -> operator_pb2.SteerAllocationResponse:
        allocation = find_allocation(self._engine.state, request.alloc)
        action = _alloc_action(request.action)
        done(
            await self._engine.request(
                lambda request: AllocSteerRequested(request=request, alloc=allocation.id, action=action)
            )
        )
        self.call.changes = (f"{action} {allocation.id}",)
        shown = codec.to_wire(allocation, allocation_pb2.Allocation)
        return operator_pb2.SteerAllocationResponse(allocation=shown)

    @unary
    async def SteerNode(
        self, request: operator_pb2.SteerNodeRequest, context: Context
    ) -> operator_pb2.SteerNodeResponse:
        deadline_s = request.deadline_s if request.HasField("deadline_s") else None
        if deadline_s is not None and not (math.isfinite(deadline_s) and 0 <= deadline_s <= DURATION_S_MAX):
            raise InputError(f"deadline_s: {deadline_s} is not within 0 and {DURATION_S_MAX:g}")
        if request.drain and request.eligible:
            raise InputError("eligible: a node that is drained gets no new work")
        call = request
        done(
            await self._engine.request(
                lambda request: NodeSteerRequested(
                    request=request,
                    node=NodeId(call.node),
                    eligible=call.eligible,
                    drain=call.drain,
                    deadline_s=deadline_s,
                    keep_system=call.keep_system,
                )
            )
        )
        self.call.changes = ("drain" if call.drain else "eligible" if call.eligible else "not eligible",)
        return operator_pb2.SteerNodeResponse()


def find_allocation(state: State, prefix: str) -> Allocation:
    """By its id, or by the beginning of it. Raises RefusedError where that is none, or more than one."""
    found = views.allocation_by_prefix(state, prefix)
    match found:
        case Allocation():
            return found
        case views.Ambiguous():
            raise RefusedError("ambiguous", f"{prefix!r} begins more than one: {', '.join(found.matches)} ...")
        case _:
            raise RefusedError("not-found", f"no allocation {prefix[:80]!r}; `outrider alloc ls` lists them")


def _rollout_action(number: int) -> RolloutAction:
    actions: dict[int, RolloutAction] = {
        operator_pb2.RolloutAction.Value(f"ROLLOUT_ACTION_{action.name}"): action for action in RolloutAction
    }
    if number not in actions:
        raise InputError(f"action: {number} is none of {', '.join(RolloutAction)}")
    return actions[number]


def _alloc_action(number: int) -> AllocAction:
    actions: dict[int, AllocAction] = {
        allocation_pb2.AllocAction.Value(f"ALLOC_ACTION_{action.name}"): action for action in AllocAction
    }
    if number not in actions:
        raise InputError(f"action: {number} is none of {', '.join(AllocAction)}")
    return actions[number]
