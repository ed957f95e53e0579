"""A newer assignment of an allocation that goes on: what of it is taken up in place, and restarts that operators want.

What makes the process is the same in both: the controller replaces an allocation for anything else.
"""

from agent.core import allocation, health
from agent.core.health import Probe
from agent.core.lifecycle import Phase
from agent.core.state import AllocState, Turn
from outrider.model.allocation import TaskStatus
from outrider.model.job import inner_ports

_RESTART_REASON = "an operator restarted it"


def take_up(alloc: AllocState, turn: Turn) -> None:
    """`alloc.assignment` is new: checks, signals and restarts follow it."""
    for task in alloc.assignment.group.tasks:
        alloc.tasks[task.name].task = task
    _renew_probes(alloc, turn)
    restart(alloc, turn)


def restart(alloc: AllocState, turn: Turn) -> None:
    """Every task that runs ends and begins again, if that was asked for once more than it was done."""
    if alloc.assignment.restarts <= alloc.restarts_done:
        return
    for task in alloc.tasks.values():
        if task.status is TaskStatus.BACKOFF:
            task.retry_at_s = turn.now_s
        allocation.restart_task(alloc, task, _RESTART_REASON, turn)
    allocation.note_restarted(alloc)


def _renew_probes(alloc: AllocState, turn: Turn) -> None:
    group = alloc.assignment.group
    ports = inner_ports(group.network)
    before, alloc.probes = alloc.probes, {}
    for service in group.services:
        if service.check is None:
            continue
        probe = before.get(service.name)
        if probe is None or probe.check != service.check:
            passing, in_flight = probe is None or probe.passing, probe is not None and probe.in_flight
            port = ports.get(service.port) if service.port else None
            probe = Probe(service=service.name, check=service.check, port=port, in_flight=in_flight)
            if alloc.phase is Phase.RUNNING:
                # It ran well until now, and does so until the new check says otherwise.
                health.resume(probe, turn.now_s, passing=passing)
        alloc.probes[service.name] = probe
