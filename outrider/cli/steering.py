"""What `deployment`, `node drain`, `alloc restart` and their like ask of the fleet, and how they wait for it."""

import time

from outrider import codec
from outrider.cli import output
from outrider.cli.client import Fleet, connect
from outrider.cli.rollout import copy_name, reason, wait
from outrider.errors import InputError, RefusedError
from outrider.jobspec.units import duration_s
from outrider.model.allocation import TERMINAL, AllocAction, Allocation
from outrider.model.fleet import NodeState, RolloutAction
from outrider.v1 import allocation_pb2, operator_pb2

_POLL_S = 0.3
_RESTART_S_MAX = 120.0  # until an allocation that was restarted is healthy
_DONE = {
    RolloutAction.PROMOTE: "promoted",
    RolloutAction.FAIL: "failed",
    RolloutAction.PAUSE: "paused",
    RolloutAction.RESUME: "goes on",
}


def steer_rollout(job: str, action: RolloutAction, *, detach: bool) -> None:
    """Raises RefusedError where the fleet says no, or where the rollout then fails."""
    number = operator_pb2.RolloutAction.Value(f"ROLLOUT_ACTION_{action.name}")
    with connect() as fleet:
        request = operator_pb2.SteerRolloutRequest(job=job, action=number)
        version = fleet.call(fleet.stub.SteerRollout, request).version
        print(f"job {job}, version {version}: {_DONE[action]}", flush=True)
        if not detach:
            wait(fleet, job, version)


def restart_job(job: str, *, detach: bool) -> None:
    with connect() as fleet:
        version = fleet.call(fleet.stub.RestartJob, operator_pb2.RestartJobRequest(job=job)).version
        print(f"job {job}, version {version}: all copies are replaced by equal ones", flush=True)
        if not detach:
            wait(fleet, job, version)


def restart_allocation(alloc: str, *, detach: bool) -> None:
    """Waits until each task has begun once more and all is healthy; at most as long as its rollout would."""
    with connect() as fleet:
        before = _steer(fleet, alloc, AllocAction.RESTART)
        print(f"allocation {before.id}: restarting", flush=True)
        if detach:
            return
        began = _starts(before)
        until_s = time.monotonic() + _RESTART_S_MAX
        while (now := _allocation(fleet, before.id)) and not (now.healthy and _starts(now) > began):
            if now.status in TERMINAL:
                raise RefusedError("ended", f"allocation {now.id} is {now.status}: {reason(now)}")
            if time.monotonic() > until_s:
                raise RefusedError("not-healthy", f"allocation {now.id} is not healthy: {reason(now)}")
            time.sleep(_POLL_S)
    print(f"allocation {before.id}: runs anew")


def stop_allocation(alloc: str, *, detach: bool) -> None:
    with connect() as fleet:
        before = _steer(fleet, alloc, AllocAction.STOP)
        while not detach and _allocation(fleet, before.id).status not in TERMINAL:
            time.sleep(_POLL_S)
    print(f"allocation {before.id}: {'stopping' if detach else 'stopped'}")


def drain_node(node: str, *, deadline: str, keep_system: bool, detach: bool) -> None:
    """Waits until the node is empty, and tells what leaves."""
    until_s = deadline_s(deadline)
    with connect() as fleet:
        request = operator_pb2.SteerNodeRequest(
            node=node, eligible=False, drain=True, deadline_s=until_s, keep_system=keep_system
        )
        fleet.call(fleet.stub.SteerNode, request)
        print(f"node {node}: draining", flush=True)
        left: dict[str, str] = {}
        while not detach:
            answer = fleet.call(fleet.stub.GetNode, operator_pb2.GetNodeRequest(node=node))
            state = codec.from_wire(answer.node, NodeState)
            there = [codec.from_wire(one, Allocation) for one in answer.allocations]
            for allocation in left.keys() - {one.id for one in there}:
                output.say(f"{left.pop(allocation)} {allocation} has left")
            left.update({one.id: f"{one.job}.{copy_name(one)}" for one in there})
            if state.drain is None:
                _say_drained(state, there)
                return
            time.sleep(_POLL_S)


def open_node(node: str, *, eligible: bool) -> None:
    """Ends a drain, too."""
    with connect() as fleet:
        fleet.call(fleet.stub.SteerNode, operator_pb2.SteerNodeRequest(node=node, eligible=eligible))
    print(f"node {node}: {'gets new work' if eligible else 'gets no new work'}")


def _say_drained(state: NodeState, there: list[Allocation]) -> None:
    if state.eligible:
        raise RefusedError("cancelled", f"node {state.node.id}: its drain was cancelled meanwhile")
    kept = f"; {len(there)} copies of system jobs stay" if there else ""
    print(f"node {state.node.id}: drained{kept}; `outrider node eligibility {state.node.id} --enable` opens it again")


def deadline_s(text: str) -> float | None:
    """Of `--deadline`: seconds; None has no end."""
    if text == "none":
        return None
    try:
        return duration_s(text)
    except ValueError as error:
        raise InputError(f"--deadline: {error}, or none") from error


def _steer(fleet: Fleet, alloc: str, action: AllocAction) -> Allocation:
    number = allocation_pb2.AllocAction.Value(f"ALLOC_ACTION_{action.name}")
    request = operator_pb2.SteerAllocationRequest(alloc=alloc, action=number)
    return codec.from_wire(fleet.call(fleet.stub.SteerAllocation, request).allocation, Allocation)


def _allocation(fleet: Fleet, alloc: str) -> Allocation:
    request = operator_pb2.GetAllocationRequest(alloc=alloc)
    return codec.from_wire(fleet.call(fleet.stub.GetAllocation, request), Allocation)


def _starts(allocation: Allocation) -> float:
    """When the task that began first did; grows when all have begun anew."""
    tasks = allocation.report.tasks if allocation.report is not None else ()
    return min((task.started_at_s or 0.0 for task in tasks), default=0.0)
