"""How a figure is told: one JSON object a line, with the peer measured in the same run."""

import json
import math
from collections.abc import Sequence


def emit(figure: str, value: float, unit: str, *, peer: str = "", peer_value: float | None = None) -> None:
    """`ratio` is ours to the peer's: below 1 is better for costs, above 1 for rates."""
    ratio = value / peer_value if peer_value else None
    line = {
        "figure": figure,
        "value": round(value, 3),
        "unit": unit,
        "peer": peer or None,
        "peer_value": None if peer_value is None else round(peer_value, 3),
        "ratio": None if ratio is None else round(ratio, 3),
    }
    print(json.dumps(line), flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: a value that was measured, never one between."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
