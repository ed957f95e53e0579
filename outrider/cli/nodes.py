"""`outrider node`: the fleet's nodes."""

from typing import Annotated

import typer

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
        ("NODE", "STATUS", "SINCE", "ADDRESS", "ALLOCS", "CPU", "MEMORY", "REASON"),
        (
            (
                state.node.id,
                state.status,
                output.age(state.status_since_s),
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
