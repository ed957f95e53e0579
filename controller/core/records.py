"""The journal's records: the durable part of the state changes by these alone. Replay of all equals the state."""

from outrider.model.job import Value


class EpochBegun(Value, frozen=True, kw_only=True, tag=True):
    """A leader's term, or a restore, begins: generations compare higher than any before."""

    epoch: int
    salt: int = 0  # of allocation ids; drawn with the first epoch and kept


Record = EpochBegun
