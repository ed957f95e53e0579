"""The life of an allocation on its node, as a table. `python -m agent.core.lifecycle` prints it as a diagram.

Owns which phase may follow which; what happens in a phase is `allocation`'s.
"""

from enum import StrEnum


class Phase(StrEnum):
    PREPARING = "preparing"  # its record goes to disk, its namespace is made, its leaves are asked for
    SIDECAR_STARTING = "sidecar_starting"  # until Envoy serves its first configuration
    TASKS_STARTING = "tasks_starting"
    RUNNING = "running"
    DRAINING = "draining"  # the sidecar fails its health and lets requests finish; the workload still runs
    STOPPING = "stopping"  # tasks were asked to end; the sidecar still carries what they send
    SIDECAR_STOPPING = "sidecar_stopping"
    CLEANING = "cleaning"  # sandboxes, namespace and claims go
    BACKOFF = "backoff"  # a step failed, all was cleaned, and it will be tried again
    ENDED = "ended"  # nothing is left on the host but logs and the record


# What follows what, and why. An allocation found running after the agent's restart begins in the phase that fits it;
# every change goes through `check_transition`.
TRANSITIONS: dict[Phase, dict[Phase, str]] = {
    Phase.PREPARING: {
        Phase.SIDECAR_STARTING: "namespace made",
        Phase.TASKS_STARTING: "namespace made, no services",
        Phase.CLEANING: "failed, or told to stop",
    },
    Phase.SIDECAR_STARTING: {
        Phase.TASKS_STARTING: "first configuration served",
        Phase.SIDECAR_STOPPING: "failed, or told to stop",
    },
    Phase.TASKS_STARTING: {
        Phase.RUNNING: "every task runs",
        Phase.DRAINING: "told to stop",
        Phase.STOPPING: "a task failed for good, no sidecar to drain, or all but helpers ended",
        Phase.SIDECAR_STOPPING: "all work ended",
        Phase.CLEANING: "all work ended, no services",
    },
    Phase.RUNNING: {
        Phase.TASKS_STARTING: "a task exited and will be restarted",
        Phase.DRAINING: "told to stop",
        Phase.STOPPING: "a task failed for good, no sidecar to drain, or all but helpers ended",
        Phase.SIDECAR_STOPPING: "all work ended",
        Phase.CLEANING: "all work ended, no services",
    },
    Phase.DRAINING: {Phase.STOPPING: "drained, or the deadline passed"},
    Phase.STOPPING: {
        Phase.SIDECAR_STOPPING: "every task ended",
        Phase.CLEANING: "every task ended, no services",
    },
    Phase.SIDECAR_STOPPING: {Phase.CLEANING: "Envoy ended"},
    Phase.CLEANING: {
        Phase.ENDED: "nothing left",
        Phase.BACKOFF: "will be tried again",
    },
    Phase.BACKOFF: {
        Phase.PREPARING: "the delay passed",
        Phase.ENDED: "told to stop",
    },
    Phase.ENDED: {},
}


def check_transition(before: Phase, after: Phase) -> None:
    """Raises AssertionError where the table does not know the change: a programmer's error."""
    assert after in TRANSITIONS[before], f"{before} -> {after} is not in the table"


def mermaid() -> str:
    """The table as a Mermaid state diagram, for docs."""
    lines = ["stateDiagram-v2", "    [*] --> preparing: assigned", "    ended --> [*]: forgotten"]
    for before, followers in TRANSITIONS.items():
        lines += [f"    {before} --> {after}: {why}" for after, why in followers.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(mermaid(), end="")
