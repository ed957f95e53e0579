"""The agent starts: what its records say, what the host still runs, and what follows. Nothing that runs is touched.

An allocation whose namespace is there is taken over as it is; one without (the host was restarted) begins anew.
"""

from agent.core import allocation, amend, exposed, health
from agent.core.commands import AdoptSidecar, AdoptTask, Note
from agent.core.events import AllocRecord, Found, FoundTask, TaskExit, TaskRecord
from agent.core.lifecycle import Phase
from agent.core.state import AllocState, Turn, new_alloc
from outrider.model.allocation import Assignment, Desired, TaskStatus
from outrider.model.job import TaskRole


def adopt(assignment: Assignment, found: Found, turn: Turn) -> AllocState:
    """The allocation as it stands. `assignment` is the record's, or the controller's where the record is lost."""
    record = found.record or AllocRecord(assignment=assignment)
    alloc = new_alloc(assignment)
    alloc.durable, alloc.saved = found.record is not None, found.record
    alloc.stopping = record.stopping or record.ended or assignment.desired is Desired.STOP
    alloc.failure, alloc.log_tail = record.failure, record.log_tail
    alloc.local_address = found.local_address or ""
    alloc.end_durable = record.ended
    if found.record is not None:
        alloc.restarts_done = record.restarts_done
    for name, task in alloc.tasks.items():
        task.restarts = record.tasks.get(name, TaskRecord()).restarts
        task.tried_at_s = record.tasks.get(name, TaskRecord()).tried_at_s
    nothing_left = found.local_address is None and not found.sidecar and not found.tasks
    if nothing_left and (alloc.stopping or _work_is_done(alloc, record)):
        alloc.stopping, alloc.phase = True, Phase.ENDED
        _remember_ends(alloc, record)
    elif nothing_left:
        allocation.prepare(alloc, turn)
    elif found.local_address is None or record.ended or exposed.is_open(assignment):
        # The last: what was made for a port that was not written down any more is made anew.
        alloc.stopping = alloc.stopping or _work_is_done(alloc, record)
        _remember_ends(alloc, record)
        allocation.clean(alloc, turn)
    elif _never_started(alloc, found, record):
        _resume_setup(alloc, found, turn)
    else:
        _resume_tasks(alloc, found, record, turn)
    turn.emit(Note(event="adopted", alloc=alloc.id, message=f"as {alloc.phase}"))
    return alloc


def _work_is_done(alloc: AllocState, record: AllocRecord) -> bool:
    mains = [name for name, task in alloc.tasks.items() if task.role is TaskRole.MAIN]
    return alloc.assignment.batch and all(_over(record, name) is not None for name in mains)


def _over(record: AllocRecord, name: object) -> TaskExit | None:
    return next((task.ended for key, task in record.tasks.items() if key == name), None)


def _remember_ends(alloc: AllocState, record: AllocRecord) -> None:
    for name, task in alloc.tasks.items():
        exit_ = _over(record, name)
        if exit_ is not None:
            task.exit = exit_
            task.status = TaskStatus.FAILED if exit_.code != 0 and alloc.failure else TaskStatus.EXITED
            task.started_at_s, task.message = record.tasks[name].started_at_s, record.tasks[name].message


def _never_started(alloc: AllocState, found: Found, record: AllocRecord) -> bool:
    known = (record.tasks.get(name, TaskRecord()) for name in alloc.tasks)
    return not found.tasks and all(task.started_at_s is None and task.ended is None for task in known)


def _resume_setup(alloc: AllocState, found: Found, turn: Turn) -> None:
    """The agent ended between the namespace and the first task."""
    if alloc.stopping:
        allocation.clean(alloc, turn)
    elif alloc.has_sidecar and found.sidecar:
        alloc.become(Phase.SIDECAR_STARTING)
        turn.emit(AdoptSidecar(assignment=alloc.assignment, local_address=alloc.local_address))
    else:
        allocation.start_sidecar_phase(alloc, turn)


def _resume_tasks(alloc: AllocState, found: Found, record: AllocRecord, turn: Turn) -> None:
    alloc.phase = Phase.TASKS_STARTING
    for name, task in alloc.tasks.items():
        there = found.tasks.get(name)
        known = record.tasks.get(name, TaskRecord())
        task.started_at_s, task.message = known.started_at_s, known.message
        if there is not None and there.exit is None:
            task.status = TaskStatus.RUNNING
            task.started_at_s = there.started_at_s or known.started_at_s
            turn.emit(AdoptTask(assignment=alloc.assignment, task=name))
        elif known.ended is not None:
            task.exit, task.status = known.ended, TaskStatus.EXITED
        elif there is not None or known.started_at_s is not None:
            allocation.task_ended(alloc, task, _exit_of(there), turn)
    _resume_sidecar(alloc, found, turn)
    if alloc.stopping:
        # A drain that the old agent began is not waited for again.
        alloc.phase = Phase.STOPPING
        allocation.ask_to_stop(alloc, turn)
        return
    allocation.run(alloc, turn)
    amend.restart(alloc, turn)
    for probe in alloc.probes.values():
        if alloc.phase is Phase.RUNNING:
            health.resume(probe, turn.now_s, passing=probe.service in record.passing)


def _resume_sidecar(alloc: AllocState, found: Found, turn: Turn) -> None:
    if not alloc.has_sidecar:
        return
    if found.sidecar:
        # It served all the while, and reconnects by itself: it counts as ready at once.
        alloc.sidecar_ready = True
        turn.emit(AdoptSidecar(assignment=alloc.assignment, local_address=alloc.local_address))
    elif not alloc.stopping:
        allocation.sidecar_lost(alloc, turn)


def _exit_of(there: FoundTask | None) -> TaskExit:
    return there.exit if there is not None and there.exit is not None else TaskExit()
