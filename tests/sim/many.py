"""Many seeds, on every core. Owns the worker processes; knows nothing of what a run is but that it may break."""

import concurrent.futures
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator

from tests.sim.kernel import BrokenError
from tests.sim.simulation import run

BATCH = 20
_TELL_S = 10.0


def failures_of(seeds: range) -> list[str]:
    """What broke, of these."""
    found = []
    for seed in seeds:
        try:
            run(seed)
        except BrokenError as broken:
            found.append(str(broken))
    return found


def many(first: int, count: int | None, *, processes: int | None = None) -> list[str]:
    """Until `count` seeds ran, or Ctrl-C. Prints each broken one at once, and seeds/s now and then."""
    began_s, told_s, done = time.monotonic(), time.monotonic(), 0
    failures: list[str] = []
    batches = _batches(first, count)
    workers = processes or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(failures_of, batch): batch for batch in itertools.islice(batches, 2 * workers)}
        try:
            while waiting:
                finished, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    done += len(waiting.pop(future))
                    for failure in future.result():
                        failures.append(failure)
                        print(failure, flush=True)
                    for batch in itertools.islice(batches, 1):
                        waiting[pool.submit(failures_of, batch)] = batch
                if time.monotonic() - told_s > _TELL_S:
                    told_s = time.monotonic()
                    print(f"{done} seeds, {done / (told_s - began_s):.1f} seeds/s, {len(failures)} broken", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{done} seeds, {done / (time.monotonic() - began_s):.1f} seeds/s, {len(failures)} broken")
    return failures


def _batches(first: int, count: int | None) -> Iterator[range]:
    at = first
    while count is None or at < first + count:
        end = at + BATCH if count is None else min(at + BATCH, first + count)
        yield range(at, end)
        at = end
