"""`python -m bench NAME`: one benchmark, or `all`; of one with parts, `python -m bench NAME PART...` some of them.

Prints one JSON object per line, each as soon as it is known.
"""

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
    name, *parts = arguments or [""]
    if name not in (*NAMES, "all"):
        print(f"usage: python -m bench {{{','.join((*NAMES, 'all'))}}} [PART...]", file=sys.stderr)
        return 64
    modules = {one: importlib.import_module(f"bench.{MODULES.get(one, one)}") for one in NAMES if name in (one, "all")}
    known = tuple(map(str, getattr(modules.get(name), "PARTS", ())))
    if not set(parts) <= set(known):
        print(f"bench {name}: its parts are {', '.join(known) or 'none'}", file=sys.stderr)
        return 64
    for module in modules.values():
        if parts:
            module.run(parts)
        else:
            module.run()
    return 0


sys.exit(main(sys.argv[1:]))
