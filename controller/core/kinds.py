"""The kinds of fleet events, all of them: docs/EVENTS.md and the tests read this list."""

from enum import StrEnum


class Kind(StrEnum):
    NODE_JOINED = "node.joined"
    NODE_READY = "node.ready"
    NODE_GONE = "node.gone"
    NODE_SUSPECT = "node.suspect"
    NODE_DOWN = "node.down"
    NODE_DRAINING = "node.draining"  # work leaves it
    NODE_DRAINED = "node.drained"
    NODE_CLOSED = "node.closed"  # it gets no new work
    NODE_OPENED = "node.opened"
    FLEET_BRAKED = "fleet.braked"  # too many nodes are away at once: nothing is ejected or replaced
    FLEET_RELEASED = "fleet.released"
    JOB_SUBMITTED = "job.submitted"
    JOB_STOPPED = "job.stopped"
    JOB_LAUNCHED = "job.launched"
    JOB_SKIPPED = "job.skipped"
    JOB_SCALED = "job.scaled"
    ALLOC_PLACED = "alloc.placed"
    ALLOC_PENDING = "alloc.pending"
    ALLOC_STARTING = "alloc.starting"
    ALLOC_RUNNING = "alloc.running"
    ALLOC_HEALTHY = "alloc.healthy"
    ALLOC_UNHEALTHY = "alloc.unhealthy"
    ALLOC_RESTARTED = "alloc.restarted"
    ALLOC_UPDATED = "alloc.updated"  # its agent is told of a newer version, and its tasks go on
    ALLOC_MOVED = "alloc.moved"
    ALLOC_STAYED = "alloc.stayed"
    ALLOC_STOPPING = "alloc.stopping"
    ALLOC_COMPLETE = "alloc.complete"
    ALLOC_FAILED = "alloc.failed"
    ALLOC_LOST = "alloc.lost"
    ALLOC_UNCLAIMED = "alloc.unclaimed"  # an agent runs it and the journal knows nothing of it: kept
    ROLLOUT_STARTED = "rollout.started"
    ROLLOUT_SUCCESSFUL = "rollout.successful"
    ROLLOUT_FAILED = "rollout.failed"
    ROLLOUT_PROVEN = "rollout.proven"  # its canaries are well, and wait to be promoted
    ROLLOUT_PROMOTED = "rollout.promoted"
    ROLLOUT_PAUSED = "rollout.paused"
    ROLLOUT_RESUMED = "rollout.resumed"
