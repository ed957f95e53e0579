"""Python's garbage collector, tuned to a process that keeps a large state for long. Owns that setting alone."""

import gc

_YOUNG = 50_000  # objects made before a look at the young; 700 by default, many times in one plan
_YOUNG_LOOKS = 20
_OLD_LOOKS = 50


def calm() -> None:
    """What is there now is there for good: it is not looked at again, and the rest more rarely.

    A look at all objects of a large fleet takes longer than a heartbeat may be late.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _YOUNG_LOOKS, _OLD_LOOKS)
