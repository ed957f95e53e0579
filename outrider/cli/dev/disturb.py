"""What `dev kill`, `partition` and `heal` do to one node."""

import itertools

from outrider.cli.dev import namespaces
from outrider.cli.dev.layout import Layout, find
from outrider.cli.dev.removal import end, sandboxes
from outrider.errors import InputError, PeerError
from outrider.ids import NodeId


def kill(name: str, node: str) -> None:
    """The link first: a host that is lost says no goodbye on its connections."""
    layout, node_id = _node(name, node)
    layout.lost(node_id).touch()
    namespaces.set_link(layout, node_id, up=False)
    # Twice: what was being started while the first round ended is found by the second.
    for _ in range(2):
        end([*itertools.chain(namespaces.processes(layout.namespace(node_id)), sandboxes(layout, node_id))])


def partition(name: str, node: str) -> None:
    layout, node_id = _node(name, node)
    namespaces.set_link(layout, node_id, up=False)


def heal(name: str, node: str) -> None:
    layout, node_id = _node(name, node)
    namespaces.set_link(layout, node_id, up=True)
    layout.lost(node_id).unlink(missing_ok=True)


def _node(name: str, node: str) -> tuple[Layout, NodeId]:
    layout = find(name)
    if layout is None:
        raise PeerError(f"no fleet {name!r} runs here; `outrider dev --name {name}` starts one")
    if node not in layout.nodes:
        raise InputError(f"{node!r} is no node of fleet {name}: {', '.join(layout.nodes)}")
    return layout, NodeId(node)
