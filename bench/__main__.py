"""`python -m bench NAME`: one benchmark, or `all`. Prints one JSON object per line."""

import importlib
import sys

NAMES = (
    "start",
    "footprint",
    "vm",
    "image",
    "failover",
    "fleet",
    "propagation",
    "mesh",
    "density",
    "schedule",
    "deploy",
)

MODULES = {"fleet": "scale"}  # `bench.fleet` is the dev fleet that the others have


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in (*NAMES, "all"):
        print(f"usage: python -m bench {{{','.join((*NAMES, 'all'))}}}", file=sys.stderr)
        return 64
    for name in NAMES if arguments[0] == "all" else arguments:
        importlib.import_module(f"bench.{MODULES.get(name, name)}").run()
    return 0


sys.exit(main(sys.argv[1:]))
