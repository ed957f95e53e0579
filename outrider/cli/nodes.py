"""`outrider node`: the fleet's nodes."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outrider.model.fleet import NodeState

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def ls(json: Json = False) -> None:
    """All nodes, and how they are."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.fleet import NodeState
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        found = fleet.call(fleet.stub.ListNodes, operator_pb2.ListNodesRequest()).nodes
    nodes = [codec.from_wire(node, NodeState) for node in found]
    if json:
        output.print_json(nodes)
        return
    output.print_table(
        ("NODE", "STATUS", "SINCE", "ELIGIBLE", "ADDRESS", "ALLOCS", "CPU", "MEMORY", "REASON"),
        (
            (
                state.node.id,
                state.status,
                output.age(state.status_since_s),
                "draining" if state.drain else "yes" if state.eligible else "no",
                state.node.address,
                str(state.allocations),
                f"{output.cores(state.cpu_millis_used)}/{output.cores(state.node.fingerprint.cpu_millis)}",
                f"{output.mebibytes(state.memory_bytes_used)}/{output.mebibytes(state.node.fingerprint.memory_bytes)}",
                state.reason,
            )
            for state in nodes
        ),
    )


@app.command()
def status(node: str, json: Json = False) -> None:
    """One node, what it offers and what runs there."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.allocations import print_allocations
    from outrider.cli.client import connect
    from outrider.model.allocation import Allocation
    from outrider.model.fleet import NodeState
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.stub.GetNode, operator_pb2.GetNodeRequest(node=node))
    state = codec.from_wire(answer.node, NodeState)
    placed = [codec.from_wire(found, Allocation) for found in answer.allocations]
    if json:
        output.print_json({"node": state, "allocations": placed})
        return
    host = state.node.fingerprint
    output.print_fields(
        (
            ("node", state.node.id),
            ("status", f"{state.status} for {output.age(state.status_since_s)}"),
            ("reason", state.reason),
            ("eligible", _eligible(state)),
            ("address", state.node.address),
            ("cpu", f"{output.cores(state.cpu_millis_used)} of {output.cores(host.cpu_millis)} cores reserved"),
            (
                "memory",
                f"{output.mebibytes(state.memory_bytes_used)} of {output.mebibytes(host.memory_bytes)} reserved",
            ),
            ("disk", output.mebibytes(host.disk_bytes)),
            ("kernel", f"{host.kernel} {host.architecture}".strip()),
            ("cgroups", host.cgroup),
            ("kvm", host.kvm or "not tested yet"),
            ("runtimes", ", ".join(f"{name} {version}" for name, version in sorted(host.runtimes.items()))),
            ("pool", host.pool),
            ("devices", ", ".join(f"{name}={count}" for name, count in sorted(host.devices.items()))),
            ("hugepages", ", ".join(f"{pool.free} of {pool.total} of {pool.page} free" for pool in host.hugepages)),
            ("meta", ", ".join(f"{name}={value}" for name, value in sorted(host.meta.items()))),
            ("version", state.node.version),
        )
    )
    print()
    print_allocations(placed)


@app.command()
def revoke(node: str) -> None:
    """End the trust in a node: its certificate is worth nothing from here on, and its work moves elsewhere.

    It may join again with a token that names it: `outrider token create --node NODE`.
    """
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.access.RevokeNode, access_pb2.RevokeNodeRequest(node=node))
    print(f"node {node}: {'revoked' if answer.changed else 'was revoked already'}")


@app.command()
def drain(  # noqa: PLR0917 - typer's: each is an option
    node: str,
    deadline: Annotated[str, typer.Option(help="Until when it goes with care; then at once. `none`: no end.")] = "1h",
    force: Annotated[bool, typer.Option("--force", help="At once.")] = False,
    keep_system: Annotated[bool, typer.Option("--keep-system", help="Copies of system jobs stay.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="What is there stays; it gets new work again.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it is empty.")] = False,
) -> None:
    """Empty a node: every copy first begins elsewhere, as many at a time as `max_parallel` of its group allows."""
    from outrider.cli.steering import drain_node, open_node

    if cancel:
        open_node(node, eligible=True)
    else:
        drain_node(node, deadline="0s" if force else deadline, keep_system=keep_system, detach=detach)


@app.command()
def eligibility(
    node: str,
    enable: Annotated[bool, typer.Option("--enable/--disable", help="Whether it gets new work.")],
) -> None:
    """Whether a node gets new work. What runs there is not touched."""
    from outrider.cli.steering import open_node

    open_node(node, eligible=enable)


def _eligible(state: "NodeState") -> str:
    if state.drain is None:
        return "yes" if state.eligible else "no: it gets no new work"
    until_s = state.drain.deadline_at_s
    deadline = "as long as it takes" if until_s is None else f"{max(0.0, until_s - time.time()):.0f} s left"
    return f"no: it is drained, {deadline}"
