"""What one job's decision is made from, and what it gathers over the job's groups. Owns the shapes alone."""

from dataclasses import dataclass, field

import numpy as np

from controller.core.draft import Draft
from controller.core.outlook import Outlook
from controller.core.state import State


@dataclass(slots=True)
class Progress:
    done: bool = True  # everything wanted is there, of this version, and well
    failure: str = ""
    auto_revert: bool = False  # of the group that failed
    canaries: bool = False  # some group waits to be promoted
    proven: bool = True  # its canaries are all there, and well
    auto_promote: bool = True  # all groups that wait have it
    moving: bool = False  # copies leave their nodes
    wake_s: float = field(default=np.inf)  # when time alone changes the answer

    def fail(self, reason: str, *, auto_revert: bool) -> None:
        """The first reason is told."""
        if not self.failure:
            self.failure, self.auto_revert = reason, auto_revert

    def wake(self, at_s: float) -> None:
        self.wake_s = min(self.wake_s, at_s)


@dataclass(slots=True)
class Turn:
    """One job's turn in the making of a plan."""

    state: State
    draft: Draft
    view: Outlook
    now_s: float
    progress: Progress = field(default_factory=Progress)
