"""Where records become durable. Owns the contract; each store has a module of its own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from controller.core.records import Record
from outrider.errors import JournalError


class LeadershipLostError(JournalError):
    """Another controller leads, or nobody can tell: what was asked for may or may not be in the journal."""


class Journal(Protocol):
    """All calls block but `due` and `refusal`: the caller has a thread for them, and groups commits."""

    def open(self) -> None:
        """Raises JournalError where another controller holds it, or it cannot be read."""

    def load(self) -> Iterator[Record]:
        """Every record since the last snapshot, that one first."""

    def append(self, batch: Sequence[Record]) -> None:
        """All of them, durably, or none. Raises JournalError: the caller must exit."""

    def snapshot(self, records: Iterable[Record]) -> None:
        """Replace all that was appended so far by `records`, which make the same state."""

    def due(self) -> bool:
        """So much was appended since the last snapshot that another one is worth its price."""

    def refusal(self) -> str:
        """Why nothing more should be taken in, with the limit's name and value; "" while there is room."""

    def close(self) -> None: ...
