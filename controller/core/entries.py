"""What is known of one job over its versions. Owns the shape; `State.apply` changes it."""

from dataclasses import dataclass, field

from controller.core.records import JobVersionAdded, RolloutEnded
from outrider.ids import JobName
from outrider.model.fleet import RolloutState
from outrider.model.job import Job


@dataclass(slots=True)
class JobEntry:
    versions: dict[int, JobVersionAdded] = field(default_factory=dict)
    latest: int = 0
    stopped: bool = False
    rollout: RolloutState = RolloutState.RUNNING  # of the latest version
    rollout_reason: str = ""
    final: bool = False  # an operator made it fail
    promoted: bool = False  # the latest version's canaries are
    paused: bool = False
    good_version: int = 0  # the last whose rollout succeeded; 0: none yet
    outcomes: dict[int, RolloutEnded] = field(default_factory=dict)  # by version, where its rollout has ended
    # Of one that others are launched from.
    launches: int = 0  # by hand
    fired_s: float = 0.0  # the schedule's newest time that was dealt with
    children: dict[JobName, None] = field(default_factory=dict)

    @property
    def base(self) -> int:
        """The version that stands until the latest has proven itself; 0 where there is none, or it is dropped."""
        base = self.versions[self.latest].base
        return base if base in self.versions else 0

    @property
    def job(self) -> Job:
        return self.versions[self.latest].job
