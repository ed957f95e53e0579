"""Join tokens: hashed on disk, counted, expiring, and silent about why one is refused."""

import stat
from pathlib import Path

import pytest

from controller.tokens import Tokens
from outrider.errors import HostError, RefusedError
from outrider.ids import NodeId

N1, N2 = NodeId("n1"), NodeId("n2")


def test_a_token_is_good_for_its_uses_and_its_time(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    plain = tokens.create(uses=1, valid_s=10, now_s=0)
    tokens.use(tokens.allowed(plain, N1, 9), 9)
    for now_s in (9, 11):
        with pytest.raises(RefusedError, match="unknown, used up, expired"):
            tokens.allowed(plain, N1, now_s)


def test_a_token_for_one_node_is_for_no_other(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    plain = tokens.create(uses=5, valid_s=10, now_s=0, nodes=(N1,))
    assert tokens.allowed(plain, N1, 1).nodes == (N1,)
    with pytest.raises(RefusedError):
        tokens.allowed(plain, N2, 1)
    with pytest.raises(RefusedError):
        tokens.allowed(plain + "x", N1, 1)


def test_only_hashes_are_on_disk_and_a_restart_keeps_what_was_used(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    plain = tokens.create(uses=2, valid_s=10, now_s=0)
    tokens.use(tokens.allowed(plain, N1, 1), 1)
    assert plain not in (tmp_path / "tokens.json").read_text()
    again = Tokens(tmp_path)
    assert again.allowed(plain, N1, 1).uses_left == 1


def test_the_first_token_is_kept_closed_and_replaced_when_it_has_run_out(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    path = tokens.ensure_first(0)
    first = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tokens.ensure_first(1).read_text() == first
    assert tokens.ensure_first(1e9).read_text() != first


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("{")
    with pytest.raises(HostError, match=r"tokens\.json"):
        Tokens(tmp_path)
