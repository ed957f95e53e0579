"""The simulated fleet keeps its promises, whatever the seed; the simulation itself sees what it is there for."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.core import commit, reconcile
from controller.core.state import State
from tests.sim import agents
from tests.sim.kernel import BrokenError
from tests.sim.many import many
from tests.sim.simulation import run
from tests.sim.store import Store

ROOT = Path(__file__).parents[2]
SEEDS = 40  # of every `make test`
DEEP_SEEDS = 100_000
PLANTED_SEEDS = 60
# Each broke a promise once, of the fleet or of the simulation: they stay.
ONCE_BROKEN = (75, 115, 173, 182, 235, 795)


def test_promises_hold() -> None:
    for seed in range(SEEDS):
        run(seed)


@pytest.mark.parametrize("seed", ONCE_BROKEN)
def test_what_broke_once_holds(seed: int) -> None:
    run(seed)


def test_one_seed_gives_one_run_byte_for_byte() -> None:
    """In another process too, where Python hashes strings otherwise."""

    def digest(hash_seed: str) -> str:
        words = [sys.executable, "-m", "tests.sim", "3"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert digest("1") == digest("2")
    assert run(3).digest == run(3).digest != run(4).digest


@pytest.mark.deep
@pytest.mark.timeout(6 * 3600)
def test_promises_hold_for_very_many_seeds() -> None:
    assert many(SEEDS, DEEP_SEEDS) == []


def found_within(seeds: int) -> str:
    for seed in range(seeds):
        try:
            run(seed)
        except BrokenError as broken:
            return str(broken)
    return ""


def plant_replies_before_the_journal(patch: pytest.MonkeyPatch) -> None:
    real = commit.flush

    def flush(state: State, now_s: float, seed: int) -> None:
        real(state, now_s, seed)
        if state.live.in_flight is not None:
            state.live.out.extend(state.live.in_flight.replies)

    patch.setattr(commit, "flush", flush)


def plant_a_store_without_a_fence(patch: pytest.MonkeyPatch) -> None:
    real = Store.write

    def write(self: Store, session: str, _index: int, nonce: str, records: object, *, whole: bool) -> int:
        self.holder, before = session, self.holder
        try:
            return real(self, session, self.index, nonce, records, whole=whole)  # type: ignore[arg-type]
        finally:
            self.holder = before

    patch.setattr(Store, "write", write)


def plant_no_deadline_for_sidecars_that_do_not_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reconcile, "withdraw_timeout", lambda _state, _key: None)


def plant_a_disk_that_forgets(patch: pytest.MonkeyPatch) -> None:
    """The agent believes that a record is on disk, and it is not."""
    real = agents.AgentProcess._put

    def put(self: agents.AgentProcess, forgets: object, saves: object, generation: object) -> None:
        kept = [save for save in saves if self.kernel.rng.random() < 0.7]  # type: ignore[attr-defined]
        real(self, forgets, kept, generation)  # type: ignore[arg-type]

    patch.setattr(agents.AgentProcess, "_put", put)


@pytest.mark.parametrize(
    "plant",
    [
        plant_replies_before_the_journal,
        plant_a_store_without_a_fence,
        plant_no_deadline_for_sidecars_that_do_not_answer,
        plant_a_disk_that_forgets,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert found_within(PLANTED_SEEDS)
