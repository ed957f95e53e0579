"""docs/CATALOG.md names exactly the endpoints that the embedded catalog serves."""

import re
from pathlib import Path

from controller.catalog.catalog import _ROUTES

ROOT = Path(__file__).parents[2]


def test_every_endpoint_is_told_of_and_no_other() -> None:
    text = (ROOT / "docs/CATALOG.md").read_text()
    told = set(re.findall(r"`((?:GET|PUT|POST|DELETE) /[^`]+)`", text))
    served = {f"{route.method} {route.path}" for route in _ROUTES}
    assert told == served, f"docs/CATALOG.md: missing {sorted(served - told)}, not served {sorted(told - served)}"
