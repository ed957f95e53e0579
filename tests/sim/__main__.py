"""`python -m tests.sim SEED` replays one run with its trace; `--many [--first N] [--count N]` runs one seed after the
other, on every core, until it is stopped, and tells seeds per second."""

import argparse
import sys

from tests.sim.kernel import BrokenError
from tests.sim.many import many
from tests.sim.simulation import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", help="replay this one")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=None, help="default: until stopped")
    arguments = parser.parse_args()
    if arguments.many:
        return 1 if many(arguments.first, arguments.count) else 0
    if arguments.seed is None:
        parser.error("say a seed, or --many")
    return replay(arguments.seed)


def replay(seed: int) -> int:
    try:
        result = run(seed, tracing=True)
    except BrokenError as broken:
        print("\n".join(broken.trace))
        print(broken)
        return 1
    print("\n".join(result.trace))
    print(f"seed {seed}: {result.events} events, {result.records} records, digest {result.digest}: all promises hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
