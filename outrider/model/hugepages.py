"""Hugepages: how their sizes are called, and as what the scheduler counts them, beside devices."""

import re
from collections.abc import Mapping

_NAME = re.compile(r"^(?P<number>[1-9][0-9]{0,3})(?P<unit>Ki|Mi|Gi)\Z")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def page_bytes(name: str) -> int | None:
    """Of `2Mi`; None for what no page's size is called."""
    match = _NAME.match(name)
    if match is None:
        return None
    size = int(match["number"]) * _UNITS[match["unit"]]
    return size if size & (size - 1) == 0 and page_name(size) == name else None


def page_name(size_bytes: int) -> str:
    unit = next(unit for unit in ("Gi", "Mi", "Ki") if size_bytes % _UNITS[unit] == 0)
    return f"{size_bytes // _UNITS[unit]}{unit}"


def counted_as(page: str) -> str:
    """No device is called so: their names have lower-case letters alone."""
    return f"hugepages-{page}"


def counted(amounts: Mapping[str, int]) -> dict[str, int]:
    """How many pages of each size so many bytes are."""
    sizes = ((page, amount, page_bytes(page)) for page, amount in amounts.items())
    return {counted_as(page): -(-amount // size) for page, amount, size in sizes if size is not None}
