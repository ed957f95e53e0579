"""`python -m tests.fuzz [--cases N] [--seed S]`: wrong input for every reader; tells cases/s and the slowest.

Ends with 1 at the first input that crashes a reader or holds it up, and leaves it in a file.
"""

import argparse
import resource
import sys
from pathlib import Path

from tests.fuzz.run import CrashError, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        told = run(arguments.cases, arguments.seed)
    except CrashError as crash:
        Path("fuzz-crash.bin").write_bytes(crash.content)
        print(f"{crash}; the input is in fuzz-crash.bin", file=sys.stderr)
        return 1
    for name, (cases, per_s, slowest_ms) in told.items():
        print(f"{name:<24} {cases:>8} cases {per_s:>9.0f}/s, slowest {slowest_ms:.0f} ms")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.cases} cases: no crash, no hang; peak memory {peak_mb:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
