"""`outrider mesh`: who really calls whom, why a call fails, requests as they happen, certificates."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outrider.model.insight import MeshEdge, MeshGraph, TappedCall

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Source = Annotated[str, typer.Argument(help="The calling service.")]
Destination = Annotated[str, typer.Argument(help="The called service.")]
_SPARE_S = 30.0


@app.command()
def graph(
    over: Annotated[str, typer.Option("--over", help="How long is counted: 500ms, 10s, up to 1m.")] = "2s",
    dot: Annotated[bool, typer.Option("--dot", help="For Graphviz.")] = False,
    json: Json = False,
) -> None:
    """Who calls whom: rates, failures and latencies, as the callers' sidecars count them for a moment."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import InputError
    from outrider.jobspec.units import duration_s
    from outrider.model.insight import MeshGraph
    from outrider.v1 import insight_pb2

    try:
        over_s = duration_s(over)
    except ValueError as error:
        raise InputError(f"--over {over!r}: {error}") from error
    with connect() as fleet:
        request = insight_pb2.GetMeshGraphRequest(over_s=over_s)
        found = codec.from_wire(fleet.call(fleet.insight.GetMeshGraph, request, over_s + _SPARE_S), MeshGraph)
    if json:
        output.print_json(found)
    elif dot:
        print("\n".join(_dot(found)))
    else:
        output.print_table(
            ("CALLER", "SERVICE", "PROTOCOL", "SIDECARS", "CALLS/S", "FAILED", "P50", "P99", "OPEN", "BYTES/S"),
            (
                (
                    edge.source,
                    edge.destination,
                    edge.protocol,
                    str(edge.sidecars),
                    f"{edge.calls_per_s:.1f}",
                    _percent(edge.failed_share),
                    _ms(edge.p50_ms),
                    _ms(edge.p99_ms),
                    str(edge.connections_active),
                    f"{edge.bytes_per_s:.0f}",
                )
                for edge in found.edges
            ),
        )
    for node in found.silent:
        output.say(f"node {node} did not answer: its sidecars' calls are missing")


@app.command()
def explain(
    source: Source,
    destination: Destination,
    path: Annotated[str, typer.Option("--path", help="What the trial call of an HTTP service asks for.")] = "/",
    json: Json = False,
) -> None:
    """Why SOURCE can or cannot call DESTINATION: each part that must be right, and a real call. Exit 1: it cannot."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.errors import RefusedError
    from outrider.model.insight import CallExplanation
    from outrider.v1 import insight_pb2

    with connect() as fleet:
        request = insight_pb2.ExplainCallRequest(source=source, destination=destination, path=path)
        found = codec.from_wire(fleet.call(fleet.insight.ExplainCall, request), CallExplanation)
    if json:
        output.print_json(found)
    else:
        print(f"{source} -> {destination}")
        for finding in found.findings:
            print(f"  {'ok ' if finding.good else 'BAD'}  {finding.part:<12} {output.printable(finding.text)}")
    wrong = next((finding for finding in found.findings if not finding.good), None)
    if wrong is not None:
        raise RefusedError("unreachable", f"{source} cannot call {destination}: {output.printable(wrong.text)}")


@app.command()
def tap(  # noqa: PLR0917 - typer's: each is an option
    source: Source,
    destination: Destination,
    sample: Annotated[float, typer.Option("--sample", help="Percent of the requests, chosen by chance.")] = 100.0,
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many; 0: until Ctrl-C.")] = 0,
    headers: Annotated[
        bool, typer.Option("--headers", help="All headers and the query too: they hold secrets. Needs `exec`.")
    ] = False,
    json: Json = False,
) -> None:
    """Requests of SOURCE to DESTINATION as they happen, never their bodies; what may be secret is left out."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.insight import TappedCall
    from outrider.v1 import insight_pb2

    told = 0
    with connect() as fleet:
        request = insight_pb2.TapCallsRequest(source=source, destination=destination, percent=sample, headers=headers)
        for message in fleet.stream(fleet.insight.TapCalls, request):
            call = codec.from_wire(message, TappedCall)
            if json:
                output.print_json_line(call)
            else:
                print("\n".join(output.printable(line) for line in _told(call)), flush=True)
            told += 1
            if told == count:
                return


@app.command()
def certs(json: Json = False) -> None:
    """The mesh's trust domain and roots, and each node's certificates of its services, with their ends."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.insight import MeshCertificates
    from outrider.v1 import insight_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.insight.ListCertificates, insight_pb2.ListCertificatesRequest())
    found = codec.from_wire(answer, MeshCertificates)
    if json:
        output.print_json(found)
        return
    print(f"trust domain {found.trust_domain}, datacenter {found.datacenter}")
    roots = [
        ("root" if root.active else "root, trusted", root.name, "", root.serial, output.until(root.expires_at_s))
        for root in found.roots
    ]
    leaves = [("leaf", leaf.service, leaf.node, leaf.serial, output.until(leaf.expires_at_s)) for leaf in found.leaves]
    output.print_table(("KIND", "NAME", "NODE", "SERIAL", "ENDS"), [*roots, *leaves])
    for node in found.silent:
        output.say(f"node {node} did not answer: its certificates are missing")


@app.command("rotate-root")
def rotate_root() -> None:
    """Have another root sign certificates. Waits until all sidecars trust it; no call fails meanwhile."""
    from outrider.cli.client import connect
    from outrider.v1 import insight_pb2

    with connect() as fleet:
        answer = fleet.call(fleet.insight.RotateRoot, insight_pb2.RotateRootRequest())
    print(f"root {answer.serial} signs; certificates follow, and the old root is trusted for three more days")


def _told(call: "TappedCall") -> Iterator[str]:
    from datetime import datetime

    at = datetime.fromtimestamp(call.at_s).strftime("%H:%M:%S.%f")[:-3]  # noqa: DTZ006 - the reader's own time
    status = str(call.status) if call.status else "no answer"
    yield f"{at} {call.alloc} {call.method} {call.path} -> {status}, {call.duration_ms:.1f} ms"
    for mark, pairs in ((">", call.request), ("<", call.response)):
        for header in pairs:
            yield f"  {mark} {header.name}: {'...' if header.redacted else header.value}"


def _dot(graph: "MeshGraph") -> Iterator[str]:
    yield "digraph mesh {"
    yield "  rankdir=LR; node [shape=box];"
    for edge in graph.edges:
        yield f'  "{edge.source}" -> "{edge.destination}" [label="{_label(edge)}"];'
    yield "}"


def _label(edge: "MeshEdge") -> str:
    parts = [f"{edge.calls_per_s:.1f}/s"]
    if edge.failed_share:
        parts.append(f"{_percent(edge.failed_share)} failed")
    if edge.p99_ms is not None:
        parts.append(f"p99 {_ms(edge.p99_ms)}")
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share else "0"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
