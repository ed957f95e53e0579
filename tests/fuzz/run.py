"""Cases against targets: what came of them, how fast, how much memory stayed. Owns what counts as broken."""

import gc
import random
import resource
import time
import traceback

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import Target, all_targets

SLOW_S = 5.0  # of processor time, for one input: a hang
GROWTH_MB_MAX = 64  # between the first tenth of a target's cases and its last


class CrashError(AssertionError):
    def __init__(self, message: str, content: bytes) -> None:
        super().__init__(message)
        self.content = content


def run(cases: int, seed: int) -> dict[str, tuple[int, float, float]]:
    """For each target: cases, cases per second of processor time, the slowest in milliseconds. Raises CrashError."""
    return {target.name: _run(target, max(1, cases * target.share // 100), seed) for target in all_targets()}


def _run(target: Target, cases: int, seed: int) -> tuple[int, float, float]:
    rng = random.Random(f"{seed} {target.name}")  # noqa: S311 - repeatable
    began_s, slowest_s, early_mb = time.process_time(), 0.0, 0.0
    for number in range(cases):
        content = mutated(rng.choice(target.samples), target.samples, rng)
        case_s = time.process_time()
        try:
            target.read(content)
        except target.known:
            pass
        except RecursionError as error:
            raise CrashError(f"{target.name}: case {number}, seed {seed}: {error!r}", content) from error
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{target.name}: case {number}, seed {seed}: {error!r} at {where.filename}:{where.lineno}"
            raise CrashError(text, content) from error
        took_s = time.process_time() - case_s
        slowest_s = max(slowest_s, took_s)
        if took_s > SLOW_S:
            raise CrashError(f"{target.name}: case {number}, seed {seed} took {took_s:.1f} s", content)
        if number == cases // 10:
            early_mb = _resident_mb()
    grown_mb = _resident_mb() - early_mb
    if cases >= 10_000 and grown_mb > GROWTH_MB_MAX:
        raise CrashError(f"{target.name}: memory grew by {grown_mb:.0f} MB over {cases} cases", b"")
    return cases, cases / max(1e-9, time.process_time() - began_s), slowest_s * 1000


def _resident_mb() -> float:
    gc.collect()
    with open("/proc/self/statm") as file:  # noqa: PTH123 - two words
        return int(file.read().split()[1]) * resource.getpagesize() / 1024 / 1024
