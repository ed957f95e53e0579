"""The kernel's pools, read from a tree as it shows them."""

from pathlib import Path

from agent.sandbox.hugepages import free_bytes, pools
from outrider.model.node import Hugepages


def test_pools_with_pages_are_told_and_what_is_promised_is_not_free(tmp_path: Path) -> None:
    for size, total, free, promised in ((1048576, 0, 0, 0), (2048, 16, 10, 4), (64, 3, 1, 2)):
        pool = tmp_path / f"hugepages-{size}kB"
        pool.mkdir()
        for name, number in (("nr", total), ("free", free), ("resv", promised)):
            (pool / f"{name}_hugepages").write_text(f"{number}\n")
    assert pools(tmp_path) == (Hugepages(page="64Ki", total=3, free=0), Hugepages(page="2Mi", total=16, free=6))
    assert (free_bytes(2 << 20, tmp_path), free_bytes(1 << 20, tmp_path)) == (12 << 20, 0)
    assert pools(tmp_path / "none") == ()
