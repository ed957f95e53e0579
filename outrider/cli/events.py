"""`outrider events`: what changed in the fleet, in order."""

from typing import Annotated

import typer


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only those with a higher sequence number.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One object a line, for scripts.")] = False,
) -> None:
    """What changed, oldest first. A listener that does not keep up is cut off: begin again with --after."""
    import time

    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.fleet import FleetEvent
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        request = operator_pb2.WatchEventsRequest(follow=follow, after=after)
        for message in fleet.stream(fleet.stub.WatchEvents, request):
            event = codec.from_wire(message, FleetEvent)
            if json:
                output.print_json_line(event)
                continue
            clock = time.strftime("%H:%M:%S", time.localtime(event.at_s))
            about = " ".join(part for part in (event.job, event.alloc, event.node and f"on {event.node}") if part)
            print(f"{clock}  {event.sequence:>5}  {event.kind:<20}  {about:<32}  {event.message}".rstrip(), flush=True)
