"""The controller's state. Signatures first; the bodies follow in the next commits."""

from collections.abc import Iterable

from controller.core.policy import Policy
from controller.core.records import Record
from outrider.model.allocation import Generation


class State:
    generation: Generation
    salt: int
    epoch: int

    @classmethod
    def empty(cls, policy: Policy | None = None) -> "State": ...  # type: ignore[empty-body]

    def apply(self, record: Record) -> None: ...

    def next_epoch(self, salt: int) -> Record:  # type: ignore[empty-body]
        """What to append and apply after replay, before the first event. `salt` counts in the first epoch only."""

    def snapshot(self) -> Iterable[Record]:  # type: ignore[empty-body]
        """Few records that make the same durable state: what a compacted journal begins with."""

    @property
    def next_deadline_s(self) -> float | None: ...
