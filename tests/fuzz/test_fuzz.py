"""Wrong input from outside: no reader crashes, hangs or keeps it. Every reader is bound to see some in each run."""

import pytest

from tests.fuzz.run import run
from tests.fuzz.targets import all_targets

CASES = 20_000
DEEP_CASES = 1_000_000


def test_no_reader_crashes() -> None:
    assert len(run(CASES, seed=1)) == len(all_targets())


def test_the_shares_make_a_whole() -> None:
    assert sum(target.share for target in all_targets()) == 100


@pytest.mark.deep
@pytest.mark.timeout(3600)
def test_no_reader_crashes_in_a_million_cases() -> None:
    run(DEEP_CASES, seed=2)
