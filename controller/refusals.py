"""What sidecars really refused lately, for `intention check`. In memory alone; the newest REFUSALS_MAX of them."""

from collections import deque
from collections.abc import Collection

import msgspec

from outrider.ids import AllocId, NodeId
from outrider.model.mesh import ObservedRefusal

REFUSALS_MAX = 10_000
ANSWER_MAX = 100


class Refusals:
    def __init__(self) -> None:
        self._kept: deque[ObservedRefusal] = deque(maxlen=REFUSALS_MAX)
        self.seen = 0

    def add(self, node: NodeId, refusals: tuple[ObservedRefusal, ...]) -> None:
        """`node` is who says so: it speaks for itself."""
        self.seen += len(refusals)
        self._kept.extend(msgspec.structs.replace(refusal, node=node) for refusal in refusals)

    def between(self, source_spiffe: str, allocs: Collection[AllocId]) -> tuple[ObservedRefusal, ...]:
        """Newest first, ANSWER_MAX at most."""
        found = [each for each in self._kept if each.source_spiffe == source_spiffe and each.alloc in allocs]
        found.sort(key=lambda refusal: refusal.at_s, reverse=True)
        return tuple(found[:ANSWER_MAX])
