"""The kernel's pools of hugepages, as /sys tells of them. Reads only."""

from pathlib import Path

from outrider.model.hugepages import page_name
from outrider.model.node import Hugepages

_POOLS = Path("/sys/kernel/mm/hugepages")
_KIB = 1024


def pools(directory: Path = _POOLS) -> tuple[Hugepages, ...]:
    """Those that have pages, the smallest pages first."""
    sizes = sorted(int(path.name.removeprefix("hugepages-").removesuffix("kB")) for path in directory.glob("*-*kB"))
    found = (
        Hugepages(
            page=page_name(size * _KIB),
            total=_number(directory, size, "nr_hugepages"),
            free=_free(directory, size),
        )
        for size in sizes
    )
    return tuple(pool for pool in found if pool.total)


def free_bytes(page_bytes: int, directory: Path = _POOLS) -> int:
    """What nobody has, nor was promised; 0 where the kernel has no such pages."""
    size = page_bytes // _KIB
    return _free(directory, size) * page_bytes if (directory / f"hugepages-{size}kB").is_dir() else 0


def _free(directory: Path, size_kib: int) -> int:
    promised = _number(directory, size_kib, "resv_hugepages")
    return max(0, _number(directory, size_kib, "free_hugepages") - promised)


def _number(directory: Path, size_kib: int, name: str) -> int:
    return int((directory / f"hugepages-{size_kib}kB" / name).read_text())
