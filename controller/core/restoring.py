"""A journal that takes the place of another: what must be added so that neither agents nor ids are confused. Pure."""

from collections.abc import Iterable, Iterator

from controller.core.policy import Policy
from controller.core.records import EpochBegun, Record, SerialsSkipped
from controller.core.state import State

# Given out since the snapshot by a controller that nobody can ask any more: none of them is given out again.
_SERIALS_UNKNOWN = 1_000_000


def restored(records: Iterable[Record], policy: Policy, *, epoch: int, next_serial: int) -> Iterator[Record]:
    """`records`, and then what follows from being restored over a journal that had come to `epoch`, `next_serial`.

    What agents still run of the time since the snapshot is unclaimed: kept until somebody decides (DESIGN, decision 1).
    Its serials are skipped, and the epoch is one that no agent has heard of yet.
    """
    state = State.empty(policy)
    for record in records:
        state.apply(record)
        yield record
    past = max(state.next_serial, next_serial) + _SERIALS_UNKNOWN
    yield SerialsSkipped(first=state.next_serial, past=past)
    yield EpochBegun(epoch=max(state.epoch, epoch), salt=state.salt)
