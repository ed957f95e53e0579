"""Names of one allocation's resources and figures in an Envoy that several have together. Pure.

A scope is "" in an Envoy of one's own, and else what every name begins with: nothing of an allocation is another's.
"""

from outrider.ids import AllocId


def scope_of(alloc: AllocId) -> str:
    return f"{alloc}/"


def alloc_of(name: str) -> AllocId:
    """Whose it is, of a name with a scope."""
    return AllocId(name.partition("/")[0])


def figures_scope(scope: str) -> str:
    """As Envoy's figures have it, whose parts are told apart by dots."""
    return f"alloc.{alloc_of(scope)}." if scope else ""
